"""What the strategies share that choose tokens and drop the others from the denominator."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lit_opd.types import TokenSignal
from lit_opd.weighting.base import WeightingStrategy


class _Selection(WeightingStrategy):
    """Weight 1 on the selected tokens; the others leave the numerator and the denominator. Write ``keep``."""

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """Ones, [B, T]; ``keep`` does the choosing."""
        return torch.ones_like(signal.student_logprobs)

    @abstractmethod
    def keep(self, signal: TokenSignal, progress: float) -> Tensor:
        """bool [B, T], the selected tokens."""
