"""FiRe's first half: drop the responses that the teacher finds least likely."""

from __future__ import annotations

from torch import Tensor

from lit_opd.batchwise import batch_quantiles
from lit_opd.errors import require
from lit_opd.masked import masked_mean
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_unit
from lit_opd.weighting.base import WeightingStrategy
from lit_opd.weighting.selection import _BatchSelection


class FiReRows(_BatchSelection):
    """Drops whole rows by the teacher's mean log-prob; ``Product`` with ``FiRe`` is the whole method.

        m_r    = mean of q_t over row r
        keep_t = m_r >= the ``fraction`` quantile of m over the batch's rows, with linear interpolation

    Source: arXiv 2606.02684, read in public copies of its code (``traj_skip_percentile`` 20). Weight 1 where kept; keeps the
    mean weight over the kept tokens. Rows without a token do not count. Scope "batch".

    Fails on batches of a few rows, where the quantile is a row's own value, and where rows differ in length: a mean log-prob
    favours long, repetitive text.

    Args:
        fraction: of the rows that are dropped at most, in [0, 1]; 0 is ``Uniform``, 1 leaves the likeliest row.
    Raises:
        ValueError: fraction outside [0, 1].
    """

    def __init__(self, fraction: float = 0.2) -> None:
        super().__init__()
        self.fraction = fraction
        require(is_unit(fraction), f"{type(self).__name__}.fraction", "in [0, 1]", fraction)

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The published setting, most rows, and none."""
        return [cls(), cls(0.7), cls(0.0)]

    def keep(self, signal: TokenSignal, progress: float) -> Tensor:
        """bool [B, T], the tokens of the rows that stay."""
        means, filled = masked_mean(signal.teacher_logprobs.double(), signal.mask), signal.mask.any(-1)
        threshold = batch_quantiles(means[filled], (self.fraction,))
        return signal.mask & (means >= threshold).unsqueeze(-1)
