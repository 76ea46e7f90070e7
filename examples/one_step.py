"""On-policy distillation, read from top to bottom: python examples/one_step.py [STEPS]

    prompts -> rollout -> log-probs -> signal -> weights -> loss -> step

The student answers, the teacher says how likely it finds each token of the answer, and the student moves towards the teacher
on texts of its own. Plain PyTorch with the library's pieces, no Trainer; ``tests/step/test_one_step.py`` proves that ``one_step``
leaves the weights that ``OPDModule.training_step`` leaves, bit for bit where both see the rows in one order.

Left out, as the gradient is the same without: micro-batches, several devices, and PPO's clips, which cannot act on a batch
that is used once. Left out as well: settings that change with the progress of a run, other objectives and advantages, the
skipping of a step that holds a NaN, validation, checkpoints.

B rows (one sampled response each), P prompt slots, T response slots; column t is response token t in every row.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch.optim import AdamW, Optimizer
from transformers import AutoTokenizer

from lit_opd.models.student import StudentSettings, build_student
from lit_opd.prompts import PromptEncoder, collate, encode_rows, read_prompts
from lit_opd.rollout import Sampler, SamplingSettings, TransformersSampler
from lit_opd.scoring.model import ScoringModel
from lit_opd.testbed import ASSETS
from lit_opd.types import PromptBatch, TokenSignal
from lit_opd.weighting import WeightingStrategy
from lit_opd.weighting.importance import ImportanceWeighting

STEPS, ROWS = 16, 128
CLIP_NORM = 1.0  # bound of the gradient's global norm
IMPORTANCE_CAP = 5.0  # bound of a token's sampler-to-student weight


def one_step(
    student: ScoringModel, teacher: ScoringModel, optimizer: Optimizer, prompts: PromptBatch,
    sampler: Sampler, settings: SamplingSettings, weighting: WeightingStrategy,
) -> dict[str, float]:  # fmt: skip
    """One optimizer step on B prompts; returns a row of the table, by column."""
    # prompts -> rollout. The student itself writes one response a row: "on-policy". No gradient flows through the drawing.
    rollout = sampler.sample(student, prompts, settings)
    mask = rollout.mask  # bool [B, T], True on sampled tokens, the end symbol included; False on the padding after it

    # rollout -> log-probs, [B, T] nats, 0 where masked. Both models read the same prompts and responses, at the temperature
    # of the sampling; the logits at one slot score the token in the next. The gradient will flow through the student's alone.
    student_logprobs = student(rollout, temperature=settings.temperature).logprobs
    with torch.no_grad():
        teacher_logprobs = teacher(rollout, temperature=settings.temperature).logprobs

    # log-probs -> signal, all that a weighting may read. The record detaches what it is given (stop-gradient): advantage and
    # weights below are plain numbers, and the student cannot lower its loss by changing them.
    signal = TokenSignal(
        student_logprobs=student_logprobs, teacher_logprobs=teacher_logprobs, mask=mask,
        row_keys=prompts.row_keys, step=settings.step,
    )  # fmt: skip
    advantage = signal.log_ratio  # teacher - student, above 0 where the teacher likes the token more than the student

    # signal -> weights, [B, T], at least 0, 0 where masked: how much each token counts.
    weights = weighting(signal)
    kept = weighting.kept(signal)  # bool [B, T], what the denominators count: the mask, less what the strategy drops

    # weights -> loss of a token. ``ratio`` is exactly 1 and is there for its gradient, which is that of the log-prob. Follow
    # one token: with an advantage above 0 the loss falls as its log-prob rises, so the step makes it likelier. Advantages
    # are maximised and losses minimised, hence the one minus sign. ``importance`` stands for sampling by an engine whose
    # numbers are not the student's; where the student samples, as here, it is 1 but for rounding.
    ratio = (student_logprobs - signal.student_logprobs).exp()
    importance = (signal.student_logprobs - rollout.sampler_logprobs).exp().clamp(max=IMPORTANCE_CAP)
    token_loss = -weights * importance * (ratio * advantage)  # [B, T], 0 where masked

    # token losses -> loss: the mean over a row's tokens, then over rows, so that a long row counts as much as a short one.
    # ``clamp`` makes 0/0 a 0: a row without kept tokens adds nothing above the line and is not counted below it.
    row_loss = token_loss.sum(-1) / kept.sum(-1).clamp(min=1)  # [B]
    loss = row_loss.sum() / kept.any(-1).sum().clamp(min=1)

    # loss -> step. A gradient longer than the bound keeps its direction and gets the bound's length.
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()

    return {  # all from before the step; the last three are means over tokens, not over rows
        "loss": loss.item(),
        "disagreement": float(signal.disagreement.sum() / mask.sum()),  # |teacher - student|, nats
        "weight_mean": float(weights.sum() / kept.sum()),
        "reverse_kl_k1": float(-advantage.sum() / mask.sum()),  # KL(student || teacher), k1 estimate, nats
    }


def main(steps: int = STEPS) -> None:
    """Train the embedded student for a few steps, at most 32: each takes 128 of the 4096 prompts."""
    torch.set_num_threads(1)  # the models are tiny: threads would wait for each other
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "student")
    size, eos, pad = len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id
    folders = [str(ASSETS / role) for role in ("student", "teacher")]
    student, teacher = (ScoringModel(build_student(StudentSettings(path)), vocabulary=size) for path in folders)
    optimizer = AdamW(student.parameters(), lr=3e-4, betas=(0.9, 0.98))
    sampler, weighting = TransformersSampler(), ImportanceWeighting()  # see its docstring for the formula
    settings = SamplingSettings(max_new_tokens=48, stop_ids=(eos,), pad_id=pad, vocabulary=size)
    encoded = encode_rows(read_prompts(str(ASSETS / "train.jsonl"))[: steps * ROWS], PromptEncoder(tokenizer))
    for step in range(steps):
        prompts = collate(encoded[step * ROWS : (step + 1) * ROWS], pad)  # left-padded [B, P]
        now = replace(settings, step=step)  # a row's random numbers are a function of seed, step and row
        row = one_step(student, teacher, optimizer, prompts, sampler, now, weighting)
        if step == 0:
            print("step", *(f"{name:>14}" for name in row))
        print(f"{step:4d}", *(f"{value:14.4f}" for value in row.values()), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
