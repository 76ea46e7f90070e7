"""At the first step of every run the sampler's and the scorer's log-probs are held against each other."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from lit_opd.errors import InputError
from lit_opd.rollout import TransformersSampler
from lit_opd.step.sampler_gap import SamplerGap
from tests.helpers import fixed, tiny

STUDENT = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, -9.0, -9.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])
FULL, HALF = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).to(torch.bfloat16)


def compare(gap: SamplerGap, shift: float, model: torch.nn.Module = FULL) -> None:
    """A sampler whose log-probs are ``shift`` nats above the student's; padding holds garbage."""
    gap.check(STUDENT, torch.where(MASK, STUDENT + shift, 77.0), MASK, step=1, model=model)


@pytest.mark.parametrize(("model", "bound"), [(FULL, 1e-3), (HALF, 0.05)])
def test_a_gap_warns_above_what_rounding_explains_and_ends_the_run_at_ten_times_as_much(model, bound):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shift in (0.9 * bound, -0.9 * bound):
            compare(SamplerGap(None), shift, model)
    with pytest.warns(UserWarning, match="the policy that is scored must be the one that sampled.*likely causes"):
        compare(SamplerGap(None), -2 * bound, model)
    for shift in (11 * bound, math.nan):
        with pytest.raises(InputError, match="No weight was changed") as raised:
            compare(SamplerGap(None), shift, model)
        assert raised.value.on_every_rank


def test_a_renormalised_distribution_may_lie_above_the_students_by_as_much_as_it_left_out():
    """Top-p keeps at least that mass, so its log-probs are at most - log(top_p) above; top-k may leave out anything."""
    compare(SamplerGap(None, top_p=0.8), 0.999 * -math.log(0.8))
    compare(SamplerGap(None, top_k=3), 5.0)
    for gap, shift in (
        (SamplerGap(None, top_p=0.8), 0.3),
        (SamplerGap(None, top_p=0.8), -0.1),
        (SamplerGap(None, top_k=3), -0.1),
    ):
        with pytest.raises(InputError):
            compare(gap, shift)


def test_it_looks_once_or_with_a_bound_always_and_at_no_batch_without_tokens():
    once, always, never = SamplerGap(None), SamplerGap(0.5), SamplerGap(math.inf)
    once.check(STUDENT, STUDENT, torch.zeros_like(MASK), step=1, model=FULL)
    assert once.due and always.due and not never.due
    compare(once, 0.0)
    compare(always, 0.4)
    assert not once.due and always.due
    with pytest.raises(InputError, match="max_logprob_gap"):
        compare(always, 0.6)


class Off(TransformersSampler):
    """Samples rightly and says it drew at another temperature."""

    shift = 0.5

    def sample(self, model: Any, prompts: Any, settings: Any) -> Any:
        """As said."""
        rollout = super().sample(model, prompts, settings)
        return replace(rollout, sampler_logprobs=(rollout.sampler_logprobs - self.shift) * rollout.mask)


def test_every_run_compares_its_first_step_a_resumed_one_too(tmp_path):
    folders, stored = (
        tiny.pair(tmp_path / "models"),
        fixed.rollout(lengths=[3, 6], prompt_lengths=[4, 2], truncated=set()),
    )
    honest = fixed.module(folders, stored, sampler=TransformersSampler(max_new_tokens=6, top_p=0.9))
    fixed.fit(honest, stored.prompts, save=tmp_path / "one.ckpt")
    for load in (None, tmp_path / "one.ckpt"):
        start, module = fixed.StartWeights(), fixed.module(folders, stored, sampler=Off(max_new_tokens=6))
        with pytest.raises(InputError, match="must be the one that sampled, got .* 0.5 nats at optimizer step"):
            fixed.fit(module, stored.prompts, steps=2, load=load, watch=start)
        after = fixed.weights(module)
        assert all(torch.equal(after[name], value) for name, value in start.weights.items())
