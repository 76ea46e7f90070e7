"""Weightings that the search of docs/search.md tries and that the library does not have: they ship only if they win."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_opd.masked import masked_values, shifted_right
from lit_opd.types import TokenSignal
from lit_opd.weighting.base import DependsOn, WeightingStrategy
from lit_opd.weighting.combinators import Product


def moving_sum(values: Tensor, window: int) -> Tensor:
    """Sum over the last ``window`` columns, the present one included, [B, T]."""
    sums = values.double().cumsum(-1)
    return sums - nn.functional.pad(sums, (window, 0))[:, : sums.shape[1]]


class WindowedRatio(WeightingStrategy):
    """The prefix ratio of the last ``window`` tokens alone: what the teacher forgave long ago does not count.

        w_t = exp(clip(sum_{t-window <= k < t} A_k, low, 0))

    Args:
        window: tokens looked back at, >= 1.
        low: smallest exponent, <= 0.
    """

    def __init__(self, window: int = 8, low: float = -3.0) -> None:
        super().__init__()
        self.window, self.low = window, low

    @property
    def depends_on(self) -> DependsOn:
        """Reads A_k of earlier tokens only."""
        return "prefix"

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """exp(clip(windowed sum of A, low, 0)), [B, T]."""
        ratio = masked_values(signal.log_ratio, signal.mask)
        return shifted_right(moving_sum(ratio, self.window)).clamp(self.low, 0.0).exp()


class TeacherEntropy(WeightingStrategy):
    """What reads the teacher's entropy up to t, which the tokens before t decide."""

    @property
    def requires(self) -> frozenset[str]:
        """The teacher's entropy."""
        return frozenset({"teacher_entropy"})

    @property
    def depends_on(self) -> DependsOn:
        """Reads q_k of earlier tokens, and H_k up to the token's own."""
        return "prefix"


class SurpriseDrift(TeacherEntropy):
    """Drift measured by the teacher's surprise beyond what it expects itself, not by the ratio.

        w_t = exp(clip(alpha * sum_{k<t} (q_k + H^T_k), low, 0))

    For a prefix that the teacher writes itself the sum is a martingale of mean 0.

    Args:
        alpha: strength, > 0.
        low: smallest exponent, <= 0.
    """

    def __init__(self, alpha: float = 1.0, low: float = -3.0) -> None:
        super().__init__()
        self.alpha, self.low = alpha, low

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """exp(clip(alpha * sum of (q + H) before t, low, 0)), [B, T]."""
        assert signal.teacher_entropy is not None  # required above
        excess = masked_values(signal.teacher_logprobs + signal.teacher_entropy, signal.mask).double()
        return (self.alpha * shifted_right(excess.cumsum(-1))).clamp(self.low, 0.0).exp()


class TeacherCertainty(TeacherEntropy):
    """How sure the teacher has been lately, which comes back where it finds its feet again.

        w_t = max(exp(-alpha * mean of H^T over the last ``window`` tokens, t included), floor)

    Args:
        window: tokens, >= 1.
        alpha: strength, > 0.
        floor: smallest weight, in [0, 1].
    """

    def __init__(self, window: int = 4, alpha: float = 1.0, floor: float = 0.0) -> None:
        super().__init__()
        self.window, self.alpha, self.floor = window, alpha, floor

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """max(exp(-alpha * windowed mean of H), floor), [B, T]."""
        assert signal.teacher_entropy is not None  # required above
        entropy = masked_values(signal.teacher_entropy, signal.mask)
        counts = moving_sum(signal.mask.double(), self.window).clamp(min=1.0)
        return (-self.alpha * moving_sum(entropy, self.window) / counts).exp().clamp(min=self.floor)


class Largest(Product):
    """The largest of several strategies' weights in place of their product: a floor that is itself a strategy.

    Args:
        strategies: at least one, none that drops tokens.
    """

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """Elementwise maximum, [B, T]."""
        return torch.stack([child.weights(signal, progress).double() for child in self.children_in_order]).amax(0)
