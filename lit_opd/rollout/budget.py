"""How many tokens a response may have at this point of the training."""

from __future__ import annotations

import math
from typing import Literal

from lit_opd.errors import InputError


class LengthBudget:
    """Stops training responses after so many tokens, which then are never generated, never scored and never paid for.

    A row cut here is marked ``FinishReason.BUDGET`` and trained on, whatever ``truncated`` says of rows that reach
    ``max_new_tokens``. It differs from a mask (``FirstTokens``), whose tokens are generated and left out of the loss.

        n(p) = start + (end - start) * f(p),   f linear: p, cosine: (1 - cos(pi p)) / 2,   p the training progress in [0, 1]

    Early stopping of rollouts as a budget: reported in arXiv 2605.27028.

    Args:
        start: tokens at the beginning, >= 1.
        end: tokens at the end, >= 1; None keeps ``start`` for the whole run.
        schedule: "linear" or "cosine".
    Raises:
        InputError: a value outside its range.
    """

    def __init__(self, start: int, end: int | None = None, schedule: Literal["linear", "cosine"] = "linear") -> None:
        for name, value in (("start", start), ("end", start if end is None else end)):
            if value < 1:
                raise InputError(f"`LengthBudget.{name}` must be >= 1 token, got {value}")
        if schedule not in ("linear", "cosine"):
            raise InputError(f"`LengthBudget.schedule` must be linear or cosine, got {schedule!r}")
        self.start, self.end, self.schedule = start, start if end is None else end, schedule

    def tokens(self, progress: float) -> int:
        """The budget at ``progress`` in [0, 1]."""
        share = progress if self.schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * progress))
        return round(self.start + (self.end - self.start) * share)

    def check(self, max_new_tokens: int) -> None:
        """An InputError for a budget that ``max_new_tokens`` would cut."""
        if max(self.start, self.end) > max_new_tokens:
            raise InputError(
                f"`model.length_budget` must be at most `model.sampler.max_new_tokens` = {max_new_tokens}, got {self.start} to "
                f"{self.end}; raise max_new_tokens or lower the budget"
            )
