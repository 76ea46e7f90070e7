"""Heat maps of the position profile: optimizer step by position, or by position in the turn and turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from lit_opd.report.profile import FEW_ALIVE, TURN_AXES
from lit_opd.report.profile_history import COUNT, ProfileHistory

NO_DATA = "#d9d9d9"
MOST_TICKS, PERCENTILE = 12, 99
MAX_COLUMNS = 600  # of a heat map; more windows are averaged in groups
PALE = ListedColormap([(1.0, 1.0, 1.0, 0.6)])
AXIS_LABELS = {
    "absolute": "position in the response, tokens", "relative": "position in the response, % of its length",
    "in_turn": "position in the turn, tokens", "by_turn": "turn",
}  # fmt: skip
TITLES = {
    "absolute": "by absolute position",
    "relative": "by relative position",
    "in_turn": "by position in the turn",
    "by_turn": "by turn",
}
HEAT_AXES = {
    "": ("absolute", "relative"),
    "_by_turn": ("in_turn", "by_turn"),
}  # pairs by the ending of their file's name


def blank_figure(width: float, height: float) -> Figure:
    """Of so many inches, on a canvas of its own."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def heat_map(
    history: ProfileHistory, name: str, title: str, unit: str, axes_shown: Sequence[str] = HEAT_AXES[""]
) -> Figure:
    """Step by position: absolute on the left with the survivors drawn in, relative on the right; or the axes of conversations."""
    figure = blank_figure(12.0, 4.4)
    pair = figure.subplots(1, 2)
    steps = history.step_edges(MAX_COLUMNS)
    tables = {axis: history.table(axis, name, MAX_COLUMNS) for axis in axes_shown}
    turns = TURN_AXES[0] in tables
    counts = [history.table(axis, COUNT, MAX_COLUMNS) for axis in tables] if turns else None
    low, high = _limits(list(tables.values()), counts, from_zero=name == "disagreement")
    for axes, (axis, table) in zip(pair, tables.items(), strict=True):
        edges = history.edges(axis) * (100.0 if axis == "relative" else 1.0)
        axes.set_facecolor(NO_DATA)
        mesh = axes.pcolormesh(steps, edges, np.ma.masked_invalid(table.T), vmin=low, vmax=high, cmap="viridis")
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.set_ylabel(AXIS_LABELS[axis], fontsize=9)
        axes.set_title(TITLES[axis], fontsize=10)
        if turns:
            _cut_empty(axes, edges, table, whole=axis == "by_turn")
    if history.scale == "log":
        pair[0].set_yscale("log")
    where = "grey: no tokens"
    if "absolute" in axes_shown:
        _draw_survivors(pair[0], history, steps)
        figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
        where += f", pale: fewer than {FEW_ALIVE:.0%} alive"
    figure.suptitle(f"{title} by step and position; {where}", fontsize=11)
    figure.colorbar(mesh, ax=list(pair), label=unit, extend="max" if name == "disagreement" else "neither")
    return figure


def _cut_empty(axes: Any, edges: Any, table: Any, *, whole: bool) -> None:
    """Up to the last position or turn that was ever said; turns have whole numbers."""
    said = np.flatnonzero(np.isfinite(table).any(0))
    last = int(said[-1]) + 1 if len(said) else len(edges) - 1
    axes.set_ylim(edges[0], edges[last])
    if whole:
        axes.set_yticks(range(1, last + 1, -(-last // MOST_TICKS)))
    else:
        axes.locator_params(axis="y", integer=True)


def _limits(tables: Sequence[Any], counts: Sequence[Any] | None, *, from_zero: bool) -> tuple[float, float]:
    """Colour range, never empty: 0 to the 99th percentile, or everything. The percentile is of cells, or of tokens where their
    ``counts`` are given: a turn that one response got to does not set the range."""
    seen = np.concatenate([table[np.isfinite(table)] for table in tables])
    if not seen.size:
        return 0.0, 1.0
    low, high = float(seen.min()), float(seen.max())
    if from_zero:
        low, high = 0.0, float(np.percentile(seen, PERCENTILE))
        if counts is not None:
            tokens = np.concatenate([count[np.isfinite(table)] for count, table in zip(counts, tables, strict=True)])
            order = seen.argsort()
            reached = tokens[order].cumsum() / tokens.sum()
            high = float(seen[order][np.searchsorted(reached, PERCENTILE / 100)])
    return (low, high) if high - low > 1e-6 else (low - 0.5, high + 0.5)


def _draw_survivors(axes: Any, history: ProfileHistory, steps: Any) -> None:
    """Lines at the positions that a half and a tenth of the responses reach; what lies above the latter is paled."""
    alive = np.nan_to_num(history.table("absolute", "survivor_fraction", MAX_COLUMNS))
    edges = history.edges("absolute")
    axes.pcolormesh(
        steps, edges, np.ma.masked_where(alive.T >= FEW_ALIVE, np.zeros_like(alive.T)), cmap=PALE, vmin=0.0, vmax=1.0
    )
    reached = {share: np.append(edges[(alive >= share).sum(1)], np.nan) for share in (0.5, FEW_ALIVE)}
    for reach in reached.values():
        reach[-1] = reach[-2]
        axes.step(steps, reach, where="post", color="white", lw=3.0)
    for (share, reach), style in zip(reached.items(), ("-", ":"), strict=True):
        axes.step(steps, reach, style, where="post", color="black", lw=1.5, label=f"{share:.0%} of the responses alive")
    axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(edges[0], edges[-1])
