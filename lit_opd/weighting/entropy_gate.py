"""Listen to the teacher where it is sure."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.errors import require
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_nonnegative
from lit_opd.weighting.base import DependsOn, WeightingStrategy


class EntropyGate(WeightingStrategy):
    """Damps tokens at which the teacher hesitates.

        w_t = 1 if H^T_t <= threshold else beta

    Source: ours, after the work reported in arXiv 2603.07079, which adds a forward KL at high H^T instead. Values
    {beta, 1}; does not keep the mean weight. H^T_t is the entropy of the distribution y_t is drawn from, known before
    y_t, hence "prefix".

    Fails where high entropy is a wide choice of good wordings, and where a sure teacher is wrong.

    Args:
        threshold: nats, >= 0.
        beta: weight above the threshold, >= 0; 1 is ``Uniform``.
    Raises:
        ValueError: a negative or non-finite parameter.
    """

    def __init__(self, threshold: float = 0.8, beta: float = 0.0) -> None:
        super().__init__()
        self.threshold, self.beta = threshold, beta
        name = type(self).__name__
        require(is_nonnegative(threshold), f"{name}.threshold", "a finite number >= 0 (nats)", threshold)
        require(is_nonnegative(beta), f"{name}.beta", "a finite number >= 0", beta)

    @property
    def requires(self) -> frozenset[str]:
        """The teacher's entropy."""
        return frozenset({"teacher_entropy"})

    @property
    def depends_on(self) -> DependsOn:
        """Reads a state field of position t, a function of the tokens before it."""
        return "prefix"

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The default, a soft gate, and none."""
        return [cls(), cls(threshold=0.3, beta=0.2), cls(beta=1.0)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """1 or beta, [B, T]."""
        assert signal.teacher_entropy is not None  # required above
        ones = torch.ones_like(signal.student_logprobs)
        return torch.where(signal.teacher_entropy <= self.threshold, ones, ones * self.beta)
