"""REOPOLD: first no crushing objections, then where the student hesitates."""

from __future__ import annotations

import math

from torch import Tensor

from lit_opd.errors import is_finite, require
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_fraction, is_unit
from lit_opd.weighting.base import WeightingStrategy
from lit_opd.weighting.selection import _BatchSelection


class REOPOLD(_BatchSelection):
    """Keeps tokens in two phases; the advantage transform ``RewardFloor`` is the other half of the method.

        p <  switch: keep where A_t > log(strength) / (1 - strength)
        p >= switch: keep the ceil(keep_fraction * N) of the batch's N valid tokens with the highest H^S
                     (ties: position, then row key)

    Source: arXiv 2603.11137, read in two public re-implementations. They agree on the phases and not on the floor: others compute
    log(strength / (1 - strength)), and use 0.2 or 0.3 and a switch after a third of the steps. Weight 1 where kept; keeps the
    mean weight over the kept tokens. Scope "batch".

    Fails with a strong teacher and a weak student: the first phase drops the very tokens that are most wrong.

    Args:
        strength: the paper's lambda, in (0, 1); smaller drops less.
        switch: progress at which the second phase begins, in [0, 1].
        keep_fraction: of the second phase, in (0, 1].
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(self, strength: float = 0.1, switch: float = 0.5, keep_fraction: float = 0.2) -> None:
        super().__init__()
        self.strength, self.switch, self.keep_fraction = strength, switch, keep_fraction
        name = type(self).__name__
        require(is_finite(strength) and 0 < strength < 1, f"{name}.strength", "in (0, 1)", strength)
        require(is_unit(switch), f"{name}.switch", "in [0, 1]", switch)
        require(is_fraction(keep_fraction), f"{name}.keep_fraction", "in (0, 1]", keep_fraction)

    @property
    def requires(self) -> frozenset[str]:
        """The student's entropy."""
        return frozenset({"student_entropy"})

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The published setting, each phase alone."""
        return [cls(), cls(strength=0.5, switch=1.0), cls(switch=0.0, keep_fraction=0.5)]

    def keep(self, signal: TokenSignal, progress: float) -> Tensor:
        """bool [B, T], the tokens of the phase."""
        if progress < self.switch:
            return signal.mask & (signal.log_ratio > math.log(self.strength) / (1.0 - self.strength))
        assert signal.student_entropy is not None  # required above
        return self.best(signal.student_entropy[signal.mask], signal, self.keep_fraction)
