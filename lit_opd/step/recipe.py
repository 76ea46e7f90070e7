"""What is learned: weighting, advantage, objective, aggregation, and how often a batch is used."""

from __future__ import annotations

import math


def total_updates(*, max_steps: int, batches: float, updates_per_batch: int) -> int:
    """Optimizer steps the run will make, 1 where that is not known."""
    if max_steps > 0:
        return max_steps
    return int(batches) * updates_per_batch if math.isfinite(batches) else 1
