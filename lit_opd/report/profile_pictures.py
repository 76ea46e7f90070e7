"""The position profile as PNG files: now against the start, and heat maps that grow with training.

Drawn on matplotlib's Agg canvas without pyplot, so a user's own backend and figures stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lit_opd.files import whole_file
from lit_opd.report.profile import BinnedProfile, ProfileWindow
from lit_opd.report.profile_history import ProfileHistory

DPI = 110
NOW, START, SECOND, SECOND_START = "#1f5fa8", "#9db8d6", "#c2571a", "#e8b899"
WIDTH, ROW_HEIGHT, MOST_IN_A_ROW = 14.0, 2.9, 4  # inches, inches, panels
LEGEND_BELOW = -0.24  # of the panel's height: under the axis label
TEACHER_STUDENT = "q, s: log-probs of teacher and student"
NOTATION = "q, s: log-probs that teacher and student give a sampled token; A: its advantage; w: its weight"
FEW_ALIVE = 0.1  # of the responses: behind this position a mean rests on few of them
NO_DATA, FEW_COLOR = "#d9d9d9", "#ebebeb"
NUM_TICKS = 5
MAX_COLUMNS = 600  # of a heat map; more windows are averaged in groups
PALE = ListedColormap([(1.0, 1.0, 1.0, 0.6)])
AXIS_LABELS = {"absolute": "position in the response, tokens", "relative": "position in the response, % of its length"}


@dataclass(frozen=True)
class Panel:
    """One small plot: up to two quantities on one scale.

    Args:
        title: what is shown.
        unit: label of the vertical axis.
        quantities: name -> legend entry.
        scale: factor from the stored value to the unit.
        reference: height of a thin line to compare with; 0 is also where the vertical axis starts where nothing is below.
        zero_is_nothing: where every value is 0 there is nothing to show.
        of_advantage: it shows the advantage, which some objectives do not read.
    """

    title: str
    unit: str
    quantities: dict[str, str]
    scale: float = 1.0
    reference: float = 0.0
    zero_is_nothing: bool = False
    of_advantage: bool = False


PANELS = (
    Panel("who is still writing", "% of responses", {"survivor_fraction": "alive"}, 100.0),
    Panel("disagreement |q - s|", "nats/token", {"disagreement": "mean"}),
    Panel("advantage A (what the loss reads)", "nats/token", {"advantage": "mean"}, of_advantage=True),
    Panel("KL(student || teacher)", "nats/token", {"kl_k1": "k1 = s - q", "kl_k3": "k3"}),
    Panel("drift: |q - s| summed before", "nats", {"drift": "mean"}),
    Panel("weight w (0 where dropped)", "weight; 1 is uniform", {"weight": "mean"}, reference=1.0),
    Panel(
        "share of the gradient", "% of the sum of |w A|, per bin", {"gradient_share": "share"}, 100.0, of_advantage=True
    ),
    Panel("entropy", "nats", {"student_entropy": "student", "teacher_entropy": "teacher"}),
    Panel(
        "lists of likely tokens",
        "%",
        {"list_overlap": "in both lists", "list_teacher_mass": "teacher's mass on the student's"},
        100.0,
    ),
    Panel("A on tokens in both lists", "nats", {"list_advantage": "mean under the student"}),
    Panel(
        "truncated, clipped",
        "% of tokens",
        {"truncated_fraction": "in responses cut short", "clip_fraction": "gradient clipped"},
        100.0,
        zero_is_nothing=True,
    ),
)


def draw_all(
    history: ProfileHistory, *, now: ProfileWindow, start: ProfileWindow, folder: Path, reads_advantage: bool = True
) -> dict[str, Path]:
    """Write every picture; returns name -> file.

    Args:
        history: every window.
        now: the last one.
        start: the first one.
        folder: where to.
        reads_advantage: whether the run's objective does; else what shows the advantage is left out.
    """
    figures = {
        "profile_by_absolute_position": profile_figure(now, start, "absolute", reads_advantage=reads_advantage),
        "profile_by_relative_position": profile_figure(now, start, "relative", reads_advantage=reads_advantage),
        "heatmap_disagreement": heat_map(
            history, "disagreement", f"disagreement |q - s| ({TEACHER_STUDENT})", "nats/token"
        ),
        "heatmap_weight": heat_map(history, "weight", "weight", "mean weight (0 where dropped)"),
    }
    return {name: _save(figure, folder / f"{name}.png") for name, figure in figures.items()}


def _save(figure: Figure, path: Path) -> Path:
    with whole_file(path) as draft:
        figure.savefig(draft, format="png", dpi=DPI)
    return path


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# -- now against the start ---------------------------------------------------------------------------------------------


def profile_figure(now: ProfileWindow, start: ProfileWindow, axis: str, *, reads_advantage: bool = True) -> Figure:
    """A panel a quantity that was measured: this window (solid) and the first one (pale, dashed)."""
    shown = [
        panel for panel in PANELS if _measured(panel, now, start, axis) and (reads_advantage or not panel.of_advantage)
    ]
    rows = _rows_of(len(shown))
    figure = _figure(WIDTH, ROW_HEIGHT * len(rows) + 1.1)
    grid = figure.add_gridspec(len(rows), lcm(*rows))
    places = [(row, column, count) for row, count in enumerate(rows) for column in range(count)]
    for (row, column, count), panel in zip(places, shown, strict=True):
        wide = grid.ncols // count
        axes = figure.add_subplot(grid[row, column * wide : (column + 1) * wide])
        _draw_panel(axes, panel, now, start, axis)
        _label(axes, title=panel.title, x=AXIS_LABELS[axis], y=panel.unit)
    what = f"{now.rows} responses, {now.tokens:,} tokens"
    figure.suptitle(
        f"Profile by {axis} position: {_span(now)} ({what}) against {_span(start)}\n{NOTATION}", fontsize=11
    )
    handles = [Line2D([], [], color=NOW, lw=1.8), Line2D([], [], color=START, lw=1.8, ls="--")]
    labels = [_span(now), _span(start)]
    if axis == "absolute":
        handles.append(Patch(color=FEW_COLOR))  # type: ignore[arg-type]
        labels.append(f"fewer than {FEW_ALIVE:.0%} of the responses alive: means of few tokens, not drawn")
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    return figure


def _measured(panel: Panel, now: ProfileWindow, start: ProfileWindow, axis: str) -> bool:
    """Whether there is anything to draw, now or at the start."""
    columns = [getattr(window, axis).values.get(name, ()) for window in (now, start) for name in panel.quantities]
    values = [value for column in columns for value in column if value is not None]
    return any(values) if panel.zero_is_nothing else bool(values)


def _rows_of(count: int) -> list[int]:
    """Panels in each row, so that no cell stays empty: at most ``MOST_IN_A_ROW``, the fuller rows first.

    >>> _rows_of(7), _rows_of(8), _rows_of(9), _rows_of(1)
    ([4, 3], [4, 4], [3, 3, 3], [1])
    """
    rows = max(1, -(-count // MOST_IN_A_ROW))
    return [count // rows + (row < count % rows) for row in range(rows)]


def _span(window: ProfileWindow) -> str:
    """The optimizer steps of a window in words."""
    first = window.previous_step + 1
    return f"step {window.step}" if first == window.step else f"steps {first} to {window.step}"


def _draw_panel(axes: Any, panel: Panel, now: ProfileWindow, start: ProfileWindow, axis: str) -> None:
    present = [name for name in panel.quantities if name in getattr(now, axis).values]
    heights = [panel.reference]
    axes.axhline(panel.reference, color="0.6", lw=0.8)
    for name, colors in zip(present, ((NOW, START), (SECOND, SECOND_START)), strict=False):
        for window, color, style in ((start, colors[1], "--"), (now, colors[0], "-")):
            x, y = _line(getattr(window, axis), name, panel.scale, axis)
            solid = _well_counted(window, axis)
            label = panel.quantities[name] if window is now else None
            everything = name == "survivor_fraction"
            axes.plot(x, y if everything else np.where(solid, y, np.nan), style, color=color, lw=1.8, label=label)
            heights += [height for height in y[solid] if np.isfinite(height)]
    if axis == "absolute":
        _shade_few_alive(axes, now)
        if now.scale == "log":
            axes.set_xscale("log")
    _set_limits(axes, min(heights), max(heights))
    axes.locator_params(axis="y", nbins=NUM_TICKS)  # text is most of the time that drawing takes
    if axes.get_xscale() == "linear":
        axes.locator_params(axis="x", nbins=NUM_TICKS)
    if len(present) > 1:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, LEGEND_BELOW), "ncols": len(present)}
        axes.legend(fontsize=8, frameon=False, **below)


def _set_limits(axes: Any, low: float, high: float) -> None:
    """Room on both sides, and none below a lowest value of 0."""
    room = 0.08 * (high - low) if high > low else 1.0
    axes.set_ylim(low - room if low < 0 else max(low - room, 0.0), high + room)


def _label(axes: Any, *, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=8)


def _line(binned: BinnedProfile, name: str, scale: float, axis: str) -> tuple[Any, Any]:
    """Bin centres and values; NaN breaks the line where nothing was counted."""
    values = binned.values.get(name, (None,) * len(binned.start))
    centres = np.array(binned.centres) * (100.0 if axis == "relative" else 1.0)
    return centres, scale * np.array([np.nan if value is None else value for value in values])


def _well_counted(window: ProfileWindow, axis: str) -> Any:
    """bool [bins], True where at least a tenth of the responses are alive."""
    if axis == "relative":
        return np.ones(len(window.relative.start), dtype=bool)
    return np.array([value is not None and value >= FEW_ALIVE for value in window.absolute.values["survivor_fraction"]])


def _shade_few_alive(axes: Any, window: ProfileWindow) -> None:
    """Grey behind the position from which fewer than a tenth of the responses go on."""
    few = np.flatnonzero(~_well_counted(window, "absolute"))
    right = window.absolute.end[-1] + 0.5
    if len(few):
        axes.axvspan(window.absolute.start[few[0]] - 0.5, right, color=FEW_COLOR, zorder=0, lw=0)
    axes.set_xlim(0.5, right)


# -- heat maps ---------------------------------------------------------------------------------------------------------


def heat_map(history: ProfileHistory, name: str, title: str, unit: str) -> Figure:
    """Step by position, absolute on the left with the survivors drawn in, relative on the right."""
    figure = _figure(12.0, 4.4)
    pair = figure.subplots(1, 2)
    steps = history.step_edges(MAX_COLUMNS)
    tables = {axis: history.table(axis, name, MAX_COLUMNS) for axis in ("absolute", "relative")}
    low, high = _limits(list(tables.values()), from_zero=name == "disagreement")
    for axes, (axis, table) in zip(pair, tables.items(), strict=True):
        edges = history.edges(axis) * (100.0 if axis == "relative" else 1.0)
        axes.set_facecolor(NO_DATA)
        mesh = axes.pcolormesh(steps, edges, np.ma.masked_invalid(table.T), vmin=low, vmax=high, cmap="viridis")
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.set_ylabel(AXIS_LABELS[axis], fontsize=9)
        axes.set_title(f"by {axis} position", fontsize=10)
    if history.scale == "log":
        pair[0].set_yscale("log")
    _draw_survivors(pair[0], history, steps)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.suptitle(
        f"{title} by step and position; grey: no tokens, pale: fewer than {FEW_ALIVE:.0%} alive", fontsize=11
    )
    figure.colorbar(mesh, ax=list(pair), label=unit, extend="max" if name == "disagreement" else "neither")
    return figure


def _limits(tables: Sequence[Any], *, from_zero: bool) -> tuple[float, float]:
    """Colour range: 0 to the 99th percentile, or everything; never empty."""
    seen = np.concatenate([table[np.isfinite(table)] for table in tables])
    if not seen.size:
        return 0.0, 1.0
    low, high = (0.0, float(np.percentile(seen, 99))) if from_zero else (float(seen.min()), float(seen.max()))
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
