"""What a run folder holds, read for its page: numbers, position profiles, samples, hints. A missing file is an empty part."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_opd.errors import InputError
from lit_opd.files import read_lines
from lit_opd.report.charts import spread
from lit_opd.report.profile import ProfileWindow

METRICS, PROFILE, SAMPLES, HINTS = "metrics.csv", "profile.jsonl", "samples.jsonl", "hints.jsonl"
CONFIG, SUMMARY = "config.yaml", "summary.json"
MOST_WINDOWS = 160  # of the position profile; of more every n-th is read
MOST_SAMPLES = 160
MOST_TOKENS = 60_000  # shown one by one; samples after that are shown by tenths
READ = ("val/", "eval/", "throughput/")  # and of what is logged each step, which makes a long file:
READ_EACH_STEP = frozenset(
    [
        f"train/{name}"
        for name in ("reverse_kl_k1", "response_length", "weight_ess", "grad_norm", "tokens", "turns", "reward")
    ]
    + [f"train/{name}_fraction" for name in ("truncated", "budget", "stopped", "turns_cut", "environment_failed")]
    + [f"profile/{band}_30/disagreement" for band in ("first", "last")]
)


@dataclass(frozen=True)
class Measured:
    """One logged quantity; what was no finite number is left out.

    Args:
        steps: optimizer steps, rising.
        values: as many.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class RunFiles:
    """The files of one run.

    Args:
        folder: where they are.
        config: ``config.yaml``, empty where there is none.
        summary: ``summary.json`` of the whole run; None while it trains, or where it stopped before its end.
        metrics: ``metrics.csv`` by name.
        step: optimizer steps done, as far as logged.
        windows: of ``profile.jsonl``, the first, the last and at most ``MOST_WINDOWS`` in all.
        num_windows: in the file.
        samples: of ``samples.jsonl``, at most ``MOST_SAMPLES``, each with its ``verdict``.
        num_samples: in the file.
        hints: lines of ``hints.jsonl``.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] | None = None
    metrics: dict[str, Measured] = field(default_factory=dict)
    step: int = 0
    windows: tuple[ProfileWindow, ...] = ()
    num_windows: int = 0
    samples: tuple[dict[str, Any], ...] = ()
    num_samples: int = 0
    hints: tuple[dict[str, Any], ...] = ()

    @property
    def planned(self) -> int | None:
        """Optimizer steps that the run was asked for; None where epochs may end it before, as its files do not say how many
        batches one has."""
        trainer = self.config.get("trainer")
        steps, epochs = (
            trainer.get(name) if isinstance(trainer, dict) else None for name in ("max_steps", "max_epochs")
        )
        by_epochs = isinstance(epochs, int) and epochs >= 0
        return int(steps) if isinstance(steps, int) and steps > 0 and not by_epochs else None

    def metric(self, name: str) -> Measured:
        """A logged quantity; empty where it was not."""
        return self.metrics.get(name, Measured((), ()))


def read_run_files(folder: str | Path) -> RunFiles:
    """Read a run folder, of a finished run or of one that trains.

    Raises:
        InputError: no such folder, none of a run's files in it, or a broken one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"`report` must be given a run folder, got {str(folder)!r}, which is none")
    if not any((folder / name).is_file() for name in (METRICS, PROFILE)):
        raise InputError(f"`report` must be given a run folder, got {str(folder)!r} without {METRICS} and {PROFILE}")
    metrics, step = _metrics(folder / METRICS)
    windows, num_windows = read_windows(folder / PROFILE, most=MOST_WINDOWS)
    samples, num_samples = _samples(folder / SAMPLES)
    step = max([step, *(window.step for window in windows[-1:])])
    return RunFiles(
        folder=folder,
        config=_mapping(folder / CONFIG),
        summary=_summary(folder / SUMMARY, step),
        metrics=metrics,
        step=step,
        windows=windows,
        num_windows=num_windows,
        samples=samples,
        num_samples=num_samples,
        hints=tuple(_lines(folder / HINTS)),
    )


