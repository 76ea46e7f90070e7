"""Is the policy that is scored the one that sampled? The log-probs that both give to the sampled tokens say so."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from lit_opd.distributed import all_sum, is_rank_zero
from lit_opd.errors import InputError
from lit_opd.models.agreement import computes_in_half, gap_bound, verdict

_INSIDE = (
    "likely causes: the model's own code draws at random in evaluation mode, ignores the padding mask or the cache (try "
    "`model.student.attn_implementation` eager), or lets a row depend on the others (positions, experts with a capacity); or a "
    "sampler of your own reports other log-probs"
)
_OUTSIDE = "likely causes: the engine samples from other weights, in another dtype or at another temperature"


class SamplerGap:
    """Compares at the first optimizer step that a run makes, a resumed one too, and at every step where a bound is set.

    Args:
        bound: nats, on the step's mean |student - sampler log-prob|, an error above it; infinity compares nothing. None takes
            the bound of the precision at the first step: a warning above it, an error above ten times as much.
        top_p: of sampling. Its log-probs are those of a renormalised distribution, up to - log(top_p) above the student's.
        top_k: of sampling; with one they may lie above the student's by anything.
        in_process: the sampler reads the student itself.
    """

    def __init__(self, bound: float | None, *, top_p: float = 1.0, top_k: int = 0, in_process: bool = True) -> None:
        self.bound, self.in_process = bound, in_process
        self.most = math.inf if top_k else -math.log(top_p)  # nats by which the sampler's may be larger
        self.compared = False

    @property
    def due(self) -> bool:
        """Whether the coming step is compared; the same on every rank."""
        return not self.compared if self.bound is None else self.bound < math.inf

    def check(self, student: Tensor, sampler: Tensor, mask: Tensor, *, step: int, model: nn.Module) -> None:
        """Compare one step; called on every rank, before its weights change.

        Args:
            student: [B, T] log-probs, nats.
            sampler: [B, T] log-probs, nats.
            mask: bool [B, T], True on sampled tokens.
            step: the optimizer step that is made, from 1.
            model: the student, for its precision.
        Raises:
            InputError: the mean |student - sampler| over the tokens of all ranks is above the bound, or without one above ten
                times what the precision explains.
        """
        above = sampler - student
        outside = (above - self.most).clamp(min=0) + (-above).clamp(min=0)
        gap = torch.where(mask, outside, 0.0).sum(dtype=torch.float64)
        total, tokens = all_sum(torch.stack([gap, mask.sum().double()])).tolist()
        if not tokens:
            return
        self.compared = True
        self._judge(total / tokens, step, half=not self.in_process or computes_in_half(model))

    def _judge(self, mean: float, step: int, *, half: bool) -> None:
        if self.bound is not None:
            if not mean <= self.bound:
                raise self._error(
                    f"`model.sampler.max_logprob_gap` must bound the mean |student - sampler log-prob|, got {mean:.3g} nats "
                    f"over {self.bound} at optimizer step {step}; no weight was changed. The servers sample from other "
                    "weights, dtype or temperature: check them and `model.sampler.sync`"
                )
            return
        bound = gap_bound(half=half)
        found = verdict(mean, bound)
        if found == "agree":
            return
        said = (
            f"the policy that is scored must be the one that sampled, got log-probs of the sampled tokens that differ by a mean "
            f"of {mean:.3g} nats at optimizer step {step}, where {'half' if half else 'full'} precision explains {bound:g}; "
            f"{_INSIDE if self.in_process else _OUTSIDE}"
        )
        if found == "contradict":
            raise self._error(f"`model.sampler`: {said}. No weight was changed")
        if is_rank_zero():
            warnings.warn(said, stacklevel=2)

    @staticmethod
    def _error(message: str) -> InputError:
        error = InputError(message)
        error.on_every_rank = True
        return error
