"""The student as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lit_opd.callbacks.checkpoint import save_first

from lit_opd.errors import InputError
from lit_opd.run.tracking import crossed


class ExportStudent(Callback):
    """Writes ``student/`` in the run folder at the end, and ``student-step-N/`` on schedule.

    A batch that makes several optimizer steps is exported at its end, N, where a multiple of ``every`` was among them.

    Args:
        every: optimizer steps between exports, None for the end only.
        path: folder, default ``student`` in the run folder.
    """

    def __init__(self, every: int | None = None, path: str | None = None) -> None:
        if every is not None and every < 1:
            raise InputError(f"`ExportStudent.every` must be >= 1 or null, got {every}")
        self.every, self.path = every, path
        self._last = 0  # optimizer step at the end of the last batch

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.path) if self.path else Path(trainer.default_root_dir) / "student"

    def exports(self, run_dir: Path, steps: range) -> list[Path]:
        """Folders that a run of these optimizer steps writes, the last one's at its end; for the disk space that is asked for."""
        last = Path(self.path) if self.path else run_dir / "student"
        on_the_way = (step for step in steps if self.every is not None and step % self.every == 0)
        return [*(last.with_name(f"{last.name}-step-{step}") for step in on_the_way), last]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on."""
        self._last = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Export on schedule."""
        step, last = trainer.global_step, self._last
        self._last = step
        if self.every is not None and crossed(step, last, self.every):
            folder = self._folder(trainer)
            pl_module.export_student(folder.with_name(f"{folder.name}-step-{step}"))  # type: ignore[operator]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the final student, after the last checkpoint: an export that fails loses nothing, and the run that goes on
        from there exports again."""
        save_first(trainer, pl_module)
        pl_module.export_student(self._folder(trainer))  # type: ignore[operator]
