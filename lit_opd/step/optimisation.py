"""How a gradient becomes a change of weights."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from lit_opd.models.sharding import sync_gradients


def synchronised(module: Any, *, last: bool) -> Any:
    """Gradient reduction over ranks on the last micro-batch only."""
    sync_gradients(module.student, last)
    model = module.trainer.strategy.model
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()
