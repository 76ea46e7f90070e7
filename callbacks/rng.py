"""Random states in the checkpoint."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_opd.distributed import gather_objects, rank


class RngState(Callback):
    """Restores the random states of Python, numpy and torch, rank by rank, when a run goes on from a checkpoint.

    Sampling itself needs none of them: its streams are functions of (seed, step, row). Dropout does. A checkpoint that is saved
    while a batch is abandoned holds the states before that batch.
    """

    def __init__(self) -> None:
        self._ranks: list[dict[str, Any]] | None = None  # of the checkpoint
        self._before: dict[str, Any] | None = None  # of the running batch

    def state_dict(self) -> dict[str, Any]:
        """Lists and tensors only, so that the checkpoint loads with ``weights_only``. Called on every rank."""
        return {"ranks": gather_objects([self._before or states()])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts."""
        self._ranks = state_dict["ranks"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the kept states back."""
        if self._ranks is None:
            return
        if rank() < len(self._ranks):
            restore(self._ranks[rank()])
        if trainer.world_size != len(self._ranks):
            rank_zero_warn(
                f"the checkpoint is of {len(self._ranks)} ranks and the run goes on with {trainer.world_size}: correct, but not "
                "bit for bit what it would have been"
            )
        self._ranks = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """What a batch that is abandoned starts from."""
        self._before = states()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch counts."""
        self._before = None


def states() -> dict[str, Any]:
    """The random states of this process."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    found = {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()  # of the rank's own device: how many are seen may change
    return found


def restore(found: dict[str, Any]) -> None:
    """Make ``found`` the random states of this process."""
    version, internal, gauss = found["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = found["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(found["torch"].cpu())
    if "cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(found["cuda"].cpu())
