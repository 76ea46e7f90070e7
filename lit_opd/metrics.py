"""torchmetrics: sums and counts, reduced over ranks, never means of means."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_opd.masked import positions


class WeightedMean(Metric):
    """Mean of values with weights; NaN where nothing was counted."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor) -> None:
        """Add ``values`` with ``weights`` of the same shape; a value of weight 0 may be anything."""
        used = weights.bool()
        self.total += torch.where(used, values.double() * weights.double(), 0.0).sum()
        self.count += weights.double().sum()

    def compute(self) -> Tensor:
        """float64 scalar."""
        return self.total / self.count


class PositionBands(Metric):
    """Means of a per-token quantity in equal bands of the relative position (i - 0.5) / n.

    Args:
        bands: number of bands; a response shorter than this leaves some without its tokens.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, bands: int = 10) -> None:
        super().__init__()
        self.bands = bands
        self.add_state("total", torch.zeros(bands, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(bands, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, mask: Tensor) -> None:
        """Add ``values`` [B, T] where ``mask`` bool [B, T] is True."""
        place = positions(mask).double() - 0.5
        relative = place / mask.sum(-1, keepdim=True).clamp(min=1)
        band = (relative * self.bands).long().clamp(0, self.bands - 1)[mask]
        self.total.index_add_(0, band, values[mask].double())
        self.count.index_add_(0, band, torch.ones_like(band, dtype=torch.float64))

    def compute(self) -> Tensor:
        """float64 [bands], NaN where a band is empty."""
        return self.total / self.count
