"""A former run's folder that a new run takes the place of: moved aside first, deleted when the new run has a checkpoint."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_opd.errors import InputError

MARK = ".replaced"  # runs/name.replaced, runs/name.replaced-2, ...


class ReplacedFolder(Callback):
    """Keeps what ``--overwrite`` replaces until the new run has made its first checkpoint.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.aside: Path | None = None  # where the former content is, None where there is none

    def move(self) -> None:
        """Move the folder's content aside; nothing where it is missing or empty.

        Raises:
            InputError: the disk refuses.
        """
        real = self.folder.resolve()
        if not real.is_dir() or not any(real.iterdir()):
            return
        aside = _free(real)
        try:
            real.rename(aside)
        except OSError as error:
            raise InputError(
                f"`--overwrite` must be able to move {real} aside to {aside.name}: {error.strerror}; delete it by hand, or give "
                "another --run_dir"
            ) from error
        self.aside = aside
        rank_zero_info(f"the run that was in {self.folder} is in {aside} until the new one has a checkpoint")

    def put_back(self) -> None:
        """The new run has left nothing behind: the former one is what it was."""
        if self.aside is not None and not self.folder.resolve().exists():
            self.aside.rename(self.folder.resolve())
            self.aside = None

    def note(self) -> str:
        """Where the former run is, empty where it is not kept."""
        return "" if self.aside is None else f"the run that was in {self.folder} before is in {self.aside}"

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Delete it once a checkpoint is there."""
        self._delete_if_replaced()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The last checkpoint comes after the last batch."""
        self._delete_if_replaced()

    def _delete_if_replaced(self) -> None:
        """This one, and those that earlier tries without a checkpoint have left."""
        if self.aside is None or not any(self.folder.rglob("*.ckpt")):
            return
        real = self.folder.resolve()
        for path in real.parent.iterdir():
            if path == self.aside or (_number(path, real) is not None and (path / "config.yaml").is_file()):
                shutil.rmtree(path, ignore_errors=True)
        self.aside = None


def _number(path: Path, folder: Path) -> int | None:
    """1 for ``name.replaced``, n for ``name.replaced-n``, None for any other name."""
    head, mark, tail = path.name.rpartition(MARK)
    if head != folder.name or not mark or not re.fullmatch(r"(-\d+)?", tail):
        return None
    return int(tail[1:] or 1)


def _free(folder: Path) -> Path:
    """The first name beside ``folder`` that is larger than all taken ones."""
    taken = [number for path in folder.parent.iterdir() if (number := _number(path, folder)) is not None]
    number = max(taken, default=0) + 1
    return folder.with_name(f"{folder.name}{MARK}{'' if number == 1 else f'-{number}'}")
