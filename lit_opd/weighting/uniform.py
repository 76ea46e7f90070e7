"""Plain on-policy distillation, and its rescaled control."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.errors import require
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_nonnegative
from lit_opd.weighting.base import DependsOn, WeightingStrategy


class Uniform(WeightingStrategy):
    """Every sampled token counts the same: w_t = 1.

    Source: plain on-policy distillation (method.md section 0). Range {1}; keeps the mean weight.
    """

    @property
    def depends_on(self) -> DependsOn:
        """Reads nothing."""
        return "prefix"

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """Ones, [B, T]."""
        return torch.ones_like(signal.student_logprobs)


class Constant(WeightingStrategy):
    """Every sampled token counts ``value``: w_t = value.

    Source: the scale control of method.md section 6 (uniform times another strategy's measured mean weight), which
    tells a larger step from a better place to learn. Range {value}; the mean weight is ``value``.

    Args:
        value: the weight, >= 0; 1 is ``Uniform``.
    Raises:
        ValueError: a negative or non-finite value.
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        require(is_nonnegative(value), f"{type(self).__name__}.value", "a finite number >= 0", value)

    @property
    def depends_on(self) -> DependsOn:
        """Reads nothing."""
        return "prefix"

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The mean weight of IW-OPD under evenly spread disagreement, and the ends of the range."""
        return [cls(1.25), cls(1.0), cls(0.0)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """``value`` everywhere, [B, T]."""
        return torch.full_like(signal.student_logprobs, self.value)
