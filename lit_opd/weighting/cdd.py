"""CDD: what comes after much divergence counts exponentially less."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.distributed import all_sum
from lit_opd.errors import require
from lit_opd.masked import exclusive_cumsum, masked_sum
from lit_opd.types import TokenSignal
from lit_opd.weighting._lists import _ReadsLists
from lit_opd.weighting._ranges import is_nonnegative, is_unit
from lit_opd.weighting.base import Scope, WeightingStrategy


class CDD(_ReadsLists):
    """Discounts a token by the divergence that the response has gathered before it.

        div_s = max(sum over the teacher's k likeliest tokens of pi_T (log pi_T - log pi_S), 0)
        u_t   = max(floor, exp(-rate * sum_{s<t} div_s))
        w_t   = u_t / mean of u over the batch's valid tokens

    Source: reported in arXiv 2609.11127, whose values of ``rate`` and ``floor`` we do not know, hence no defaults. Keeps the
    mean weight of the batch. Unlike IW-OPD it does not divide by the row's own total, so a healthy row keeps its weight to the
    end. Reads the distributions before t and, through the mean, the whole batch, hence "sequence" and scope "batch".

    Fails where the divergence says little: a teacher with a wide choice of wordings gathers as much of it on a good prefix as on
    a bad one, and then ``rate`` is a decay by position.

    Args:
        rate: per nat, >= 0; 0 is ``Uniform``.
        floor: smallest weight before the mean is divided out, in [0, 1]; 1 is ``Uniform``.
        k: leading entries of the teacher's list.
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(self, rate: float, floor: float, k: int = 16) -> None:
        super().__init__()
        self.rate, self.floor = rate, floor
        name = type(self).__name__
        require(is_nonnegative(rate), f"{name}.rate", "a finite number >= 0 (per nat)", rate)
        require(is_unit(floor), f"{name}.floor", "in [0, 1]", floor)
        self._set_k(k)

    @property
    def requires(self) -> frozenset[str]:
        """The teacher's list, and the student's log-probs of its tokens."""
        return frozenset({"teacher_topk", "student_at_teacher_topk"})

    @property
    def scope(self) -> Scope:
        """Averages over all rows."""
        return "batch"

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """A gentle and a sharp discount, without a floor, and none."""
        return [cls(0.05, 0.2), cls(1.0, 0.0, k=4), cls(0.0, 0.0), cls(0.5, 1.0)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """u over its mean, [B, T]; sums in float64."""
        behind = exclusive_cumsum(self._divergence(signal), signal.mask)
        # a rate of 0 times an infinite sum is no number
        discount = (-self.rate * behind).exp() if self.rate else torch.ones_like(behind)
        raw = discount.clamp(min=self.floor)
        total, count = all_sum(torch.stack([masked_sum(raw, signal.mask).sum(), signal.mask.sum().double()])).unbind()
        return raw * count / torch.where(total > 0, total, 1.0)

    def _divergence(self, signal: TokenSignal) -> Tensor:
        """div_s, [B, T] nats, float64; infinite where the student rules out what the teacher may say."""
        assert signal.teacher_topk is not None and signal.student_at_teacher_topk is not None  # required above
        teacher = signal.teacher_topk.logprobs[..., : self.k].double()
        student = signal.student_at_teacher_topk[..., : self.k].double()
        terms = torch.where(teacher > -torch.inf, teacher.exp() * (teacher - student), 0.0)
        return terms.sum(-1).clamp(min=0.0)
