"""DASH: weight gathers while teacher and student agree and is shed where they do not."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.errors import require
from lit_opd.masked import affine_scan, masked_mean, shifted_right
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_nonnegative
from lit_opd.weighting.base import WeightingStrategy


class DASH(WeightingStrategy):
    """Weights a token by a running sum that forgets wherever the disagreement is above the row's mean.

        lambda_t = sigmoid(-kappa * (d_t - mean d)),   d_t = |q_t - s_t|
        W_1      = 1,   W_t = 1 + lambda_{t-1} * W_{t-1}

    Source: reported in arXiv 2608.06243, sampled form (the identity with the paper's recursion holds for a
    differentiable sum of W times KL). Range [1, i_t]; does not keep the mean weight: combine with ``SequenceMeanOne``
    to compare shapes. The mean reads the whole row, hence "sequence".

    Fails in long stretches of agreement, where the sum grows with the position whatever the teacher says.

    Args:
        kappa: sharpness, >= 0; 0 makes every lambda 1/2.
    Raises:
        ValueError: a negative or non-finite kappa.
    """

    def __init__(self, kappa: float = 5.0) -> None:
        super().__init__()
        self.kappa = kappa
        require(is_nonnegative(kappa), f"{type(self).__name__}.kappa", "a finite number >= 0", kappa)

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The published setting, a blunt one and a sharp one."""
        return [cls(), cls(kappa=0.0), cls(kappa=50.0)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """1 + lambda_{t-1} W_{t-1}, [B, T]; in float64, the rounding of a lambda near 1 adds up along the row.

        The scan carries c_t = lambda_t W_t = lambda_t c_{t-1} + lambda_t, so that W_t = 1 + c_{t-1}; a masked column
        hands the carry on.
        """
        mask = signal.mask
        gap = (signal.teacher_logprobs.double() - signal.student_logprobs.double()).abs()
        share = (-self.kappa * (gap - masked_mean(gap, mask).unsqueeze(-1))).sigmoid()
        carry = affine_scan(torch.where(mask, share, 1.0), torch.where(mask, share, 0.0))
        return 1.0 + shifted_right(carry)
