"""What the strategies share that choose tokens and drop the others from the denominator."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lit_opd.batchwise import highest, token_order, total_count
from lit_opd.masked import ceil_count
from lit_opd.types import TokenSignal
from lit_opd.weighting.base import Scope, WeightingStrategy


class _Selection(WeightingStrategy):
    """Weight 1 on the selected tokens; the others leave the numerator and the denominator. Write ``keep``."""

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """Ones, [B, T]; ``keep`` does the choosing."""
        return torch.ones_like(signal.student_logprobs)

    @abstractmethod
    def keep(self, signal: TokenSignal, progress: float) -> Tensor:
        """bool [B, T], the selected tokens."""


class _BatchSelection(_Selection):
    """Selects among the tokens of all rows and ranks by a score."""

    @property
    def scope(self) -> Scope:
        """Ranks tokens of all rows."""
        return "batch"

    @staticmethod
    def best(score: Tensor, signal: TokenSignal, fraction: float) -> Tensor:
        """bool [B, T], the ceil(fraction * N) highest of the batch's N valid tokens; ties by position, then row key.

        Args:
            score: [N], of this rank's valid tokens.
            signal: whose tokens they are.
            fraction: in (0, 1].
        """
        assert signal.row_keys is not None  # the record fills it
        count = int(ceil_count(fraction, torch.tensor(total_count(score))))
        chosen = highest(score, token_order(signal.mask, signal.row_keys), count)
        return torch.zeros_like(signal.mask).masked_scatter(signal.mask, chosen)


def best_of_rows(score: Tensor, mask: Tensor, counts: Tensor) -> Tensor:
    """bool [B, T], the ``counts`` int64 [B] tokens of each row with the highest ``score`` [B, T]; ties by earlier position."""
    ranked = torch.where(mask, score, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    # a valid token may score -inf itself: masked columns come last, whatever their place
    last = ranked.gather(-1, (~mask).gather(-1, ranked).long().argsort(dim=-1, stable=True))
    return mask & (last.argsort(dim=-1) < counts.unsqueeze(-1))
