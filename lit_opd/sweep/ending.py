"""The comparison at the end of a sweep: the document of ``compare runs``, and a table that fits a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from lit_opd.compare import RunsComparison, compare_runs, read_run, runs_document, show
from lit_opd.compare.document import NAME
from lit_opd.sweep.checks import SweepRun

FOLDER = "compare"
SHOWN = {"greedy": "greedy accuracy", "avg_at_4": "avg@4", "reverse_kl": "reverse KL, nats/token"}
COLUMNS = 2  # metrics in the table
WIDTHS = (24, 6, 25, 24)  # 79 columns
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
    """Lines of at most 80 columns: ends of each variant, below them its difference from the baseline."""
    metrics = [name for name in SHOWN if any((name, variant, "end") in found.cells for variant in found.variants)]
    metrics = [name for name in metrics if name != "avg_at_4" or "greedy" not in metrics][:COLUMNS]
    if not metrics:
        yield "nothing was measured: no run has a validation (data.val, data.val_fraction)"
        return
    yield _line("", "runs", *(SHOWN[name] for name in metrics))
    for variant, runs in found.variants.items():
        cells = [found.cells.get((name, variant, "end")) for name in metrics]
        *above, last = textwrap.wrap(variant, WIDTHS[0] - 1) or [""]
        yield from above
        yield _line(last, str(len(runs)), *(show(None if cell is None else cell.mean) for cell in cells))
        if variant != found.baseline:
            gaps = [None if cell is None else cell.difference for cell in cells]
            stars = [" *" if gap is not None and gap.excludes_zero else "" for gap in gaps]
            shown = [f"{show(gap, signed=True)}{star}" for gap, star in zip(gaps, stars, strict=True)]
            yield _line("  difference", "", *shown)
    if len(found.variants) > 1:
        yield f"differences from {found.baseline}, paired by seed"
    yield HOW


def _line(*cells: str) -> str:
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=False)).rstrip()
