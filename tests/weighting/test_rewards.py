"""Rewards beside the teacher: group advantages against slow loops, plain GRPO through the real step, gates by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import Tensor

from lit_opd import advantage as adv
from lit_opd.batchwise import group_moments
from lit_opd.errors import InputError
from lit_opd.evaluation import AnswerReward, Reward
from lit_opd.objective import Divergence, PolicyLoss
from lit_opd.preflight.module_checks import check_reward, setting_warnings
from lit_opd.types import FinishReason, PromptBatch, Provenance, Rollout, TokenSignal
from lit_opd.weighting import CDD, BatchMeanOne, ImportanceWeighting, Uniform
from tests.helpers import fixed, tiny

NAN = math.nan
REWARDS = [1.0, 0.0, NAN, 1.0, 0.5, 0.25, 1.0]
GROUPS = [3, 3, 3, 3, 8, 9, 9]
LENGTHS = [5, 1, 9, 7, 3, 9, 2]


def signal(rewards: Sequence[float] = REWARDS, groups: Sequence[int] | None = GROUPS) -> TokenSignal:
    generator = torch.Generator().manual_seed(4)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(-1)
    student, teacher = -torch.rand(2, *mask.shape, generator=generator, dtype=torch.float64)
    group = None if groups is None else torch.tensor(groups)
    return TokenSignal(
        student_logprobs=student, teacher_logprobs=teacher, mask=mask, reward=torch.tensor(rewards), group=group
    )


def slow_group(rewards: Sequence[float], groups: Sequence[int], normalise: str) -> list[float]:
    found = []
    for own, group in zip(rewards, groups, strict=True):
        others = [r for r, g in zip(rewards, groups, strict=True) if g == group and not math.isnan(r)]
        if math.isnan(own) or len(others) < 2:
            found.append(0.0)
            continue
        apart = own - statistics.fmean(others)
        found.append(apart / (statistics.stdev(others) + 1e-4) if normalise == "std" else apart)
    return found


@pytest.mark.parametrize("normalise", ["std", "none"])
@pytest.mark.parametrize("teacher", [0.0, 1.0, 0.3])
def test_every_token_of_a_row_gets_the_advantage_of_its_group(normalise, teacher):
    given = signal()
    found = adv.GroupReward(2.0, normalise, teacher)(given.log_ratio, given)
    for row, value in enumerate(slow_group(REWARDS, GROUPS, normalise)):
        wanted = [teacher * a + 2.0 * value for a in given.log_ratio[row][given.mask[row]].tolist()]
        assert found[row][given.mask[row]].tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert not found[~given.mask].any()


def test_equal_rewards_and_lonely_rows_say_nothing():
    count, mean, deviation = group_moments(torch.tensor([2.0, 2.0, 5.0, NAN]), torch.tensor([1, 1, 2, 3]))
    assert (count.tolist(), mean.tolist(), deviation.tolist()) == ([2, 2, 1, 0], [2, 2, 5, 0], [0, 0, 0, 0])
    given = signal([1.0] * 7)
    assert not adv.GroupReward(teacher=0.0)(given.log_ratio, given).any()


def test_the_residual_is_centred_in_the_row_and_added_to_the_group():
    given = signal()
    found = adv.ResidualReward(0.7)(given.log_ratio, given)
    for row, value in enumerate(slow_group(REWARDS, GROUPS, "std")):
        own = given.mask[row]
        gaps = [
            math.exp(q) - math.exp(s)
            for q, s in zip(
                given.teacher_logprobs[row][own].tolist(), given.student_logprobs[row][own].tolist(), strict=True
            )
        ]
        wanted = [value + 0.7 * (gap - statistics.fmean(gaps)) for gap in gaps]
        assert found[row][own].tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("how", "factor", "left"), [("keep", 0.5, 0.0), ("scale", 0.25, 0.25), ("drop", 0.5, 0.0)])
def test_the_gate_passes_rows_on_which_teacher_and_reward_agree(how, factor, left):
    given = signal()
    found = adv.RewardGate(how, factor)(adv.Sign()(given.log_ratio, given), given)
    for row, reward in enumerate(REWARDS):
        ratio = given.log_ratio[row][given.mask[row]].tolist()
        stopped = (2 * reward - 1) * statistics.fmean(ratio) < 0  # NaN passes
        wanted = [math.copysign(1.0, a) * (left if stopped else 1.0) for a in ratio]
        assert found[row][given.mask[row]].tolist() == wanted
    assert {row for row, reward in enumerate(REWARDS) if found[row].abs().max() < 1}  # some are stopped


def test_a_gate_refuses_rewards_that_are_no_share_of_right(folders):
    """With 0 for right and -1 for wrong every row would count as wrong."""
    gate, names = adv.RewardGate(), ["a", "b", "c"]
    gate.check_rewards(torch.tensor([0.0, 1.0, NAN]), names)
    for wrong in (-1.0, 1.5):
        with pytest.raises(InputError, match=f"`RewardGate` must get rewards in .0, 1.*got {wrong:g} for row 'b'"):
            gate.check_rewards(torch.tensor([0.0, wrong, NAN]), names)
    adv.GroupReward().check_rewards(torch.tensor([7.0]), ["a"])

    class Penalty(Given):
        def score(self, responses, rollout):
            return [-1.0] * len(responses)

    trained = fixed.module(folders, samples(), advantage=[gate], reward=Penalty())
    with pytest.raises(InputError, match="got -1 for row 'prompt-3'"):
        fixed.fit(trained, samples().prompts)
    known = fixed.module(folders, samples(), advantage=[gate], reward=AnswerReward(right=0.0, wrong=-1.0))
    with pytest.raises(InputError, match="`AnswerReward.wrong` must be in .0, 1. with `RewardGate`.*got -1"):
        check_reward(known, None)
    known.reward.close()


def test_without_groups_or_rewards_nothing_is_guessed():
    given = signal(groups=None)
    with pytest.raises(InputError, match="`TokenSignal.group` must say which rows answer one prompt"):
        adv.GroupReward()(given.log_ratio, given)
    for transform in (adv.GroupReward(), adv.ResidualReward(), adv.RewardGate()):
        bare = TokenSignal(
            student_logprobs=given.student_logprobs, teacher_logprobs=given.teacher_logprobs, mask=given.mask
        )
        with pytest.raises(InputError, match=f"`{type(transform).__name__}` requires `TokenSignal.reward`"):
            transform(bare.log_ratio, bare)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (adv.GroupReward, {"coefficient": NAN}),
        (adv.GroupReward, {"coefficient": "1"}),
        (adv.GroupReward, {"teacher": None}),
        (adv.Clip, {"c": "5"}),
        (adv.Power, {"alpha": None}),
        (adv.RewardExtrapolation, {"strength": True}),
        (adv.NullAdvantage, {"value": "-0.5"}),
        (adv.GroupReward, {"normalise": "mean"}),
        (adv.GroupReward, {"teacher": -1.0}),
        (adv.ResidualReward, {"coefficient": -1.0}),
        (adv.ResidualReward, {"normalise": "mean"}),
        (adv.RewardGate, {"how": "mask"}),
        (adv.RewardGate, {"factor": 1.5}),
    ],
)
def test_settings_out_of_range_are_named(cls, arguments):
    with pytest.raises(InputError, match=f"`{cls.__name__}.{next(iter(arguments))}` must be "):
        cls(**arguments)


# -- through the step --------------------------------------------------------------------------------------------------


class Given(Reward):
    """The number that a row's key asks for."""

    def score(self, responses: Sequence[str], rollout: Rollout) -> list[float | None]:
        numbers = [REWARDS[int(key) - 100] for key in rollout.prompts.row_keys]
        return [None if math.isnan(value) else value for value in numbers]


