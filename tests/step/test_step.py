"""One optimizer step against a slow script written from the method's formulas, one row at a time, without padding."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_opd.advantage import EntropyNull
from lit_opd.objective import PolicyLoss
from lit_opd.step.recipe import Recipe
from lit_opd.weighting.combinators import SequenceMeanOne
from lit_opd.weighting.fire_rows import FiReRows
from lit_opd.weighting.fractions import FirstFraction
from lit_opd.weighting.importance import ImportanceWeighting
from lit_opd.weighting.least_likely import LeastLikely
from lit_opd.weighting.uniform import Uniform
from tests.helpers import fixed, tiny

LENGTHS = [5, 1, 9, 7, 3, 9, 2]
PROMPTS = [4, 6, 3, 8, 5, 2, 7]
TRUNCATED = {2, 5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def rollout():
    return fixed.rollout(lengths=LENGTHS, prompt_lengths=PROMPTS, truncated=TRUNCATED)


def row_logprobs(model, prompt: list[int], response: list[int]) -> list[torch.Tensor]:
    """log pi(y_t | x, y_<t), one scalar a token: the logits at a slot score the next token."""
    logits = model(torch.tensor([prompt + response])).logits[0]
    table = torch.log(torch.softmax(logits, -1))
    return [table[len(prompt) + place - 1, token] for place, token in enumerate(response)]


def importance_weights(disagreement: list[float], w_max: float = 1.5) -> list[float]:
    total, behind, weights = sum(disagreement) + 1e-8, 0.0, []
    for value in disagreement:
        weights.append(1 + (w_max - 1) * min(max(1 - behind / total, 0.0), 1.0))
        behind += value
    return weights


def slow_step(folders, rollout, dtype, *, weigh, aggregation="sequence-mean", skip=frozenset()):
    """Loss and gradient of L = - Agg[ sg(w A) s ], written with Python loops."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for folder in folders)
    rows = []
    for row in range(len(rollout)):
        if row in skip:
            continue
        prompt = rollout.prompts.ids[row][rollout.prompts.mask[row]].tolist()
        response = rollout.response_ids[row][rollout.mask[row]].tolist()
        ours = row_logprobs(student, prompt, response)
        with torch.no_grad():
            theirs = row_logprobs(teacher, prompt, response)
        advantage = [float(q) - float(s) for q, s in zip(theirs, ours, strict=True)]
        weights = weigh([abs(a) for a in advantage])
        rows.append([(s, w, a) for s, w, a in zip(ours, weights, advantage, strict=True) if w is not None])
    tokens = sum(len(row) for row in rows)
    divide = {
        "sequence-mean": lambda row: len(row) * len(rows),
        "token-mean": lambda row: tokens,
        "sequence-sum": lambda row: len(rows),
        "constant": lambda row: len(rows) * max(LENGTHS),
    }[aggregation]
    objective = sum(-(w * a) * s / divide(row) for row in rows for s, w, a in row)
    reported = sum(-(w * a) / divide(row) for row in rows for s, w, a in row)
    objective.backward()
    return reported, {name: p.grad for name, p in student.named_parameters()}


def number_of_micro_batches(rollout, budget: int | None) -> int:
    from lit_opd.step.micro_batches import micro_batches

    return len(micro_batches(rollout.layout.row_lengths, token_budget=budget))


CUTS = [("float64", 1e-10, None, 1), ("float64", 1e-10, 48, 2), ("float64", 1e-10, 20, 5), ("float32", 1e-6, 20, 5)]
CUTS += [pytest.param("float32", 1e-6, *cut, marks=pytest.mark.slow) for cut in ((None, 1), (48, 2))]
BUDGETS = [pytest.param(None, marks=pytest.mark.slow), 20]


