"""TIP: keep the tokens of the batch that are uncertain or contested."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.distributed import all_max, all_min, all_sum, gather_rows
from lit_opd.errors import require
from lit_opd.masked import ceil_count, positions
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_fraction
from lit_opd.weighting.base import Scope, WeightingStrategy
from lit_opd.weighting.selection import _Selection


class TIP(_Selection):
    """Keeps the highest-scoring part of the batch's tokens and drops the rest from the denominator.

        h, e    = H^S and the divergence (token KL where computed, else d), each min-max-normalised over the batch
                  (0 where it is constant)
        score_t = h_t + e_t - h_t * e_t
        keep    = the ceil(keep_fraction * N) highest of the batch's N valid tokens
                  (ties: earlier position, then smaller row key)

    Source: reported in arXiv 2604.14084. Weight 1 where kept; keeps the mean weight over the kept tokens. The batch is
    that of all ranks, hence scope "batch". Whether token KL is there depends on what else asks for it. Row keys must
    differ: tokens that tie in score, position and row key share their fate.

    Args:
        keep_fraction: in (0, 1]; 1 is ``Uniform``.
    Raises:
        ValueError: keep_fraction outside (0, 1].
    """

    def __init__(self, keep_fraction: float = 0.5) -> None:
        super().__init__()
        self.keep_fraction = keep_fraction
        require(is_fraction(keep_fraction), f"{type(self).__name__}.keep_fraction", "in (0, 1]", keep_fraction)

    @property
    def requires(self) -> frozenset[str]:
        """The student's entropy."""
        return frozenset({"student_entropy"})

    @property
    def scope(self) -> Scope:
        """Ranks tokens of all rows."""
        return "batch"

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The published half, a small part, and everything."""
        return [cls(), cls(0.1), cls(1.0)]

    def keep(self, signal: TokenSignal, progress: float) -> Tensor:
        """bool [B, T], the chosen tokens of this rank's rows."""
        assert signal.row_keys is not None and signal.student_entropy is not None  # the record; required above
        mask = signal.mask
        divergence = signal.disagreement if signal.token_kl is None else signal.token_kl
        unsure = _normalised(signal.student_entropy[mask])
        contested = _normalised(divergence[mask])
        score = unsure + contested - unsure * contested
        keys = signal.row_keys.unsqueeze(-1).expand(mask.shape)[mask]
        return torch.zeros_like(mask).masked_scatter(mask, self._chosen(score, positions(mask)[mask], keys))

    def _chosen(self, score: Tensor, place: Tensor, keys: Tensor) -> Tensor:
        """bool [N], the best of all ranks' tokens: those above the last place's score, then by the order of ties."""
        total = all_sum(torch.tensor([len(score)], device=score.device))
        if not int(total):
            return torch.zeros_like(score, dtype=torch.bool)
        count = int(ceil_count(self.keep_fraction, total))
        last = gather_rows(score).topk(count).values[-1]
        above, tied = score > last, score == last
        seats = count - all_sum(above.sum())
        order = torch.stack([place[tied], keys[tied]], -1)
        above[tied] = _earlier(order, gather_rows(order)) < seats
        return above


def _normalised(values: Tensor) -> Tensor:
    """Min-max-normalised over all ranks, 0 where constant: [N] -> [N]."""
    beyond = values.new_full((1,), float("inf"))
    low = all_min(torch.cat([values, beyond]).min())
    high = all_max(torch.cat([values, -beyond]).max())
    return (values - low) / torch.where(high > low, high - low, torch.ones_like(high))


def _earlier(order: Tensor, everyone: Tensor) -> Tensor:
    """How many of ``everyone`` [M, 2] come before each of ``order`` [N, 2], by first then second column: int64 [N]."""
    distinct, group = torch.unique(torch.cat([everyone, order]), dim=0, return_inverse=True)
    sizes = torch.bincount(group[: len(everyone)], minlength=len(distinct))
    return (sizes.cumsum(0) - sizes)[group[len(everyone) :]]
