"""Fits with the observing callbacks on fixed rollouts, shared by their tests and by the two-process run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from lit_opd.module import OPDModule
from lit_opd.types import PromptBatch
from lit_opd.weighting.importance import ImportanceWeighting
from tests.helpers import cases, fixed


def module(folders: tuple[str, str], **settings: Any) -> OPDModule:
    """Trains on the ragged fixed rollout."""
    return fixed.module(folders, cases.rollout(), **({"weighting": ImportanceWeighting()} | settings))


def fit(
    folders: tuple[str, str],
    folder: Path,
    callbacks: list[L.Callback],
    *,
    steps: int,
    prompts: PromptBatch | None = None,
    ckpt_path: Path | None = None,
    settings: dict[str, Any] | None = None,
    **trainer: Any,
) -> L.Trainer:
    """The real Trainer in ``folder``, ``steps`` batches of the same prompts (default the fixed rollout's)."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "callbacks": callbacks,
    }
    loader = DataLoader([prompts or cases.rollout().prompts] * 16, batch_size=None)
    fitted = L.Trainer(**(defaults | trainer))
    fitted.fit(module(folders, **(settings or {})), loader, ckpt_path=ckpt_path)
    return fitted


class SaveAt(L.Callback):
    """Saves a checkpoint after one step; listed behind what it is to save."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save."""
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