def samples() -> Rollout:
    """Seven responses to three prompts."""
    whole = fixed.rollout(lengths=LENGTHS, prompt_lengths=[4, 4, 4, 4, 5, 3, 3], truncated={2})
    prompts = whole.prompts
    named = PromptBatch(prompts.ids, prompts.mask, prompts.row_keys, tuple(f"prompt-{group}" for group in GROUPS))
    return Rollout(
        named, whole.response_ids, whole.mask, whole.sampler_logprobs, whole.finish_reason, Provenance("fixed")
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("pair"))


def student_logprobs(trained, rollout: Rollout) -> Tensor:
    """[B, T], with gradient."""
    found: Tensor = trained.student(rollout).logprobs
    return found


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean"])
@pytest.mark.parametrize("token_budget", [None, 20])
def test_with_the_reward_alone_the_step_is_grpo(folders, aggregation, token_budget):
    """Against the loss as it is written: - mean of rows (or tokens) of G_i log p, G from a slow loop."""
    rollout = samples()
    settings = {"aggregation": aggregation, "token_budget": token_budget, "weighting": Uniform()}
    settings["objective"] = PolicyLoss(importance_cap=None)  # the fixed rows have no sampler
    trained = fixed.module(folders, rollout, advantage=[adv.GroupReward(teacher=0.0)], reward=Given(), **settings)
    _, ours = fixed.gradient(trained, rollout.prompts)

    fresh = fixed.module(folders, rollout, **settings)
    fresh.trainer = trained.trainer
    fresh.configure_model()
    logprobs = student_logprobs(fresh, rollout)
    group = torch.tensor(slow_group(REWARDS, GROUPS, "std"), dtype=torch.float64)
    terms = (group.unsqueeze(-1) * logprobs) * rollout.mask
    per_row = terms.sum(-1) / rollout.mask.sum(-1)
    loss = -(per_row.mean() if aggregation == "sequence-mean" else terms.sum() / rollout.mask.sum())
    loss.backward()
    theirs = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in fresh.student.causal_lm.named_parameters()
    }
    assert fixed.relative_gap(ours, theirs) < 1e-9


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean", "sequence-sum", "constant"])
@pytest.mark.parametrize("objective", [PolicyLoss(importance_cap=None), Divergence("reverse_kl")])
@pytest.mark.parametrize("weighting", [ImportanceWeighting(), BatchMeanOne(ImportanceWeighting()), CDD(0.1, 0.1)])
def test_a_gate_that_drops_is_the_step_on_the_rows_that_pass(folders, aggregation, objective, weighting):
    """Against a batch of these rows alone, without the gate; which ones pass is told by a slow loop. No mean over the batch
    counts the others."""
    rollout = samples()
    settings = {"aggregation": aggregation, "objective": objective, "weighting": weighting}
    gated = fixed.module(
        folders, rollout, advantage=[adv.RewardGate("drop")], reward=Given(), token_budget=20, **settings
    )
    collect = fixed.fit(gated, rollout.prompts, watch=(start := fixed.StartWeights()))
    ours = {name: start.weights[name] - value for name, value in fixed.weights(gated).items()}
    record = collect.records[0]
    means = [
        statistics.fmean(row[own].tolist())
        for row, own in zip(record.signal.log_ratio, record.rollout.mask, strict=True)
    ]
    passing = [
        row for row, (reward, mean) in enumerate(zip(REWARDS, means, strict=True)) if not (2 * reward - 1) * mean < 0
    ]
    assert 0 < len(passing) < len(REWARDS) and 2 in passing  # 2 has no reward
    assert record.kept.any(-1).nonzero().flatten().tolist() == passing
    part = rollout.rows(torch.tensor(passing))
    loss, theirs = fixed.gradient(fixed.module(folders, part, **settings), part.prompts)
    assert fixed.relative_gap(ours, theirs) < 1e-9 and collect.losses[0] == pytest.approx(loss, rel=1e-9)


