"""SelecTKD: the student proposes its likeliest token, the teacher accepts it or not."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.errors import require
from lit_opd.lists import leading, listed_in, named
from lit_opd.types import TokenSignal
from lit_opd.weighting._lists import _ReadsLists
from lit_opd.weighting._ranges import is_nonnegative
from lit_opd.weighting.base import DependsOn, WeightingStrategy


class SelecTKD(_ReadsLists):
    """Full weight where the student's likeliest token is among the teacher's k likeliest.

        w_t = 1 if argmax pi_S is in the teacher's top k, else low

    Source: reported in arXiv 2510.24021 (its greedy variant; no code was published). Values {low, 1}; does not keep the mean
    weight. Reads the lists at t, functions of the tokens before t, hence "prefix".

    Fails as a selection once the student agrees with its teacher: nearly every token is accepted and the weight is uniform.

    Args:
        k: leading entries of the teacher's list that accept.
        low: weight of a token that is not accepted, >= 0; 1 is ``Uniform``.
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(self, k: int = 5, low: float = 0.01) -> None:
        super().__init__()
        self.low = low
        name = type(self).__name__
        self._set_k(k)
        require(is_nonnegative(low), f"{name}.low", "a finite number >= 0", low)

    @property
    def depends_on(self) -> DependsOn:
        """Reads state fields of position t."""
        return "prefix"

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The published setting, the same choice only, and none."""
        return [cls(), cls(k=1, low=0.0), cls(low=1.0)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """1 or low, [B, T]."""
        assert signal.student_topk is not None and signal.teacher_topk is not None  # required above
        accepted = listed_in(named(leading(signal.student_topk, 1)), leading(signal.teacher_topk, self.k)).any(-1)
        ones = torch.ones_like(signal.student_logprobs)
        return torch.where(accepted, ones, ones * self.low)
