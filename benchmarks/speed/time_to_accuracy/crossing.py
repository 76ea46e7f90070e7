"""When a curve first reaches its target, and what several runs say of it together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from lit_opd.compare.document import markdown_table
from lit_opd.compare.statistics import reached

TARGET = 0.80
MEASURES = ("cpu", "wall", "steps", "tokens")
PARTS = ("generate", "teacher", "rest")
THOUSAND = 1000
UNIT = 128  # responses that costs are given for: the quickstart's batch


def crossing(xs: Sequence[float], accuracies: Sequence[float], target: float = TARGET) -> float:
    """Where the curve first is at the target, linear between its points; inf where no point reaches it.

    >>> crossing([0, 10, 20], [0.5, 0.75, 0.85])
    15.0
    """
    found = reached(xs, accuracies, target, rising=True)
    return math.inf if found is None else found


def crossings(marks: Sequence[dict[str, float]], start: float) -> dict[str, float]:
    """Of every measure, from the marks of one run and the accuracy before training."""
    accuracies = [start, *(mark["accuracy"] for mark in marks)]
    return {name: crossing([0.0, *(mark[name] for mark in marks)], accuracies) for name in MEASURES}


def summary(runs: Sequence[dict[str, Any]], start: float) -> dict[str, Any]:
    """Median, lowest and highest of every measure over the runs of one setting; inf where a run did not get there."""
    found = [crossings(run["marks"], start) for run in runs]
    values = {name: [crossed[name] for crossed in found] for name in MEASURES}
    ends = [run["marks"][-1] for run in runs]
    units = [end["responses"] / UNIT for end in ends]
    parted = all("parts" in run for run in runs)
    return {
        **{name: {"median": median(of), "lowest": min(of), "highest": max(of)} for name, of in values.items()},
        "runs": len(runs),
        "reached": sum(value < math.inf for value in values["cpu"]),
        "responses": max(end["responses"] for end in ends),
        "cpu_per_unit": median(end["cpu"] / unit for end, unit in zip(ends, units, strict=True)),
        "parts": {
            name: median(run["parts"][name] / unit for run, unit in zip(runs, units, strict=True)) for name in PARTS
        }
        if parted
        else None,
    }


def table(summaries: dict[str, dict[str, Any]], references: Sequence[str]) -> str:
    """Markdown: a row a setting, a last column a reference: its median CPU seconds over the row's."""
    present = [name for name in references if name in summaries]
    heads = ["setting", f"CPU s to {TARGET:.2f}, median (range)", "optimizer steps", "sampled tokens, thousand"]
    heads += [f"CPU s for {UNIT} responses", "of it sampling, teacher, rest", *(f"{name} / this" for name in present)]
    rows = []
    for name, row in summaries.items():
        cells = [name, seconds(row), shown(row["steps"]["median"]), shown(row["tokens"]["median"] / THOUSAND)]
        parts = row["parts"]
        cells += [f"{row['cpu_per_unit']:.2f}", " ".join(f"{parts[p]:.2f}" for p in PARTS) if parts else ""]
        cells += [ratio(summaries[reference], row) for reference in present]
        rows.append(cells)
    return markdown_table(heads, rows) + "\n"


def seconds(row: dict[str, Any]) -> str:
    """CPU seconds of a row, or how many of its runs got there."""
    missing = row["runs"] - row["reached"]
    if row["reached"] == 0:
        return f"never in {row['responses']} responses"
    low, high = row["cpu"]["lowest"], row["cpu"]["highest"]
    note = f"; {missing} of {row['runs']} runs never" if missing else ""
    return f"{shown(row['cpu']['median'])} ({shown(low)} to {shown(high)}{note})"


def shown(value: float) -> str:
    """A number, or that it was never reached.

    >>> shown(12.34), shown(math.inf)
    ('12.3', 'never')
    """
    return "never" if math.isinf(value) else f"{value:.1f}"


def ratio(reference: dict[str, Any], row: dict[str, Any]) -> str:
    """Of the median CPU seconds; empty in the reference's own row and where either never got there."""
    over, under = reference["cpu"]["median"], row["cpu"]["median"]
    return "" if reference is row or math.isinf(over) or math.isinf(under) else f"{over / under:.2f}"
