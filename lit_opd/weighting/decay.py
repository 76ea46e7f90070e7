"""Weights that fall with the position and read nothing else."""

from __future__ import annotations

from torch import Tensor

from lit_opd.errors import require
from lit_opd.masked import lengths, positions
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_nonnegative, is_unit
from lit_opd.weighting.base import DependsOn, WeightingStrategy


class LinearDecay(WeightingStrategy):
    """Falls linearly from the first token to the last.

        w_t = 1 + gamma * (1 - (i_t - 1) / n)

    Source: method.md section 2, the shape IW-OPD takes when the disagreement is flat, and so its null hypothesis (also
    an ablation of arXiv 2606.22600). Range [1 + gamma/n, 1 + gamma]; mean weight 1 + gamma (n + 1)/(2n), not kept.
    Reads n, hence "sequence".

    Args:
        gamma: extra weight of the first token, >= 0; 0 is ``Uniform``.
    Raises:
        ValueError: a negative or non-finite gamma.
    """

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        require(is_nonnegative(gamma), f"{type(self).__name__}.gamma", "a finite number >= 0", gamma)

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The counterpart of w_max = 1.5, a steep one, and none."""
        return [cls(0.5), cls(2.0), cls(0.0)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """1 + gamma * (1 - (i - 1) / n), [B, T]."""
        place = positions(signal.mask).double()
        total = lengths(signal.mask).clamp(min=1).unsqueeze(-1)
        return 1.0 + self.gamma * (1.0 - (place - 1.0) / total)


class Geometric(WeightingStrategy):
    """Falls by a constant factor a token.

        w_t = gamma^(i_t - 1)

    Source: method.md section 2. Range [0, 1]; the first token has 1; does not keep the mean weight. A long response all
    but vanishes from ``sequence-mean``: combine with ``SequenceMeanOne`` to compare shapes.

    Args:
        gamma: factor in [0, 1]; 1 is ``Uniform``, 0 leaves weight on the first token only.
    Raises:
        ValueError: gamma outside [0, 1] (a growing weight overflows on long responses).
    """

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        require(is_unit(gamma), f"{type(self).__name__}.gamma", "in [0, 1]", gamma)

    @property
    def depends_on(self) -> DependsOn:
        """Reads the position only."""
        return "prefix"

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """Slow, fast, none, and the first token alone."""
        return [cls(0.99), cls(0.5), cls(1.0), cls(0.0)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """gamma^(i - 1), [B, T]."""
        place = positions(signal.mask).double()
        return self.gamma ** (place - 1.0).clamp(min=0.0)