@pytest.mark.parametrize(("dtype", "tolerance", "budget", "count"), CUTS)
def test_importance_weighted_step_equals_the_slow_script(folders, rollout, budget, count, dtype, tolerance):
    assert number_of_micro_batches(rollout, budget) == count
    trained = fixed.module(
        folders,
        rollout,
        dtype=dtype,
        token_budget=budget,
        weighting=ImportanceWeighting(),
        objective=PolicyLoss(importance_cap=None),
    )
    loss, ours = fixed.gradient(trained, rollout.prompts)
    expected, theirs = slow_step(folders, rollout, getattr(torch, dtype), weigh=importance_weights)
    assert loss == pytest.approx(expected, rel=tolerance)
    assert fixed.relative_gap(ours, theirs) < tolerance


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean", "sequence-sum", "constant"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_aggregation_equals_the_slow_script(folders, rollout, aggregation, budget):
    def weigh(d):
        return [1.0] * len(d)

    trained = fixed.module(
        folders,
        rollout,
        token_budget=budget,
        aggregation=aggregation,
        weighting=Uniform(),
        objective=PolicyLoss(importance_cap=None),
    )
    loss, ours = fixed.gradient(trained, rollout.prompts)
    expected, theirs = slow_step(folders, rollout, torch.float64, weigh=weigh, aggregation=aggregation)
    assert loss == pytest.approx(expected, rel=1e-10)
    assert fixed.relative_gap(ours, theirs) < 1e-10


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_dropped_tokens_leave_the_denominator(folders, rollout, aggregation, budget):
    def first_third(d):
        kept = -(-len(d) * 3 // 10)  # ceil of 0.3 n in integers
        return [1.0 if place < kept else None for place in range(len(d))]

    trained = fixed.module(
        folders,
        rollout,
        token_budget=budget,
        aggregation=aggregation,
        weighting=FirstFraction(0.3),
        objective=PolicyLoss(importance_cap=None),
    )
    _, ours = fixed.gradient(trained, rollout.prompts)
    _, theirs = slow_step(folders, rollout, torch.float64, weigh=first_third, aggregation=aggregation)
    assert fixed.relative_gap(ours, theirs) < 1e-10


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean", "sequence-sum", "constant"])
def test_a_step_without_the_rows_that_a_strategy_drops_is_the_step_on_the_others(folders, rollout, aggregation):
    """FiReRows at one half drops the three rows of seven with the lowest mean log-prob of the teacher."""
    settings = {"aggregation": aggregation, "objective": PolicyLoss(importance_cap=None)}
    dropping = fixed.module(folders, rollout, weighting=FiReRows(0.5), token_budget=20, **settings)
    collect = fixed.fit(dropping, rollout.prompts, watch=(start := fixed.StartWeights()))
    ours = {name: start.weights[name] - value for name, value in fixed.weights(dropping).items()}
    signal = collect.records[0].signal
    means = [float(row[own].mean()) for row, own in zip(signal.teacher_logprobs, signal.mask, strict=True)]
    skip = set(sorted(range(len(means)), key=means.__getitem__)[:3])

    def weigh(d):
        return [1.0] * len(d)

    loss, theirs = slow_step(folders, rollout, torch.float64, weigh=weigh, aggregation=aggregation, skip=skip)
    assert collect.losses[0] == pytest.approx(loss, rel=1e-10)
    assert fixed.relative_gap(ours, theirs) < 1e-10


@pytest.mark.parametrize("truncated", ["mask", "drop"])
def test_truncated_rows_leave_loss_and_denominator(folders, rollout, truncated):
    trained = fixed.module(
        folders,
        rollout,
        truncated=truncated,
        weighting=ImportanceWeighting(),
        objective=PolicyLoss(importance_cap=None),
    )
    loss, ours = fixed.gradient(trained, rollout.prompts)
    expected, theirs = slow_step(folders, rollout, torch.float64, weigh=importance_weights, skip=TRUNCATED)
    assert loss == pytest.approx(expected, rel=1e-10)
    assert fixed.relative_gap(ours, theirs) < 1e-10


def test_equal_student_and_teacher_give_zero_advantage_and_gradient(folders, rollout):
    student, _ = folders
    trained = fixed.module((student, student), rollout, weighting=ImportanceWeighting())
    trained.configure_model()
    before = fixed.weights(trained)
    collect = fixed.fit(trained, rollout.prompts)
    assert float(collect.records[0].signal.log_ratio.abs().max()) == 0.0
    assert float(collect.records[0].grad_norm) == 0.0
    for name, value in fixed.weights(trained).items():
        assert torch.equal(value, before[name]), name


def test_a_first_pass_over_the_batch_changes_nothing_but_the_order(folders, rollout, monkeypatch):
    """Sequence-scope weights computed inside the micro-batch equal those from one scoring pass before."""
    inside = fixed.module(folders, rollout, token_budget=20, weighting=SequenceMeanOne(ImportanceWeighting()))
    before = fixed.module(folders, rollout, token_budget=20, weighting=SequenceMeanOne(ImportanceWeighting()))
    assert not before.recipe.needs_scoring_pass
    _, plain = fixed.gradient(inside, rollout.prompts)

    class Forced(Recipe):
        needs_scoring_pass = True

    plain_recipe = before.recipe
    forced_recipe = Forced(**{field.name: getattr(plain_recipe, field.name) for field in fields(Recipe)})
    monkeypatch.setattr(type(before), "recipe", property(lambda module: forced_recipe))
    _, forced = fixed.gradient(before, rollout.prompts)
    assert fixed.relative_gap(forced, plain) < 1e-12


def test_truncated_importance_sampling_scales_each_token(folders, rollout):
    """With sampler log-probs one nat below the student's, every token's weight is e; capped at 2 it is 2."""
    from dataclasses import replace

    plain = fixed.module(folders, rollout, weighting=Uniform(), objective=PolicyLoss(importance_cap=None))
    collect = fixed.fit(plain, rollout.prompts)
    lower = collect.records[0].signal.student_logprobs - 1.0
    shifted = replace(rollout, sampler_logprobs=lower)
    _, base = fixed.gradient(
        fixed.module(folders, rollout, weighting=Uniform(), objective=PolicyLoss(importance_cap=None)), rollout.prompts
    )
    for cap, factor in ((5.0, torch.e), (2.0, 2.0)):
        trained = fixed.module(folders, shifted, weighting=Uniform(), objective=PolicyLoss(importance_cap=cap))
        _, ours = fixed.gradient(trained, rollout.prompts)
        # 1e-6 and not 1e-10: transformers' RMSNorm computes in float32, so a scaled gradient rounds differently
        assert fixed.relative_gap(ours, {name: value * factor for name, value in base.items()}) < 1e-6


def test_the_record_holds_rows_in_batch_order(folders, rollout):
    collect = fixed.fit(fixed.module(folders, rollout, token_budget=20), rollout.prompts)
    whole = fixed.fit(fixed.module(folders, rollout, token_budget=None), rollout.prompts)
    for name in ("student_logprobs", "teacher_logprobs", "mask"):
        torch.testing.assert_close(getattr(collect.records[0].signal, name), getattr(whole.records[0].signal, name))
    torch.testing.assert_close(collect.records[0].weights, whole.records[0].weights)


def test_an_advantage_of_the_whole_batch_does_not_depend_on_the_micro_batches(folders, rollout):
    """Entropies are ranked over all rows, wherever the batch is cut; the teacher has no part in it."""
    transform = EntropyNull(fraction=0.3)
    settings = {"advantage": [transform], "weighting": LeastLikely(0.3)}
    whole, cut = (
        fixed.fit(fixed.module(folders, rollout, token_budget=budget, **settings), rollout.prompts)
        for budget in (None, 20)
    )
    for collected in (whole, cut):
        signal = collected.records[0].signal
        want = transform(signal.log_ratio, signal)
        torch.testing.assert_close(signal.effective_advantage, want, rtol=1e-12, atol=1e-12)
        assert len(want[want != 0].unique()) > 3
        assert torch.equal(collected.records[0].kept, want != 0)
    assert whole.losses == pytest.approx(cut.losses, rel=1e-9)
    torch.testing.assert_close(whole.records[0].grad_norm, cut.records[0].grad_norm, rtol=1e-9, atol=0)