def test_a_gate_that_drops_is_not_said_to_be_without_effect(folders):
    settings = {"reward": Given(), "objective": Divergence("reverse_kl")}
    for how, said in (("drop", []), ("keep", ["`model.advantage` has no effect: `Divergence` reads no advantage"])):
        trained = fixed.module(folders, samples(), advantage=[adv.RewardGate(how)], **settings)
        assert list(setting_warnings(trained)) == said
        assert (adv.order_warning([adv.RewardGate(how), adv.NullAdvantage()]) is None) == (how == "drop")
    beside = fixed.module(folders, samples(), advantage=[adv.RewardGate("drop"), adv.GroupReward()], **settings)
    said = list(setting_warnings(beside))
    assert said == ["`GroupReward` in `model.advantage` has no effect: `Divergence` reads no advantage"]


@pytest.mark.parametrize("truncated", ["keep", "mask", "drop"])
def test_the_mean_reward_of_all_sampled_rows_that_have_one_is_logged(folders, truncated):
    """Rows that are cut, and so often wrong, stay in it when they leave the batch."""
    rollout, seen = samples(), []
    reasons = rollout.finish_reason.clone()
    reasons[[1, 4]] = int(FinishReason.LENGTH)
    rollout = replace(rollout, finish_reason=reasons)

    class Watch(fixed.Collect):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(float(trainer.callback_metrics["train/reward"]))

    settings = {"dtype": "float32", "advantage": [adv.GroupReward()], "truncated": truncated}
    trained = fixed.module(folders, rollout, reward=Given(), **settings)
    collect = fixed.fit(trained, rollout.prompts, watch=Watch())
    assert (len(collect.records[0].rollout) < len(rollout)) == (truncated == "drop")
    assert seen == [pytest.approx((1.0 + 0.0 + 1.0 + 0.5 + 0.25 + 1.0) / 6)]


