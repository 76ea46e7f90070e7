"""Checkpoints in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """``checkpoints/step-N.ckpt`` every N optimizer steps and at the end, and ``last.ckpt``.

    Args:
        every: optimizer steps between checkpoints.
        keep: numbered checkpoints to keep, the newest ones.
        dirpath: folder, default ``checkpoints`` in the run folder.
    """

    def __init__(self, every: int = 50, keep: int = 2, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step-{step}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=keep,
            save_last=True,
            every_n_train_steps=every,
        )

    def use_run_dir(self, run_dir: Path, every: int) -> None:
        """Take folder and interval from the command line."""
        self.dirpath = str(run_dir / "checkpoints")
        self._every_n_train_steps = every

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The run folder's ``checkpoints`` where no folder was given."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where the last step was not one of the saved ones."""
        if self._last_global_step_saved != trainer.global_step:
            candidates: dict[str, Any] = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
