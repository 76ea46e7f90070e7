"""The records: what they refuse, and what they promise."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from lit_opd.errors import InputError
from lit_opd.types import PromptBatch, Provenance, Rollout, TokenSignal
from tests.helpers import fixed


def signal(**changes) -> TokenSignal:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    values = {"student_logprobs": torch.full((2, 3), -1.0), "teacher_logprobs": torch.full((2, 3), -3.0), "mask": mask}
    return TokenSignal(**(values | changes))


def test_the_log_ratio_is_teacher_minus_student_and_zero_off_the_mask():
    """One token by hand: the student gives -1, the teacher -3, so the teacher likes it less: -2."""
    assert signal().log_ratio.tolist() == [[-2.0, -2.0, 0.0], [-2.0, 0.0, 0.0]]


def test_swapping_teacher_and_student_flips_the_sign():
    swapped = signal(student_logprobs=torch.full((2, 3), -3.0), teacher_logprobs=torch.full((2, 3), -1.0))
    assert torch.equal(swapped.log_ratio, -signal().log_ratio)


def test_padding_may_hold_anything():
    dirty = torch.tensor([[-3.0, -3.0, float("nan")], [-3.0, float("inf"), 7.0]])
    assert torch.equal(signal(teacher_logprobs=dirty).log_ratio, signal().log_ratio)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_value_on_a_valid_token_names_its_row(value):
    bad = torch.full((2, 3), -3.0)
    bad[1, 0] = value
    with pytest.raises(InputError, match=r"teacher_logprobs.*row 1 \(row key 77\), column 0"):
        signal(teacher_logprobs=bad, row_keys=torch.tensor([5, 77]))


@pytest.mark.parametrize(("given", "kept"), [("bfloat16", "float32"), ("float16", "float32"), ("float64", "float64")])
def test_floats_rise_to_float32_and_float64_stays(given, kept):
    given, kept = getattr(torch, given), getattr(torch, kept)
    raised = signal(student_logprobs=torch.zeros(2, 3, dtype=given), teacher_logprobs=torch.zeros(2, 3, dtype=given))
    assert raised.log_ratio.dtype == kept


def test_signals_are_detached():
    ours = torch.full((2, 3), -1.0, requires_grad=True)
    assert not signal(student_logprobs=ours).log_ratio.requires_grad


def test_shapes_that_do_not_align_name_the_field():
    with pytest.raises(InputError, match=r"TokenSignal.teacher_logprobs.*\(2, 3\).*\(2, 4\)"):
        signal(teacher_logprobs=torch.zeros(2, 4))
    with pytest.raises(InputError, match="PromptBatch.mask"):
        PromptBatch(
            torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1).long(), ("a",)
        )


def test_records_are_frozen():
    with pytest.raises(FrozenInstanceError):
        signal().step = 3
    rollout = fixed.rollout(lengths=[2, 3], prompt_lengths=[1, 2], truncated=set())
    with pytest.raises(FrozenInstanceError):
        rollout.prompts.ids = rollout.prompts.ids + 1


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_prompt_batches_pass_lightnings_precision_plugins(precision):
    """The plugins rebuild a batch field by field; a prompt batch has nothing they would convert."""
    from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision

    plugin = DoublePrecision() if precision == "64-true" else HalfPrecision("bf16-true")
    prompts = fixed.rollout(lengths=[2, 3], prompt_lengths=[1, 2], truncated=set()).prompts
    assert torch.equal(plugin.convert_input(prompts).ids, prompts.ids)


def test_rows_and_trimming_keep_the_valid_tokens():
    rollout = fixed.rollout(lengths=[2, 9, 3], prompt_lengths=[1, 6, 2], truncated={0})
    part = rollout.rows(torch.tensor([2, 0])).trimmed()
    assert part.response_ids.shape == (2, 3) and part.prompts.ids.shape == (2, 2)
    assert part.prompts.row_ids == ("row-2", "row-0")
    for place, row in enumerate((2, 0)):
        assert (
            part.response_ids[place][part.mask[place]].tolist() == rollout.response_ids[row][rollout.mask[row]].tolist()
        )
        kept = part.prompts.ids[place][part.prompts.mask[place]].tolist()
        assert kept == rollout.prompts.ids[row][rollout.prompts.mask[row]].tolist()
    assert part.finish_reason.tolist() == [0, 1]


def of(lengths: list[int], *, prompts: list[int], first: int = 0, **provenance) -> Rollout:
    found = fixed.rollout(lengths=lengths, prompt_lengths=prompts, truncated=set())
    keys = torch.arange(first, first + len(lengths))
    renamed = replace(found.prompts, row_keys=keys, row_ids=tuple(f"row-{int(key)}" for key in keys))
    return replace(found, prompts=renamed, provenance=Provenance("fixed", **provenance))


def test_rollouts_of_one_provenance_join_row_by_row():
    """Every row says the same alone and joined, whatever padding the others bring."""
    parts = [of([3, 1], prompts=[2, 5]), of([6], prompts=[1], first=2)]
    joined = Rollout.joined(parts)
    assert joined.prompts.row_ids == ("row-0", "row-1", "row-2") and joined.mask.shape == (3, 6)
    singles = [part.rows(torch.tensor([row])).trimmed() for part in parts for row in range(len(part))]
    for row, single in enumerate(singles):
        again = joined.rows(torch.tensor([row])).trimmed()
        for name in ("response_ids", "mask", "sampler_logprobs", "finish_reason"):
            assert torch.equal(getattr(again, name), getattr(single, name)), name
        assert torch.equal(again.prompts.ids, single.prompts.ids) and torch.equal(
            again.prompts.mask, single.prompts.mask
        )


@pytest.mark.parametrize("other", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"weights_version": 1}])
def test_unlike_provenances_do_not_mix(other):
    with pytest.raises(InputError, match="must get rollouts of one provenance, got"):
        Rollout.joined([of([2], prompts=[2]), of([2], prompts=[2], **other)])
    with pytest.raises(InputError, match="at least one rollout"):
        Rollout.joined([])