# -- where rewards come from -------------------------------------------------------------------------------------------


class Words:
    """A tokenizer that says what is wanted."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def batch_decode(self, rows, skip_special_tokens):
        return self.texts


def answered(answers: list[str | None]) -> Rollout:
    whole = fixed.rollout(lengths=[2] * len(answers), prompt_lengths=[2] * len(answers), truncated=set())
    prompts = whole.prompts
    own = PromptBatch(prompts.ids, prompts.mask, prompts.row_keys, prompts.row_ids, answers=tuple(answers))
    return Rollout(
        own, whole.response_ids, whole.mask, whole.sampler_logprobs, whole.finish_reason, Provenance("fixed")
    )


def test_an_answer_is_right_wrong_or_cannot_be_told():
    texts = [r"so \boxed{12}", r"\boxed{13}", "nothing", r"\boxed{\frac{1}{2}}", r"\boxed{5}"]
    reward = AnswerReward(right=2.0, wrong=-1.0)
    found = reward(answered(["12", "12", "12", "1/2", None]), Words(texts))
    reward.close()
    assert found[:4].tolist() == [2.0, -1.0, -1.0, 2.0] and found[4].isnan() and found.dtype == torch.float32


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([1.0], "`Own.score` must return one number or None a row, 2, got 1"),
        ([1.0, math.inf], "`Own.score` must return finite numbers or None, got inf for row 'row-1'"),
        ([NAN, 1.0], "`Own.score` must return finite numbers or None, got nan for row 'row-0'"),
        (["1", 1.0], "`Own.score` must return finite numbers or None, got '1' for row 'row-0'"),
        ([1.0, 1e39], "`Own.score` must return finite numbers or None, got 1e\\+39 for row 'row-1'"),
    ],
)
def test_what_a_reward_of_ones_own_may_return(found, message):
    class Own(Reward):
        def score(self, responses, rollout):
            return found

    with pytest.raises(InputError, match=message):
        Own()(answered([None, None]), Words(["a", "b"]))


def test_a_reward_of_ones_own_may_be_a_number_of_any_type():
    class Own(Reward):
        def score(self, responses, rollout):
            return [numpy.float32(0.5), torch.tensor(2.0)]

    assert Own()(answered([None, None]), Words(["a", "b"])).tolist() == [0.5, 2.0]


def test_who_reads_a_reward_must_get_one(folders):
    rollout = samples()
    asking = [adv.GroupReward()]
    with pytest.raises(InputError, match=r"`model.reward` must be given for `GroupReward`.*got null"):
        check_reward(fixed.module(folders, rollout, advantage=asking), None)
    given = fixed.module(folders, rollout, advantage=asking, reward=Given())
    with pytest.raises(InputError, match=r"`data.samples_per_prompt` must be >= 2 for `GroupReward`.*got 1"):
        check_reward(given, SimpleNamespace(samples_per_prompt=1))
    check_reward(given, SimpleNamespace(samples_per_prompt=4))
    check_reward(
        fixed.module(folders, rollout, advantage=[adv.RewardGate()], reward=Given()),
        SimpleNamespace(samples_per_prompt=1),
    )
