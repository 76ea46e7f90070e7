"""Supervise what the student itself found unlikely: the selection of the null advantage."""

from __future__ import annotations

from torch import Tensor

from lit_opd.batchwise import least_likely
from lit_opd.errors import require
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_fraction
from lit_opd.weighting.base import WeightingStrategy
from lit_opd.weighting.selection import _BatchSelection


class LeastLikely(_BatchSelection):
    """Keeps the sampled tokens that the student gave the lowest probability; asks the teacher nothing.

        keep = the max(1, floor(fraction * N)) lowest s_t of the batch's N valid tokens (ties: position, then row key)

    Source: arXiv 2608.31046, read in its published code (repository DripNowhy/On-Policy-Self-Adaptation, ``opsa.py`` at commit
    ebebe09). With the advantage transform ``NullAdvantage`` or ``EntropyNull`` nothing of a run comes from the teacher. Weight 1
    where kept; keeps the mean weight over the kept tokens. Scope "batch".

    Fails as a selection of its own: unlikely tokens are those with the largest sampling noise in A.

    Args:
        fraction: in (0, 1]; 1 is ``Uniform``.
    Raises:
        ValueError: fraction outside (0, 1].
    """

    def __init__(self, fraction: float = 0.2) -> None:
        super().__init__()
        self.fraction = fraction
        require(is_fraction(fraction), f"{type(self).__name__}.fraction", "in (0, 1]", fraction)

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The published setting, a single token of the batch, and everything."""
        return [cls(), cls(1e-6), cls(1.0)]

    def keep(self, signal: TokenSignal, progress: float) -> Tensor:
        """bool [B, T], the chosen tokens of this rank's rows."""
        assert signal.row_keys is not None  # the record fills it
        return least_likely(signal.student_logprobs, signal.mask, signal.row_keys, self.fraction)
