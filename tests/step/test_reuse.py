"""Several optimizer steps on one rollout batch: ratio, clips and frozen signal, against a slow script in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lit_opd.objective import Divergence, PolicyLoss
from lit_opd.types import TokenSignal
from lit_opd.weighting.fractions import FirstFraction
from lit_opd.weighting.importance import ImportanceWeighting
from tests.helpers import fixed, tiny

LENGTHS = [5, 1, 9, 7, 3, 9, 2]
PROMPTS = [4, 6, 3, 8, 5, 2, 7]
CLIP, DUAL, CAP, RATE = 0.05, 1.1, 3.0, 0.05
EPOCHS, CHUNKS = 2, ([0, 1, 2, 3], [4, 5, 6])  # seven rows in two mini-batches


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def rollout():
    """Sampler log-probs are noise, so that importance weights vary and some reach the cap."""
    plain = fixed.rollout(lengths=LENGTHS, prompt_lengths=PROMPTS, truncated={2, 5})
    noise = torch.rand(plain.mask.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return replace(plain, sampler_logprobs=-8 * noise)


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch):
    """transformers' norms round to float32 whatever the weights are: a last bit before them is 1e-8 after them."""

    def forward(self, states):
        return self.weight * states * (states.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(Qwen3RMSNorm, "forward", forward)


def row_logprobs(model, rollout, row: int) -> list[torch.Tensor]:
    prompt = rollout.prompts.ids[row][rollout.prompts.mask[row]].tolist()
    response = rollout.response_ids[row][rollout.mask[row]].tolist()
    table = torch.log(torch.softmax(model(torch.tensor([prompt + response])).logits[0], -1))
    return [table[len(prompt) + place - 1, token] for place, token in enumerate(response)]


def slow_updates(folders, rollout):
    """The student after four updates, with the counts of tokens each clip cut; signs and cases written out."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in folders)
    fixed_parts = []  # per row: (s_old, A, w, importance) per token, computed once
    with torch.no_grad():
        for row in range(len(rollout)):
            old = [float(s) for s in row_logprobs(student, rollout, row)]
            advantage = [float(q) - s for q, s in zip(row_logprobs(teacher, rollout, row), old, strict=True)]
            sampled = rollout.sampler_logprobs[row][rollout.mask[row]].tolist()
            total, behind, tokens = sum(map(abs, advantage)) + 1e-8, 0.0, []
            for s, a, b in zip(old, advantage, sampled, strict=True):
                tokens.append((s, a, 1.5 - 0.5 * behind / total, min(math.exp(s - b), CAP)))
                behind += abs(a)
            fixed_parts.append(tokens)
    cut = {"high": 0, "low": 0, "dual": 0, "capped": sum(t[3] == CAP for row in fixed_parts for t in row)}
    for _ in range(EPOCHS):
        for chunk in CHUNKS:
            loss = 0.0
            for row in chunk:
                parts = fixed_parts[row]
                for now, (old, a, w, tis) in zip(row_logprobs(student, rollout, row), parts, strict=True):
                    ratio = torch.exp(now - old)
                    if a > 0 and ratio > 1 + CLIP:
                        gain, cut["high"] = a * (1 + CLIP), cut["high"] + 1
                    elif a < 0 and ratio < 1 - CLIP:
                        gain, cut["low"] = a * (1 - CLIP), cut["low"] + 1
                    elif a < 0 and ratio > DUAL:
                        gain, cut["dual"] = a * DUAL, cut["dual"] + 1
                    else:
                        gain = a * ratio
                    loss = loss - w * tis * gain / len(parts) / len(chunk)
            student.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in student.parameters():
                    p -= RATE * p.grad
    return {name: p.detach() for name, p in student.named_parameters()}, cut


def settings(**changes):
    """Two mini-batches, two epochs, plain gradient descent."""
    return {
        "weighting": ImportanceWeighting(),
        "mini_batches": len(CHUNKS),
        "epochs": EPOCHS,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=RATE),
    } | changes


@pytest.mark.parametrize("budget", [None, 20])
def test_four_updates_of_one_batch_equal_the_slow_script(folders, rollout, budget):
    objective = PolicyLoss(clip=CLIP, dual_clip=DUAL, importance_cap=CAP)
    trained = fixed.module(folders, rollout, **settings(objective=objective, token_budget=budget))
    start = fixed.StartWeights()
    collect = fixed.fit(trained, rollout.prompts, steps=4, watch=start)
    expected, cut = slow_updates(folders, rollout)
    assert all(count > 0 for count in cut.values()), cut  # every clip was active, or nothing was tested
    after = fixed.weights(trained)
    assert float(collect.records[0].clipped.double().sum()) > 0 and collect.records[0].step == 4
    for name, value in expected.items():
        assert float((after[name] - value).abs().max()) < 1e-9, name
    assert max(float((after[name] - start.weights[name]).abs().max()) for name in after) > 1e-2


def test_a_token_without_weight_has_no_gradient_that_a_clip_could_cut():
    """The first half of each row is trained. The ratios of the others alone leave the interval, then that of the last one too."""
    mask = torch.ones(4, 8, dtype=torch.bool)
    signal = TokenSignal(student_logprobs=-torch.ones(4, 8), teacher_logprobs=torch.zeros(4, 8), mask=mask)
    weights = FirstFraction(0.5)(signal)
    for moved, share in ((torch.arange(8) >= 4, 0.0), (torch.arange(8) >= 3, 0.25)):
        logprobs = torch.where(moved, signal.student_logprobs + 1.0, signal.student_logprobs).requires_grad_()
        loss = PolicyLoss(clip=CLIP).token_loss(logprobs, signal, weights)
        (gradient,) = torch.autograd.grad(loss.values.sum(), logprobs)
        trained = weights > 0
        assert torch.equal(loss.clipped, trained & (gradient == 0)) and trained.sum() == 16
        assert float(loss.clipped.sum() / trained.sum()) == share


def test_the_signal_and_the_weights_are_those_before_the_first_update(folders, rollout):
    once = fixed.fit(fixed.module(folders, rollout, weighting=ImportanceWeighting()), rollout.prompts).records[0]
    often = fixed.fit(fixed.module(folders, rollout, **settings()), rollout.prompts, steps=4).records[0]
    torch.testing.assert_close(often.signal.student_logprobs, once.signal.student_logprobs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(often.weights, once.weights, rtol=1e-12, atol=1e-12)


def test_a_divergence_goes_on_falling_over_the_updates_of_one_batch(folders, rollout):
    """The later updates see the student as it is then: the loss of the last pass is below that of the first."""
    first = fixed.fit(fixed.module(folders, rollout, objective=Divergence("forward_kl")), rollout.prompts).records[0]
    trained = fixed.module(folders, rollout, **settings(objective=Divergence("forward_kl")))
    last = fixed.fit(trained, rollout.prompts, steps=4).records[0]
    assert float(last.loss.sum()) < 0.97 * float(first.loss.sum())


# -- fewer rows than mini-batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [{0}, set()], ids=["one row left", "no row left"])
@pytest.mark.parametrize("objective", [PolicyLoss(), Divergence("reverse_kl")], ids=["policy", "divergence"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_mini_batch_without_rows_is_the_step_on_masked_rows(folders, left, objective, epochs):
    """Row 0 is in the first mini-batch whether the others are masked or dropped. AdamW moves by a gradient of zero too, not where
    there is none."""
    cut = fixed.rollout(lengths=LENGTHS, prompt_lengths=PROMPTS, truncated=set(range(len(LENGTHS))) - left)
    changes = {
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
        "objective": objective,
        "epochs": epochs,
    }
    found = []
    for truncated in ("mask", "drop"):
        trained = fixed.module(folders, cut, **settings(truncated=truncated, **changes))
        collect = fixed.fit(trained, cut.prompts, steps=4 * epochs)
        values = trained.trainer.callback_metrics.items()
        logged = {name: float(value) for name, value in values if not name.startswith("time/")}
        found.append((collect, fixed.weights(trained), logged))
    (masked, same, metrics), (dropped, ours, others) = found
    assert [len(record.rollout) for record in dropped.records] == [1, 1] and len(masked.records[0].rollout) == 7
    assert dropped.losses == pytest.approx(masked.losses, rel=1e-10)
    assert others == pytest.approx(metrics, rel=1e-9) and all(map(math.isfinite, others.values()))
    assert fixed.relative_gap(ours, same) < 1e-10
