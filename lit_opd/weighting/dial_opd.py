"""DIAL-OPD: a disagreement counts by the probability that is at stake."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.errors import require
from lit_opd.masked import lengths
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_fraction, is_nonnegative
from lit_opd.weighting.base import WeightingStrategy
from lit_opd.weighting.selection import _Selection, best_of_rows


class DIALOPD(_Selection):
    """Keeps in each row the tokens with the largest disagreement, weighed by the mean probability of the two models.

        L_t     = (q - p) / (log q - log p), p and q the models' probabilities of the sampled token; p where they are equal
        score_t = L_t^beta * abs(A_t)
        keep    = the max(1, round(keep_fraction * n)) highest of the row (ties: earlier position)

    Source: arXiv 2610.11659, read in a public transcript of the paper (sections 4 and 6.1), which reports beta = 1 and 1.2 at
    40 % and calls moderate values best. beta = 0 is the size of the log ratio, 1 the gap of the probabilities. Weight 1 where
    kept; keeps the mean weight over the kept tokens. Reads the whole row, hence "sequence".

    Fails with beta = 0 by keeping tokens that both models find absurd; far above 1 by keeping those that both find likely.

    Args:
        beta: pull of the probability, >= 0.
        keep_fraction: in (0, 1]; 1 is ``Uniform``.
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(self, beta: float = 1.0, keep_fraction: float = 0.4) -> None:
        super().__init__()
        self.beta, self.keep_fraction = beta, keep_fraction
        name = type(self).__name__
        require(is_nonnegative(beta), f"{name}.beta", "a finite number >= 0", beta)
        require(is_fraction(keep_fraction), f"{name}.keep_fraction", "in (0, 1]", keep_fraction)

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The published settings, the log ratio alone, and everything."""
        return [cls(), cls(beta=1.2, keep_fraction=0.2), cls(beta=0.0, keep_fraction=0.1), cls(keep_fraction=1.0)]

    def keep(self, signal: TokenSignal, progress: float) -> Tensor:
        """bool [B, T], the chosen tokens."""
        student, teacher = signal.student_logprobs.double(), signal.teacher_logprobs.double()
        size = (teacher - student).abs()
        larger = torch.maximum(student, teacher)
        shrink = torch.where(size > 0, -torch.expm1(-size) / size.clamp(min=torch.finfo(size.dtype).tiny), 1.0)
        # the logarithm of L, which itself is 0 where both are absurd
        score = (self.beta * (larger + shrink.log())).exp() * size
        counts = (self.keep_fraction * lengths(signal.mask).double()).round().long().clamp(min=1)
        return best_of_rows(score, signal.mask, counts)
