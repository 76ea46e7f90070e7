"""The comparison at the end of a sweep: the document of ``compare runs``, and a table that fits a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lit_opd.compare import RunsComparison, compare_runs, read_run, runs_document, show
from lit_opd.compare.document import NAME
from lit_opd.sweep.checks import SweepRun

FOLDER = "compare"
SHOWN = {"greedy": "greedy accuracy", "avg_at_4": "avg@4", "reverse_kl": "reverse KL, nats/token"}
COLUMNS = 2  # metrics in the table
WIDTHS = (22, 5, 27, 26)  # 80 columns; a starred difference has 25, or 26 with a KL of two digits
SCREEN = sum(WIDTHS)
LEFT_OUT = "..."
HOW = "end of training, mean over seeds [95 % interval]; * the interval leaves 0 out"


def compare(runs: Sequence[SweepRun], out: Path, baseline: str) -> str:
    """Write the comparison into ``out/compare``; the table for the terminal, with the page to open.

    Args:
        runs: finished ones.
        out: folder of the sweep.
        baseline: a variant of theirs.
    Raises:
        InputError: runs that cannot be compared.
    """
    found = compare_runs([read_run(run.folder, variant=run.variant.name) for run in runs], baseline=baseline)
    folder = out / FOLDER
    runs_document(found, folder).write(folder)
    return "\n".join([*table(found), f"open {folder / NAME}.html"])


def table(found: RunsComparison) -> Iterator[str]:
    """Lines of at most 80 columns: ends of each variant, below them its difference from the baseline; last, long names whole."""
    metrics = [name for name in SHOWN if any((name, variant, "end") in found.cells for variant in found.variants)]
    metrics = [name for name in metrics if name != "avg_at_4" or "greedy" not in metrics][:COLUMNS]
    if not metrics:
        yield "nothing was measured: no run has a validation (data.val, data.val_fraction)"
        return
    names = labels(found.variants, WIDTHS[0] - 1)
    yield _line("", "runs", *(SHOWN[name] for name in metrics))
    for variant, runs in found.variants.items():
        cells = [found.cells.get((name, variant, "end")) for name in metrics]
        yield _line(names[variant], str(len(runs)), *(show(None if cell is None else cell.mean) for cell in cells))
        if variant != found.baseline:
            gaps = [None if cell is None else cell.difference for cell in cells]
            stars = [" *" if gap is not None and gap.excludes_zero else "" for gap in gaps]
            shown = [f"{show(gap, signed=True)}{star}" for gap, star in zip(gaps, stars, strict=True)]
            yield _line("  difference", "", *shown)
    if len(found.variants) > 1:
        yield f"differences from {names[found.baseline]}, paired by seed"
    yield HOW
    for name, short in names.items():
        if short != name:
            yield from textwrap.wrap(f"{short} is {name}", SCREEN, subsequent_indent="    ")


def labels(names: Iterable[str], width: int) -> dict[str, str]:
    """Each name in at most ``width`` characters, no two alike: the middle of a long one is left out.

    >>> labels(["Uniform", "PrefixRatioTilt(alpha=1.0)", "PrefixRatioTilt(alpha=2.0)"], 16)
    {'Uniform': 'Uniform', 'PrefixRatioTilt(alpha=1.0)': 'PrefixR...a=1.0)', 'PrefixRatioTilt(alpha=2.0)': 'PrefixR...a=2.0)'}
    """
    every, found = list(names), dict[str, str]()
    taken = {name for name in every if len(name) <= width}
    for name in every:
        short, number = _shortened(name, width), 1
        while len(name) > width and short in taken:
            number += 1
            short = _shortened(name, width - len(f" #{number}")) + f" #{number}"
        found[name] = short
        taken.add(short)
    return found


def _shortened(name: str, width: int) -> str:
    if len(name) <= width:
        return name
    kept = width - len(LEFT_OUT)
    return f"{name[: kept - kept // 2]}{LEFT_OUT}{name[-(kept // 2) :]}"


def _line(*cells: str) -> str:
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=False)).rstrip()
