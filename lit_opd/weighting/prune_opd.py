"""Prune-OPD: trust is lost token by token where the two lists of likely tokens part."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.errors import require
from lit_opd.lists import overlap
from lit_opd.masked import masked_values, running_sum
from lit_opd.types import TokenSignal
from lit_opd.weighting._lists import _ReadsLists
from lit_opd.weighting._ranges import is_fraction, is_nonnegative
from lit_opd.weighting.base import DependsOn, WeightingStrategy


class PruneOPD(_ReadsLists):
    """Takes a fixed step from the weight at every token whose lists of likely tokens have too little in common.

        O_t   = share of the student's k likeliest tokens that are among the teacher's k likeliest
        bad_t = 1 where O_t < threshold
        w_t   = clip(1 - drop * sum_{j<=t} bad_j, 0, 1) + base

    Source: arXiv 2605.07804; read in a public copy of its code (``prune_opd.py`` of a fork of verl), defaults as its scripts set
    them. Departure: the source also stops generation where the weight ends. Range [base, 1 + base]; does not keep the mean
    weight. The lists at t are functions of the tokens before t, hence "prefix".

    Fails with small vocabularies, where k tokens are most of them and always in common, and with sure models, whose lists end in
    noise and part without meaning.

    Args:
        k: leading entries of both lists.
        threshold: smallest share that is good, in (0, 1].
        drop: lost at a bad token, >= 0.
        base: what is never lost, >= 0.
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(self, k: int = 16, threshold: float = 0.7, drop: float = 0.01, base: float = 0.5) -> None:
        super().__init__()
        self.threshold, self.drop, self.base = threshold, drop, base
        name = type(self).__name__
        self._set_k(k)
        require(is_fraction(threshold), f"{name}.threshold", "in (0, 1]", threshold)
        require(is_nonnegative(drop), f"{name}.drop", "a finite number >= 0", drop)
        require(is_nonnegative(base), f"{name}.base", "a finite number >= 0", base)

    @property
    def depends_on(self) -> DependsOn:
        """Reads state fields up to t, functions of the tokens before it."""
        return "prefix"

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The published setting, one that ends soon, and none."""
        return [cls(), cls(k=4, threshold=1.0, drop=0.4, base=0.0), cls(drop=0.0, base=0.0)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """clip(1 - drop * bad tokens up to t, 0, 1) + base, [B, T]."""
        assert signal.student_topk is not None and signal.teacher_topk is not None  # required above
        bad = overlap(signal.student_topk, signal.teacher_topk, self.k) < self.threshold
        count = running_sum(masked_values(bad, signal.mask), dtype=torch.float64)
        return (1.0 - self.drop * count).clamp(0.0, 1.0) + self.base
