"""FiRe: learn where the teacher is sure and the student is not."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.errors import require
from lit_opd.masked import masked_mean
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_nonnegative
from lit_opd.weighting.base import WeightingStrategy


class FiRe(WeightingStrategy):
    """Favours tokens with a confident teacher and an uncertain student.

        c_T = 1 - H^T_t / max_row H^T      (1 where the maximum is 0)
        c_S = H^S_t / max_row H^S          (0 where the maximum is 0)
        v_t = (1 + alpha * c_T) * (1 + beta * c_S)
        w_t = v_t / mean_row v

    Source: reported in arXiv 2606.02684. Range (0, (1 + alpha)(1 + beta)]; keeps the mean weight of each row at 1. The
    maxima read the whole row, hence "sequence". Departure: copies of the published code take maxima and mean over all tokens of
    the batch. ``FiReRows`` is the method's first half.

    Fails where a sure teacher is wrong, as after an error that it has never seen: such tokens count most.

    Args:
        alpha: pull of the teacher's confidence, >= 0.
        beta: pull of the student's uncertainty, >= 0; both 0 is ``Uniform``.
    Raises:
        ValueError: a negative or non-finite parameter.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 1.0) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta
        name = type(self).__name__
        require(is_nonnegative(alpha), f"{name}.alpha", "a finite number >= 0", alpha)
        require(is_nonnegative(beta), f"{name}.beta", "a finite number >= 0", beta)

    @property
    def requires(self) -> frozenset[str]:
        """Both entropies."""
        return frozenset({"student_entropy", "teacher_entropy"})

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The published setting, each factor alone, and neither."""
        return [cls(), cls(alpha=2.0, beta=0.0), cls(alpha=0.0, beta=0.5), cls(alpha=0.0, beta=0.0)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """v / mean_row v, [B, T]."""
        assert signal.teacher_entropy is not None and signal.student_entropy is not None  # required above
        sure = 1.0 - _relative(signal.teacher_entropy)
        unsure = _relative(signal.student_entropy)
        value = (1.0 + self.alpha * sure) * (1.0 + self.beta * unsure)
        mean = masked_mean(value, signal.mask).unsqueeze(-1)
        return value / torch.where(mean > 0, mean, 1.0)


def _relative(entropy: Tensor) -> Tensor:
    """Entropy over the row's largest, 0 where that is 0: [B, T], 0 where masked (as the record stores it)."""
    if not entropy.shape[1]:
        return entropy
    entropy = entropy.clamp(min=0.0)  # rounding can put a sure token just below 0
    largest = entropy.amax(-1, keepdim=True)
    return entropy / torch.where(largest > 0, largest, 1.0)