def _summary(path: Path, step: int) -> dict[str, Any] | None:
    """None where the run has gone on after it: then it is the summary of an earlier part."""
    found = _mapping(path)
    return found if isinstance(found.get("steps"), int) and found["steps"] >= step else None


def _mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file, empty where there is none."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold settings by name, got {type(found).__name__}")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return read_lines(path)
    except ValueError as error:
        raise InputError(str(error)) from error


# -- metrics.csv -------------------------------------------------------------------------------------------------------


def _metrics(path: Path) -> tuple[dict[str, Measured], int]:
    """Quantities by name, and the last step. A step that was logged twice counts with its last value."""
    if not path.is_file():
        return {}, 0
    found: dict[str, dict[int, float]] = {}
    last = 0
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if header and "step" not in header:
            raise InputError(f"{path} must have a column `step`, got {', '.join(header[:5])}")
        wanted = [(place, name) for place, name in enumerate(header) if name.startswith(READ) or name in READ_EACH_STEP]
        for row in rows:
            if len(row) != len(header) or not (step_text := row[header.index("step")]).isdigit():
                continue  # a line that a kill cut short
            step = int(step_text)
            last = max(last, step)
            for place, name in wanted:
                if row[place]:
                    found.setdefault(name, {})[step] = _number(row[place])
    return {name: _measured(values) for name, values in found.items()}, last


def _measured(values: dict[int, float]) -> Measured:
    pairs = [(step, values[step]) for step in sorted(values) if math.isfinite(values[step])]
    return Measured(tuple(step for step, _ in pairs), tuple(value for _, value in pairs))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


# -- profile.jsonl, samples.jsonl --------------------------------------------------------------------------------------


def _picked(path: Path, most: int) -> tuple[list[dict[str, Any]], int]:
    """Evenly spread lines, the first and the last among them, and how many there are; only those are parsed."""
    if not path.is_file():
        return [], 0
    lines = [line for line in path.read_bytes().split(b"\n")[:-1] if line]  # after the last break: empty, or cut short
    found = []
    for place in spread(len(lines), most):
        try:
            found.append(json.loads(lines[place]))
        except ValueError as error:
            raise InputError(f"{path}:{place + 1} must be a JSON object: {error}") from error
    return found, len(lines)


def read_windows(path: Path, *, most: int) -> tuple[tuple[ProfileWindow, ...], int]:
    """Evenly spread windows of a ``profile.jsonl``, the first and the last among them, and how many there are.

    Raises:
        InputError: a line that is no window.
    """
    lines, count = _picked(path, most)
    try:
        return tuple(ProfileWindow.from_json(line) for line in lines), count
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} must hold windows of a position profile; missing or unknown: {error}") from error


def _samples(path: Path) -> tuple[tuple[dict[str, Any], ...], int]:
    lines, count = _picked(path, MOST_SAMPLES)
    room, found = MOST_TOKENS, []
    for line in reversed(lines):  # the newest first, where not all tokens fit
        length = len((line.get("tokens") or {}).get("text", ()))
        kept = line if length <= room else {name: value for name, value in line.items() if name != "tokens"}
        room -= length if length <= room else 0
        found.append(kept | {"verdict": _verdict(line)})
    return tuple(reversed(found)), count


def _verdict(line: dict[str, Any]) -> str | None:
    """As the run saw it; of older runs as far as the text says it."""
    if "verdict" in line:
        return line["verdict"]
    if line.get("answer") is None:
        return None
    from lit_opd.evaluation.grading import quick_outcome  # seconds, and new runs do not need it

    outcome = quick_outcome(line.get("response") or "", line["answer"])
    return None if outcome is None else str(outcome)


def finite(values: Iterable[float | None]) -> list[float]:
    """Those that are finite numbers."""
    return [value for value in values if value is not None and math.isfinite(value)]


def mean(values: Sequence[float | None]) -> float | None:
    """Of the finite ones, None without any."""
    known = finite(values)
    return sum(known) / len(known) if known else None
