"""Checkpoints in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_opd.types import InputError, ServerError


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
        self._batch_began_at: int | None = None  # optimizer step at the last batch boundary, None before training

    def use_run_dir(self, run_dir: Path, every: int) -> None:
        """Take folder and interval from the command line."""
        self.dirpath = str(run_dir / "checkpoints")
        self._every_n_train_steps = every

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The run folder's ``checkpoints`` where no folder was given."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there is something to save."""
        super().on_train_start(trainer, pl_module)
        self._batch_began_at = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the optimizer step."""
        self._batch_began_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is due."""
        self._batch_began_at = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the state before the failed batch where an InputError or ServerError stopped it, and say so in a note.

        Nothing is saved where the batch had made some of its optimizer steps (a checkpoint falls on batch boundaries, so
        the last numbered one is what is kept), or where not every rank failed, since saving needs them all.
        """
        if self._batch_began_at is None or not isinstance(exception, InputError | ServerError):
            return
        if trainer.world_size > 1 and not exception.on_every_rank:
            exception.add_note(f"one rank failed alone, so nothing was saved; {self._kept()}")
        elif trainer.global_step != self._batch_began_at:
            made = trainer.global_step - self._batch_began_at
            exception.add_note(
                f"the batch had made {made} of its optimizer steps, so nothing was saved; {self._kept()}"
            )
        else:
            if self._last_global_step_saved != trainer.global_step or not self._last_checkpoint_saved:
                self._save_now(trainer)
            exception.add_note(
                f"the state before the failed batch (optimizer step {trainer.global_step}) is in {self.last_model_path}; go "
                "on with --ckpt_path last"
            )

    def _kept(self) -> str:
        if not self.last_model_path:
            return "there is no checkpoint yet"
        return f"the last checkpoint is {self.last_model_path}; go on with --ckpt_path last"

    def _save_now(self, trainer: Trainer) -> None:
        candidates: dict[str, Any] = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where the last step was not one of the saved ones."""
        if self._last_global_step_saved != trainer.global_step:
            self._save_now(trainer)
