"""One picture for README and the page: a panel a condition, a row a variant, area less uniform's with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from benchmarks.studies.figures import draw_estimate, far_of, limit, plt, save
from benchmarks.studies.leaderboard.board import Board, Condition
from benchmarks.studies.reproduce.plan import REFERENCE
from lit_opd.compare.pictures import plain

ABREAST = 3  # panels side by side: six would be too small to read on a page
TICKS = 4
LETTERS = 13  # of a title, an inch


def draw_board(board: Board, order: Sequence[str], path: Path) -> None:
    """Write the picture.

    Args:
        board: at least one condition.
        order: variants from the top.
        path: PNG to write.
    """
    conditions = board.conditions
    columns, lines = min(ABREAST, len(conditions)), ceil(len(conditions) / ABREAST)
    size = (2.3 + 2.4 * columns, 0.9 + lines * (0.9 + 0.25 * len(order)))
    figure, grid = plt.subplots(lines, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    panels = list(grid.flat)
    for axis, condition in zip(panels, conditions, strict=False):
        _draw_condition(axis, condition, order)
    for axis in panels[len(conditions) :]:
        axis.set_visible(False)
    panels[0].set_yticks(range(len(order)), _labels(board, order))
    panels[0].set_ylim(len(order) - 0.5, -0.5)
    title = f"area minus that of {REFERENCE}: mean, 95 % interval over seeds and problems"
    title += "; beside a name, its mean rank" if board.overall else ""
    figure.suptitle(fill(title, int(LETTERS * size[0])), fontsize=10)
    save(figure, path)


def _draw_condition(axis: Axes, condition: Condition, order: Sequence[str]) -> None:
    """A row a variant; uniform is the line at 0; what has not run stays empty."""
    rows = {place: row for place, name in enumerate(order) if (row := condition.row(name)) is not None}
    known = [row.minus for row in rows.values() if row.minus is not None]
    far = far_of([each.mean for each in known])
    for place, row in rows.items():
        if row.minus is not None:
            draw_estimate(axis, place, row.minus, far=far)
        elif row.variant == REFERENCE:
            axis.plot([0], [place], "|", color="0.4", ms=9, mew=2)
    axis.axvline(0, color="0.4", lw=0.8)
    axis.set_title(condition.name, fontsize=10)
    axis.set_xlabel("difference in accuracy (right is better)", fontsize=8)
    axis.grid(axis="y", color="0.93")
    axis.xaxis.set_major_locator(MaxNLocator(TICKS))
    axis.tick_params(labelsize=8)
    limit(axis, known, far)


def _labels(board: Board, order: Sequence[str]) -> list[str]:
    """Names with their mean rank, added ones marked."""
    mean = board.overall.mean if board.overall else {}
    added = {row.variant for condition in board.conditions for row in condition.rows if row.added}
    names = [f"+ {plain(name)}" if name in added else plain(name) for name in order]
    return [
        f"{shown}  {mean[name].mean:.1f}" if name in mean else shown for shown, name in zip(names, order, strict=True)
    ]
