"""metrics.csv of a run: goes on where the checkpoint left off, without holes or doubles."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


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
