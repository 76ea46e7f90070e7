"""TIP: keep the tokens of the batch that are uncertain or contested."""

from __future__ import annotations

from torch import Tensor

from lit_opd.batchwise import min_max_normalised
from lit_opd.errors import require
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_fraction
from lit_opd.weighting.base import WeightingStrategy
from lit_opd.weighting.selection import _BatchSelection


class TIP(_BatchSelection):
    """Keeps the highest-scoring part of the batch's tokens and drops the rest from the denominator.

        h, e    = H^S and the divergence (token KL where computed, else d), each min-max-normalised over the batch
                  (0 where it is constant)
        score_t = h_t + e_t - h_t * e_t
        keep    = the ceil(keep_fraction * N) highest of the batch's N valid tokens
                  (ties: earlier position, then smaller row key)

    Source: reported in arXiv 2604.14084. Weight 1 where kept; keeps the mean weight over the kept tokens. The batch is
    that of all ranks, hence scope "batch". Token KL is there where an advantage transform or an objective asks for it. Row
    keys must differ: tokens that tie in score, position and row key share their fate.

    Fails with outliers: one extreme entropy or divergence of the batch leaves the others' scores next to 0.

    Args:
        keep_fraction: in (0, 1]; 1 is ``Uniform``.
    Raises:
        ValueError: keep_fraction outside (0, 1].
    """

    def __init__(self, keep_fraction: float = 0.5) -> None:
        super().__init__()
        self.keep_fraction = keep_fraction
        require(is_fraction(keep_fraction), f"{type(self).__name__}.keep_fraction", "in (0, 1]", keep_fraction)

    @property
    def requires(self) -> frozenset[str]:
        """The student's entropy."""
        return frozenset({"student_entropy"})

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The published half, a small part, and everything."""
        return [cls(), cls(0.1), cls(1.0)]

    def keep(self, signal: TokenSignal, progress: float) -> Tensor:
        """bool [B, T], the chosen tokens of this rank's rows."""
        assert signal.student_entropy is not None  # required above
        divergence = signal.disagreement if signal.token_kl is None else signal.token_kl
        unsure, contested = (min_max_normalised(x[signal.mask]) for x in (signal.student_entropy, divergence))
        return self.best(unsure + contested - unsure * contested, signal, self.keep_fraction)
