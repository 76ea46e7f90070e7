"""Random states in the checkpoint."""

from __future__ import annotations

import random
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class RngState(Callback):
    """Restores Python's and torch's random states when a run goes on from a checkpoint.

    Sampling itself needs none of them: its streams are functions of (seed, step, row).
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Lists and tensors only, so that the checkpoint loads with ``weights_only``."""
        version, internal, gauss = random.getstate()
        state = {"python": [version, list(internal), gauss], "torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts."""
        self._state = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the kept states back."""
        if self._state is None:
            return
        version, internal, gauss = self._state["python"]
        random.setstate((version, tuple(internal), gauss))
        torch.set_rng_state(self._state["torch"].cpu())
        if "cuda" in self._state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([state.cpu() for state in self._state["cuda"]])
