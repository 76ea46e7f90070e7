"""PW-OPSD: the opposite slope to IW-OPD."""

from __future__ import annotations

from torch import Tensor

from lit_opd.errors import is_finite, require
from lit_opd.masked import lengths, positions
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_unit
from lit_opd.weighting.base import WeightingStrategy

MIDDLE = 0.5  # a token's relative position is taken at its middle


class LateRising(WeightingStrategy):
    """Rises from a floor to 1 along the response.

        f_t = (i_t - 0.5) / n
        w_t = w_min + (1 - w_min) * sigmoid((f_t - tau) / scale)

    Source: PW-OPSD, reported in arXiv 2605.21606. Range [w_min, 1]; does not keep the mean weight. The opposite slope
    to ``ImportanceWeighting``. Reads n, hence "sequence".

    Fails where the teacher's signal gets worse along the response, which is what IW-OPD assumes.

    Args:
        w_min: the floor, in [0, 1]; 1 is ``Uniform``.
        tau: relative position of the middle of the rise.
        scale: width of the rise in relative position, > 0.
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(self, w_min: float = 0.25, tau: float = 0.30, scale: float = 0.10) -> None:
        super().__init__()
        self.w_min, self.tau, self.scale = w_min, tau, scale
        name = type(self).__name__
        require(is_unit(w_min), f"{name}.w_min", "in [0, 1]", w_min)
        require(is_finite(tau), f"{name}.tau", "a finite number", tau)
        require(is_finite(scale) and scale > 0, f"{name}.scale", "a finite number > 0", scale)

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The published setting, a gentle rise from 0, and none."""
        return [cls(), cls(w_min=0.0, tau=0.5, scale=0.3), cls(w_min=1.0)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """w_min + (1 - w_min) * sigmoid((f - tau) / scale), [B, T]."""
        total = lengths(signal.mask).clamp(min=1).unsqueeze(-1)
        relative = (positions(signal.mask).double() - MIDDLE) / total
        return self.w_min + (1.0 - self.w_min) * ((relative - self.tau) / self.scale).sigmoid()
