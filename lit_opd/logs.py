"""The loggers of a run: metrics.csv, which goes on where the checkpoint left off, and W&B, without which the run goes on."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import _DummyExperiment as NoExperiment
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only


class _ContinuedWriter(ExperimentWriter):
    """Keeps an existing file; Lightning's own writer deletes it."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    def _check_log_dir_exists(self) -> None:
        """An existing file is what we go on with."""


class RunCSVLogger(CSVLogger):
    """Writes ``metrics.csv`` straight into the run folder, a line at a time.

    Args:
        folder: the run folder.
        continued_from: optimizer step of the checkpoint a resumed run starts from; later lines are dropped. None for a new run.
    """

    def __init__(self, folder: str, continued_from: int | None = None) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=1)
        self.continued_from = continued_from

    @property
    def experiment(self) -> ExperimentWriter:  # type: ignore[override]
        """The writer, made at first use on rank 0."""
        if self._experiment is None and self.continued_from is not None:
            drop_later_lines(Path(self.root_dir) / ExperimentWriter.NAME_METRICS_FILE, self.continued_from)
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _ContinuedWriter(log_dir=self.log_dir)
        return super().experiment


def drop_later_lines(path: Path, step: int) -> None:
    """Remove lines of optimizer steps after ``step``; a line that a kill cut short goes too."""
    if not path.is_file():
        return
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        names = list(reader.fieldnames or [])
        kept = [
            row for row in reader if None not in row.values() and row["step"].isdigit() and int(row["step"]) <= step
        ]
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(kept)
    os.replace(temporary, path)


class RunWandbLogger(WandbLogger):
    """W&B; when its process dies or its server cannot be reached, one warning is given and training goes on without it.

    A server that cannot be reached at the start turns the run offline; later losses are W&B's own process to retry. What was
    written before a loss stays in ``wandb/``. The arguments are Lightning's.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._wandb_init.pop("anonymous", None)  # Lightning passes None, and W&B warns about any value
        self._lost = False

    @property
    def experiment(self) -> Any:
        """The W&B run; something that takes every call and does nothing once W&B is lost, and on ranks other than 0."""
        if self._lost or rank_zero_only.rank:
            return NoExperiment()
        known = self._experiment is not None
        run = self._guarded(self._begun)() or NoExperiment()
        if not known and not self._lost:
            for name in ("log", "finish"):
                setattr(run, name, self._guarded(getattr(run, name)))
        return run

    def _begun(self) -> Any:
        import wandb

        try:
            return super().experiment
        except wandb.errors.CommError as error:
            if self._offline:
                raise
            warnings.warn(
                f"W&B cannot be reached ({_first_line(error)}): the run goes on offline; upload it later with `wandb sync`",
                stacklevel=2,
            )
            self._offline, self._wandb_init["mode"] = True, "offline"
            return super().experiment

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning does."""
        self._guarded(super().log_hyperparams)(*args, **kwargs)

    def _guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, or nothing where W&B is lost."""
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self._lost:
                return None
            try:
                return call(*args, **kwargs)
            except (OSError, EOFError, wandb.errors.Error, HandleAbandonedError, MailboxClosedError) as error:
                self._lose(error)
                return None

        return guarded

    def _lose(self, error: Exception) -> None:
        """Warn, and take W&B's hooks out of this process, which would raise again at its end."""
        import wandb
        from wandb.sdk.lib.module import unset_globals

        self._lost = True
        with suppress(Exception):  # what is torn down is broken: whatever it says is known already
            wandb.teardown()
        unset_globals()
        warnings.warn(
            f"W&B is lost ({type(error).__name__}: {_first_line(error)}): training goes on without it; metrics.csv has every "
            f"number, and what W&B had so far is in {Path(self.save_dir or '.') / 'wandb'}",
            stacklevel=2,
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
