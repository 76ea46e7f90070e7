"""The Trainer with checkpoints that are whole or not there, and runs that go on at their last step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_opd.errors import InputError
from lit_opd.run import checkpoint_files
from lit_opd.run.lightning import EndedFits


class OPDTrainer(EndedFits):
    """Lightning's Trainer, with checkpoints written in one piece, and runs that go on at their last step."""

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """As Lightning's, but the file appears whole or not at all; ``storage_options`` must be None."""
        if storage_options is not None:
            raise InputError(f"`storage_options` must be None, got {storage_options!r}: checkpoints are local files")
        checkpoint_files.save(self, filepath, weights_only)
