"""metrics.csv of a run, and which W&B run it is: both go on where the checkpoint left off, without holes or doubles."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path
from typing import Any

from lit_opd.files import append_whole, replace_or_refuse, replace_whole, warn_unwritten
from lit_opd.run.lightning import KeptFileWriter, OwnWriterLogger


def run_id(run_dir: Path) -> str | None:
    """The id of the W&B run that a run folder belongs to, by the names W&B gives its folders; None where there is none."""
    names = [path.name for path in sorted((run_dir / "wandb").glob("*run-*"))]
    found = [match for match in map(re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)").fullmatch, names) if match]
    return max(found, key=lambda match: match[1])[2] if found else None


class _Writer(KeptFileWriter):
    """Keeps an existing file, which Lightning's own writer deletes, and never leaves a part of it.

    Lines of later steps go before the first new one: a run that is refused before that leaves the file as it was.
    """

    def __init__(self, log_dir: str, *, continued_from: int | None, validated: bool) -> None:
        super().__init__(log_dir, continued=continued_from is not None)
        self._continued_from, self._validated = continued_from, validated
        self._path, self._refused = Path(self.metrics_file_path), False
        self.metrics_keys = _names(self._path)

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Record metrics."""
        if self._continued_from is not None:
            drop_later_lines(self._path, self._continued_from, validated=self._validated)
            self._continued_from = None
        super().log_metrics(metrics_dict, step)

    def save(self) -> None:
        """Write what was recorded; what the disk does not take is written with the next lines, and a warning says so."""
        if not self.metrics:
            return
        try:
            if self.record_new_keys() or not self._path.is_file():
                rewrite(self._path, self.metrics_keys, [*_rows(self._path), *self.metrics])
            else:
                append_whole(self._path, _text(self.metrics_keys, self.metrics).encode())
        except OSError as error:
            self.metrics_keys = _names(self._path)
            if not self._refused:
                warn_unwritten(self._path, error)
            self._refused = True
            return
        self.metrics, self._refused = [], False


class RunCSVLogger(OwnWriterLogger):
    """Writes ``metrics.csv`` straight into the run folder, a line at a time.

    Args:
        folder: the run folder.
        continued_from: optimizer step of the checkpoint a resumed run starts from; later lines are dropped. None for a new run.
        validated: False where the validation of that step is made again; its line is dropped.
    """

    def __init__(self, folder: str, continued_from: int | None = None, *, validated: bool = True) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=1)
        self.continued_from, self.validated = continued_from, validated

    def make_writer(self) -> KeptFileWriter:
        """Goes on with the file of the run that is continued."""
        os.makedirs(self.root_dir, exist_ok=True)
        return _Writer(self.log_dir, continued_from=self.continued_from, validated=self.validated)


def later_lines(path: Path, step: int) -> bytes:
    """Header and lines of optimizer steps after ``step``; nothing where there are none."""
    rows = [row for row in _rows(path) if _is_whole(row) and int(row["step"]) > step]
    return _content(_names(path), rows) if rows else b""


def drop_later_lines(path: Path, step: int, *, validated: bool = True) -> None:
    """Remove lines of optimizer steps after ``step``; a line that a kill cut short goes too.

    Args:
        path: of the file, which may be missing.
        step: the last optimizer step that stays.
        validated: False where the validation at ``step`` is to be made again.
    Raises:
        InputError: the disk does not take what stays; the file is as it was.
    """
    if not path.is_file():
        return
    names, rows = _names(path), [row for row in _rows(path) if _stays(row, step, validated=validated)]
    replace_or_refuse(path, _content(names, rows))


def _stays(row: dict[str, Any], step: int, *, validated: bool) -> bool:
    if not _is_whole(row) or int(row["step"]) > step:
        return False
    made_again = not validated and int(row["step"]) == step
    return not (made_again and any(value for name, value in row.items() if name.startswith("val/")))


def _is_whole(row: dict[str, Any]) -> bool:
    """False for a line that a kill cut short."""
    return None not in row.values() and None not in row and row["step"].isdigit()


def _names(path: Path) -> list[str]:
    """The header, empty where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file).fieldnames or [])


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _text(names: list[str], rows: list[dict[str, Any]]) -> str:
    lines = io.StringIO(newline="")
    csv.DictWriter(lines, fieldnames=names).writerows(rows)
    return lines.getvalue()


def rewrite(path: Path, names: list[str], rows: list[dict[str, Any]]) -> None:
    """Replace the file in one step by a header and rows."""
    replace_whole(path, _content(names, rows))


def _content(names: list[str], rows: list[dict[str, Any]]) -> bytes:
    header = _text(names, [dict(zip(names, names, strict=True))])
    return (header + _text(names, rows)).encode()
