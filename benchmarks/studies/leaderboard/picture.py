"""One picture for README and the page: a panel a condition, a row a variant, area less uniform's with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from benchmarks.studies.figures import plt, save
from benchmarks.studies.leaderboard.board import Board, Row
from benchmarks.studies.reproduce.plan import REFERENCE
from lit_opd.compare.document import show
from lit_opd.compare.pictures import plain

ABOVE, BELOW, UNDECIDED = "#1f5fa8", "#c4500c", "0.45"
TICKS = 4
LETTERS = 12  # of a title, an inch
BEYOND = 1.15  # of half the median interval, beside the farthest mean
FAR, NEAR = 6.0, 0.02  # a difference above FAR times the median one and NEAR is written, not drawn


def draw_board(board: Board, order: Sequence[str], path: Path) -> None:
    """Write the picture.

    Args:
        board: at least one condition.
        order: variants from the top.
        path: PNG to write.
    """
    conditions = board.conditions
    size = (2.1 + 2.1 * len(conditions), 1.2 + 0.27 * len(order))
    figure, grid = plt.subplots(1, len(conditions), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, condition in zip(grid[0], conditions, strict=True):
        rows = [condition.row(name) for name in order]
        known = [row for row in rows if row is not None]
        far = _far(known)
        for place, row in enumerate(rows):
            _draw_row(axis, place, row, far)
        axis.axvline(0, color="0.4", lw=0.8)
        axis.set_title(condition.name, fontsize=10)
        axis.grid(axis="y", color="0.93")
        axis.xaxis.set_major_locator(MaxNLocator(TICKS))
        axis.tick_params(labelsize=8)
        _limit(axis, known, far)
    overall = board.overall.mean if board.overall else {}
    added = {row.variant for condition in conditions for row in condition.rows if row.added}
    names = [f"+ {plain(name)}" if name in added else plain(name) for name in order]
    labels = [
        f"{shown}  {overall[name].mean:.1f}" if name in overall else shown
        for shown, name in zip(names, order, strict=True)
    ]
    grid[0][0].set_yticks(range(len(order)), labels)
    grid[0][0].set_ylim(len(order) - 0.5, -0.5)
    by = "behind a name its mean rank" if overall else "by rank in the first condition"
    title = f"area under greedy accuracy minus that of {REFERENCE}, 95 % over seeds and problems; {by}"
    figure.suptitle(fill(title, int(LETTERS * size[0])), fontsize=10)
    save(figure, path)


def _draw_row(axis: Axes, place: int, row: Row | None, far: float) -> None:
    """A dot on its interval, or where it is too far out its value; uniform is the line at 0; what has not run stays empty."""
    if row is None or row.minus is None:
        return
    found = row.minus
    color = UNDECIDED if not found.excludes_zero else ABOVE if found.mean > 0 else BELOW
    if abs(found.mean) > far:
        right = found.mean > 0
        where = axis.get_yaxis_transform()  # x of the panel, y of the data
        value = show(found, 2, signed=True)
        text, side = (f"{value} \u25b8", "right") if right else (f"\u25c2 {value}", "left")
        axis.text(0.98 if right else 0.02, place, text, transform=where, ha=side, va="center", fontsize=8, color=color)
        return
    if found.low is not None and found.high is not None:
        axis.plot([found.low, found.high], [place, place], color=color, lw=1.8)
    axis.plot([found.mean], [place], "o", color=color, ms=4, mfc=color if found.low is not None else "white")


def _far(rows: Sequence[Row]) -> float:
    """Beyond it a difference would squeeze all others together."""
    return FAR * float(np.median([abs(row.minus.mean) for row in rows if row.minus is not None] or [0.0])) + NEAR


def _limit(axis: Axes, rows: Sequence[Row], far: float) -> None:
    """By the means, with room for their intervals: one of two seeds may be ten times as wide as all else."""
    known = [row.minus for row in rows if row.minus is not None and abs(row.minus.mean) <= far]
    means = [0.0, *(found.mean for found in known)]
    widths = sorted(found.high - found.low for found in known if found.low is not None and found.high is not None)
    margin = (widths[len(widths) // 2] if widths else NEAR) * BEYOND / 2 + NEAR / 10
    axis.set_xlim(min(means) - margin, max(means) + margin)
