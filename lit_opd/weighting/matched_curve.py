"""The control that keeps a strategy's slope and takes its signal away."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lit_opd.distributed import all_sum, largest
from lit_opd.errors import is_integer, require
from lit_opd.masked import lengths, masked_values, positions
from lit_opd.types import TokenSignal
from lit_opd.weighting.base import Scope, WeightingStrategy
from lit_opd.weighting.combinators import _Wrapper

Position = Literal["relative", "absolute"]


class MatchedCurve(_Wrapper):
    """Gives every token the mean inner weight of its position: does the strategy's signal matter, or only its slope?

        bin(t) = floor((i_t - 1/2) / n * bins)          (by = "absolute": i_t)
        w_t    = N / K * mean of v over the batch's valid tokens in bin(t),   v the inner weights, 0 where dropped

    Source: ours; method.md section 6 has the linear decay this generalises. Drops nothing: N / K, valid over kept tokens, makes
    the step as large as the inner strategy's, which divides by K. So the mean weight is that of the inner strategy over its kept
    tokens, and the weights of a bin sum to what the inner ones sum to, times N / K. The curve is measured on the batch it
    weighs. Absolute positions that one row alone reaches keep that row's own weights; relative ones are shared by all rows.
    Scope "batch".

    Fails as a control for strategies whose curve differs much from row to row: the mean of two slopes is neither.

    Args:
        strategy: gives the inner weights.
        by: "relative" or "absolute" position.
        bins: of the relative position, >= 1; 1 is the inner mean weight everywhere.
    Raises:
        ValueError: ``strategy`` is no strategy, or a parameter out of its range.
    """

    def __init__(self, strategy: WeightingStrategy, by: Position = "relative", bins: int = 20) -> None:
        super().__init__(strategy)
        self.by, self.bins = by, bins
        name = type(self).__name__
        require(by in get_args(Position), f"{name}.by", '"relative" or "absolute"', by)
        require(is_integer(bins) and bins >= 1, f"{name}.bins", "an integer >= 1", bins)

    @property
    def scope(self) -> Scope:
        """Averages over all rows."""
        return "batch"

    @property
    def drops_tokens(self) -> bool:
        """Never; see the class."""
        return False

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """Around the usual inner strategies, and by absolute position."""
        found = super().examples()
        inner = [example.strategy for example in found[:2]]
        assert all(isinstance(strategy, WeightingStrategy) for strategy in inner)
        return [*found, *(cls(strategy, by="absolute") for strategy in inner)]  # type: ignore[arg-type]

    def keep(self, signal: TokenSignal, progress: float) -> Tensor | None:
        """None, all of [B, T] are kept: what the inner strategy drops has weight 0 in the mean."""
        return None

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """The mean inner weight of each token's bin, scaled, [B, T]."""
        mask = signal.mask
        inner: Tensor = self.strategy(signal, progress)
        place, count = self._bin(mask)
        values = torch.stack([inner.double(), mask.double(), self.strategy.kept(signal, progress).double()])
        flat = masked_values(values, mask).flatten(1)
        sums = flat.new_zeros(3, count).index_add_(1, place.flatten(), flat)
        total, valid, kept = all_sum(sums).unbind()
        curve = total / valid.clamp(min=1) * valid.sum() / kept.sum().clamp(min=1)
        return curve[place]

    def _bin(self, mask: Tensor) -> tuple[Tensor, int]:
        """int64 [B, T], 0 where masked, and the number of bins, the same on every rank."""
        place = positions(mask)
        if self.by == "absolute":
            return (place - 1).clamp(min=0), max(largest(mask.shape[1], mask.device), 1)
        # whole numbers: ((i - 1/2) / n) * bins must not round across an edge
        length = lengths(mask).unsqueeze(-1)
        return (2 * place - 1).clamp(min=0) * self.bins // (2 * length).clamp(min=1), self.bins
