"""A weighting of your own: python train.py fit --config configs/quickstart.yaml --model.weighting examples.half_life.HalfLife"""

from __future__ import annotations

from torch import Tensor

from lit_opd.masked import positions
from lit_opd.types import TokenSignal
from lit_opd.weighting import WeightingStrategy


class HalfLife(WeightingStrategy):
    """Halves the weight every ``tokens`` tokens."""

    def __init__(self, tokens: float = 20.0) -> None:
        super().__init__()
        self.tokens = tokens

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """0.5 ** (position / tokens), [B, T]."""
        return 0.5 ** (positions(signal.mask).float() / self.tokens)
