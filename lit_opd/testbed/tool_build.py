"""Makes ``tools_assets``: a teacher and a student that call tools, with their tokenizer, and the prompts."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from lit_opd.errors import InputError
from lit_opd.files import whole_folder
from lit_opd.testbed.task import write_records
from lit_opd.testbed.tool_task import ToolProblem, draw_problem, make_tool_tokenizer, tool_problems
from lit_opd.testbed.warmup import NOT_SUPERVISED, WarmUp, make_model

TOOL_TEACHER = WarmUp(hidden_size=128, num_steps=160, cosine=True, lr=3e-3)
TOOL_STUDENT = WarmUp(hidden_size=64, num_steps=400, cosine=False, lr=3e-3)
STUDENT_STOPS_AT = 0.35  # of the problems answered rightly; it would go on to all of them
NUM_CHECKED, CHECK_SEED, CHECK_EVERY = 256, 7, 2
NUM_TRAIN, NUM_VAL, PROMPT_SEED, LOG_EVERY = 2048, 256, 1, 20
ENTRIES = ("teacher", "student", "train.jsonl", "val.jsonl")


def build_tools(out: Path, *, seed: int = 0) -> None:
    """Train both models and write the folder ``out``, whole or not at all.

    Args:
        out: replaced when it is an older build.
        seed: of the initial weights and the warm-up problems; table and prompts do not depend on it.
    Raises:
        InputError: when ``out`` exists and is not an older build.
    """
    if out.exists() and not (out.is_dir() and all(entry.name in ENTRIES for entry in out.iterdir())):
        raise InputError(f"`tools.out` must be a new folder or an older build, got {out}; name another folder")
    tokenizer = make_tool_tokenizer()
    with whole_folder(out, replace=True) as draft:
        problems = tool_problems(count=NUM_TRAIN + NUM_VAL, seed=PROMPT_SEED)
        for name, part in (("train", problems[:NUM_TRAIN]), ("val", problems[NUM_TRAIN:])):
            rows = [
                {"id": f"{name}-{index:05d}", "prompt": problem.prompt, "answer": problem.answer}
                for index, problem in enumerate(part)
            ]
            write_records(draft / f"{name}.jsonl", rows)
        for name, plan, stop in (("teacher", TOOL_TEACHER, None), ("student", TOOL_STUDENT, STUDENT_STOPS_AT)):
            print(f"{name}: {plan}")
            model = warm_up_tools(plan, tokenizer, seed=seed, stop=stop)
            print(
                f"{name}: {model.num_parameters()} parameters, greedy {greedy_share(model, tokenizer):.3f}", flush=True
            )
            model.save_pretrained(draft / name)
            tokenizer.save_pretrained(draft / name)
    print(f"wrote {out}")


def warm_up_tools(
    plan: WarmUp, tokenizer: PreTrainedTokenizerFast, *, seed: int, stop: float | None = None
) -> Qwen3ForCausalLM:
    """Train a new model on fresh right conversations; cross-entropy on what the assistant says, end symbols included.

    Args:
        plan: size and schedule.
        tokenizer: of the testbed.
        seed: of the initial weights and the problems.
        stop: end where so large a share of problems is answered rightly; None for the plan's steps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(plan.hidden_size, tokenizer)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr, betas=plan.betas, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.lr_factor)
    began = time.monotonic()
    for step in range(1, plan.num_steps + 1):
        ids, targets = supervised_conversations([draw_problem(rng) for _ in range(plan.batch_size)], tokenizer)
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets[:, 1:], ignore_index=NOT_SUPERVISED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.max_grad_norm)
        optimizer.step()
        schedule.step()
        if step % LOG_EVERY == 0 or step == plan.num_steps:
            print(f"step {step}  loss {loss.item():.4f}  {time.monotonic() - began:.0f} s", flush=True)
        if stop is not None and step % CHECK_EVERY == 0 and greedy_share(model, tokenizer) >= stop:
            break
    return model.eval()


@torch.no_grad()
def greedy_share(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Fraction of problems that greedy turns answer rightly: every token of the right conversation is the likeliest one."""
    ids, targets = supervised_conversations(tool_problems(count=NUM_CHECKED, seed=CHECK_SEED), tokenizer)
    best = model(input_ids=ids[:, :-1]).logits.argmax(-1)
    return float(((best == targets[:, 1:]) | (targets[:, 1:] == NOT_SUPERVISED)).all(-1).double().mean())


def supervised_conversations(problems: list[ToolProblem], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids of whole conversations, int64 [B, L], and the same with ``NOT_SUPERVISED`` where the assistant does not speak.

    The texts are what the chat template makes of them; all problems have one length.
    """
    ids, targets = [], []
    for problem in problems:
        row = tokenizer.encode(f"<user>{problem.prompt}")
        target = [NOT_SUPERVISED] * len(row)
        for said, heard in problem.turns:
            mine = [*tokenizer.encode(said), tokenizer.eos_token_id]
            theirs = tokenizer.encode(f"<tool>{heard}") if heard else []
            row += [*mine, *theirs]
            target += [*mine, *[NOT_SUPERVISED] * len(theirs)]
        ids.append(row)
        targets.append(target)
    return torch.tensor(ids), torch.tensor(targets)
