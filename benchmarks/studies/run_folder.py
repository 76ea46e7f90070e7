"""What the studies read from a run's folder and write into it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_opd.files import replace_whole

BANDS = [f"val/disagreement/band_{start:02d}" for start in range(0, 100, 10)]
Curve = list[tuple[int, float]]  # (step, value)


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: Iterable[dict[str, str]], name: str) -> Curve:
    """One column, where it has a value."""
    return [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]


def curve(run: Path, name: str) -> Curve:
    """One column of metrics.csv."""
    return column(metrics(run), name)


def finite(points: Iterable[tuple[int, float]]) -> Curve:
    """The points with a value: a skipped step logs NaN.

    >>> finite([(1, 0.5), (2, math.nan)])
    [(1, 0.5)]
    """
    return [(step, value) for step, value in points if math.isfinite(value)]


def skipped(*columns: Curve) -> dict[str, int]:
    """What a record says beside means that leave skipped steps out: how many steps there were; nothing where there were none.

    >>> skipped([(1, 0.5), (2, math.nan)], [(2, math.nan)]), skipped([(1, 0.5)])
    ({'skipped_steps': 1}, {})
    """
    steps = {step for points in columns for step, value in points if not math.isfinite(value)}
    return {"skipped_steps": len(steps)} if steps else {}


def summary(run: Path) -> dict[str, Any]:
    """What a run writes last."""
    return dict(json.loads((run / "summary.json").read_text()))


def write_record(path: Path, record: dict[str, Any]) -> None:
    """A finished run's figures as JSON, whole or not at all: the file is what says that it is finished."""
    replace_whole(path, (json.dumps(record, allow_nan=False) + "\n").encode())
