"""A length budget: responses are prefixes of the unbudgeted ones, marked as cut, and not the same as masked ones."""

from __future__ import annotations

import math

import pytest
import torch

from lit_opd.errors import InputError
from lit_opd.models.student import StudentSettings
from lit_opd.module import OPDModule
from lit_opd.rollout import LengthBudget, TransformersSampler
from lit_opd.teacher import LocalTeacher
from lit_opd.types import FinishReason
from lit_opd.weighting import Product
from lit_opd.weighting.fractions import FirstTokens
from lit_opd.weighting.importance import ImportanceWeighting
from lit_opd.weighting.uniform import Uniform
from tests.helpers import fixed, tiny

LONGEST = 12
PROMPTS = fixed.rollout(lengths=[1] * 8, prompt_lengths=[4, 2, 6, 1, 5, 3, 2, 4], truncated=set()).prompts
STOP, LENGTH, BUDGET = (int(reason) for reason in list(FinishReason)[:3])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    student, teacher = tiny.qwen3(seed=1), tiny.qwen3(seed=2)
    for model in (student, teacher):
        with torch.no_grad():
            model.lm_head.weight.mul_(0.1)  # flat enough that rows end at different places
    return tiny.save(student, folder / "student"), tiny.save(teacher, folder / "teacher")


def module(folders, **settings) -> OPDModule:
    return OPDModule(
        StudentSettings(folders[0], dtype="float64"),
        LocalTeacher(folders[1], dtype="float64"),
        sampler=TransformersSampler(max_new_tokens=LONGEST),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        gradient_clip_norm=None,
        seed=3,
        **settings,
    )


def one_step(folders, **settings):
    trained = module(folders, **settings)
    start = fixed.StartWeights()
    collect = fixed.fit(trained, PROMPTS, watch=start)
    after = fixed.weights(trained)
    return collect.records[0], {name: start.weights[name] - value for name, value in after.items()}


def test_responses_are_prefixes_and_cut_rows_are_marked(folders):
    whole = one_step(folders)[0]
    cut = one_step(folders, length_budget=LengthBudget(5), truncated="drop")[0]
    lengths = whole.rollout.lengths
    assert (lengths > 5).any() and (lengths <= 5).any()
    assert torch.equal(cut.rollout.lengths, lengths.clamp(max=5))  # no row was dropped
    columns = cut.rollout.mask.shape[1]
    assert torch.equal(
        cut.rollout.response_ids[cut.rollout.mask], whole.rollout.response_ids[:, :columns][cut.rollout.mask]
    )
    stopped = whole.rollout.finished & (lengths <= 5)
    assert cut.finish_reason.tolist() == [STOP if ended else BUDGET for ended in stopped.tolist()]
    assert cut.sampled_tokens == lengths.clamp(max=5).sum()


def test_a_budget_of_the_whole_length_is_no_budget(folders):
    record = one_step(folders, length_budget=LengthBudget(LONGEST))[0]
    assert set(record.finish_reason.tolist()) <= {STOP, LENGTH}
    assert LENGTH in record.finish_reason.tolist()


def test_not_generated_equals_masked_for_uniform_weights_only(folders):
    """A mask leaves what strategies read of the rest of the row; a budget does not."""

    def gap(strategy) -> float:
        cut = one_step(folders, weighting=strategy, length_budget=LengthBudget(5))[1]
        masked = one_step(folders, weighting=Product([FirstTokens(5), strategy]))[1]
        return fixed.relative_gap(cut, masked)

    assert gap(Uniform()) < 1e-6
    assert gap(ImportanceWeighting()) > 1e-3


def test_schedules_run_from_start_to_end():
    assert [LengthBudget(10, 50).tokens(p) for p in (0.0, 0.25, 1.0)] == [10, 20, 50]
    cosine = LengthBudget(10, 50, "cosine")
    assert [cosine.tokens(p) for p in (0.0, 0.5, 1.0)] == [10, 30, 50]
    assert cosine.tokens(0.25) == round(10 + 40 * (1 - math.cos(math.pi / 4)) / 2)
    assert [LengthBudget(7).tokens(p) for p in (0.0, 1.0)] == [7, 7]


def test_the_schedule_follows_the_progress_of_the_run(folders):
    trained = module(folders, length_budget=LengthBudget(2, 8))
    records = fixed.fit(trained, PROMPTS, steps=4).records
    assert [int(record.rollout.lengths.max()) for record in records] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "start.*>= 1.*0"), ((3, 0), "end.*>= 1.*0"), ((3, 4, "step"), "schedule.*'step'")],
    ids=["start", "end", "schedule"],
)
def test_values_outside_their_range(arguments, message):
    with pytest.raises(InputError, match=message):
        LengthBudget(*arguments)


def test_a_budget_above_the_samplers_limit_is_refused(folders):
    with pytest.raises(InputError, match=r"length_budget.*max_new_tokens.* = 12, got 3 to 13"):
        module(folders, length_budget=LengthBudget(3, 13))
