"""IW-OPD, the strategy this project is about."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from lit_opd.errors import is_finite, require
from lit_opd.masked import exclusive_cumsum, masked_sum, masked_values, positions
from lit_opd.types import TokenSignal
from lit_opd.weighting.base import WeightingStrategy

EPSILON = 1e-8  # keeps 0/0 at 0 for a row without disagreement

Denominator = Literal["all", "exclude_last"]


class ImportanceWeighting(WeightingStrategy):
    """Weights a token by how much of the sequence's accumulated disagreement still lies ahead of it.

        F_{t-1} = sum_{k<t} d_k / (sum_{k<=n} d_k + 1e-8),   d_k = |q_k - s_k|
        w_t     = 1 + (w_max - 1) * clamp(1 - F_{t-1}, 0, 1)

    Source: IW-OPD (arXiv 2606.22600), published code. Range [1, w_max]; the first valid token gets w_max. Does not
    keep the mean weight: evenly spread disagreement has mean 1 + (w_max - 1)(n + 1)/(2n), so raw IW also takes larger
    steps. Departure: padding gets 0 here, where the published code leaves 1. The denominator reads the whole row, hence
    "sequence".

    Fails where disagreement is no drift: divided by the row's own total, the weight falls to 1 in a healthy row as in a derailed
    one.

    Args:
        w_max: weight of the first token, >= 1; 1 is ``Uniform``.
        signed: accumulate A_k = q_k - s_k in place of d_k (the paper's ablation).
        denominator: "all" sums k <= n as the published code does, "exclude_last" k < n as the paper prints.
    Raises:
        ValueError: w_max < 1 or an unknown denominator.
    """

    def __init__(self, w_max: float = 1.5, signed: bool = False, denominator: Denominator = "all") -> None:
        super().__init__()
        self.w_max, self.signed, self.denominator = w_max, signed, denominator
        name = type(self).__name__
        require(is_finite(w_max) and w_max >= 1, f"{name}.w_max", "a finite number >= 1", w_max)
        require(denominator in get_args(Denominator), f"{name}.denominator", '"all" or "exclude_last"', denominator)

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The published setting and each option."""
        return [cls(), cls(w_max=3.0), cls(signed=True), cls(denominator="exclude_last"), cls(w_max=1.0)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """1 + (w_max - 1) * (1 - F_{t-1}), [B, T]."""
        mask = signal.mask
        drift = masked_values(signal.log_ratio if self.signed else signal.disagreement, mask)
        counted = mask
        if self.denominator == "exclude_last":
            place = positions(mask)
            counted = mask & (place < place.amax(-1, keepdim=True)) if mask.shape[1] else mask
        total = masked_sum(drift, counted).unsqueeze(-1) + EPSILON
        behind = exclusive_cumsum(drift, mask) / total
        return 1.0 + (self.w_max - 1.0) * (1.0 - behind).clamp(0.0, 1.0)
