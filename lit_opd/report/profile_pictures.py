"""The position profile as PNG files: now against the start, and heat maps that grow with training; of conversations by turn too.

Drawn on matplotlib's Agg canvas without pyplot, so a user's own backend and figures stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lit_opd.files import whole_file
from lit_opd.report.profile import FEW_ALIVE, BinnedProfile, ProfileWindow, last_said, with_shares
from lit_opd.report.profile_heat_maps import AXIS_LABELS, HEAT_AXES, blank_figure, heat_map
from lit_opd.report.profile_history import ProfileHistory

DPI = 110
NOW, START, SECOND, SECOND_START = "#1f5fa8", "#9db8d6", "#c2571a", "#e8b899"
WIDTH, ROW_HEIGHT, MOST_IN_A_ROW = 14.0, 2.9, 4  # inches, inches, panels
LEGEND_BELOW = -0.24  # of the panel's height: under the axis label
TEACHER_STUDENT = "q, s: log-probs of teacher and student"
NOTATION = "q, s: log-probs that teacher and student give a sampled token; A: its advantage; w: its weight"
FEW_COLOR = "#ebebeb"
NUM_TICKS, MOST_TURN_TICKS = 5, 12
BY = {
    "absolute": "absolute position",
    "relative": "relative position",
    "in_turn": "position in the turn",
    "by_turn": "turn",
}
PICTURES = {  # file by axis
    "absolute": "profile_by_absolute_position", "relative": "profile_by_relative_position",
    "in_turn": "profile_by_position_in_turn", "by_turn": "profile_by_turn",
}  # fmt: skip
ALIVE = {"absolute": "responses", "in_turn": "turns"}  # what may have ended before a position


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
    Panel("who is still writing", "% of {alive}", {"survivor_fraction": "alive"}, 100.0),
    Panel("sampled tokens", "% of all, {per}", {"token_share": "share"}, 100.0),
    Panel("disagreement |q - s|", "nats/token", {"disagreement": "mean"}),
    Panel("advantage A (what the loss reads)", "nats/token", {"advantage": "mean"}, of_advantage=True),
    Panel("KL(student || teacher)", "nats/token", {"kl_k1": "k1 = s - q", "kl_k3": "k3"}),
    Panel("drift: |q - s| summed before", "nats", {"drift": "mean"}),
    Panel("weight w (0 where dropped)", "weight; 1 is uniform", {"weight": "mean"}, reference=1.0),
    Panel(
        "share of the gradient", "% of the sum of |w A|, {per}", {"gradient_share": "share"}, 100.0, of_advantage=True
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
    axes = [axis for axis in PICTURES if getattr(now, axis) is not None and getattr(start, axis) is not None]
    figures = {PICTURES[axis]: profile_figure(now, start, axis, reads_advantage=reads_advantage) for axis in axes}
    for ending, pair in HEAT_AXES.items():
        if history.has(pair):
            figures |= {
                f"heatmap_disagreement{ending}": heat_map(
                    history, "disagreement", f"disagreement |q - s| ({TEACHER_STUDENT})", "nats/token", pair
                ),
                f"heatmap_weight{ending}": heat_map(history, "weight", "weight", "mean weight (0 where dropped)", pair),
            }
    return {name: _save(figure, folder / f"{name}.png") for name, figure in figures.items()}


def _save(figure: Figure, path: Path) -> Path:
    with whole_file(path) as draft:
        figure.savefig(draft, format="png", dpi=DPI)
    return path


# -- now against the start ---------------------------------------------------------------------------------------------


def profile_figure(now: ProfileWindow, start: ProfileWindow, axis: str, *, reads_advantage: bool = True) -> Figure:
    """A panel a quantity that was measured: this window (solid) and the first one (pale, dashed)."""
    now, start = with_shares(now), with_shares(start)
    shown = [
        panel for panel in PANELS if _measured(panel, now, start, axis) and (reads_advantage or not panel.of_advantage)
    ]
    rows = _rows_of(len(shown))
    figure = blank_figure(WIDTH, ROW_HEIGHT * len(rows) + 1.1)
    grid = figure.add_gridspec(len(rows), lcm(*rows))
    places = [(row, column, count) for row, count in enumerate(rows) for column in range(count)]
    for (row, column, count), panel in zip(places, shown, strict=True):
        wide = grid.ncols // count
        axes = figure.add_subplot(grid[row, column * wide : (column + 1) * wide])
        _draw_panel(axes, panel, now, start, axis)
        _label(axes, title=panel.title, x=AXIS_LABELS[axis], y=_unit(panel, axis))
    what = f"{now.rows} responses, {now.tokens:,} tokens"
    figure.suptitle(f"Profile by {BY[axis]}: {_span(now)} ({what}) against {_span(start)}\n{NOTATION}", fontsize=11)
    handles = [Line2D([], [], color=NOW, lw=1.8), Line2D([], [], color=START, lw=1.8, ls="--")]
    labels = [_span(now), _span(start)]
    if axis in ALIVE:
        handles.append(Patch(color=FEW_COLOR))  # type: ignore[arg-type]
        labels.append(f"fewer than {FEW_ALIVE:.0%} of the {ALIVE[axis]} alive: means of few tokens, not drawn")
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    return figure


def _unit(panel: Panel, axis: str) -> str:
    return panel.unit.format(alive=ALIVE.get(axis), per="per turn" if axis == "by_turn" else "per bin")


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
    present = [name for name in panel.quantities if any(name in getattr(w, axis).values for w in (now, start))]
    heights = [panel.reference]
    axes.axhline(panel.reference, color="0.6", lw=0.8)
    for name, colors in zip(present, ((NOW, START), (SECOND, SECOND_START)), strict=False):
        for window, color, style in ((start, colors[1], "--"), (now, colors[0], "-")):
            x, y = _line(getattr(window, axis), name, panel.scale, axis)
            solid = _well_counted(window, axis)
            label = panel.quantities[name] if window is now else None
            everything = name == "survivor_fraction"
            look = {"color": color, "lw": 1.8, "label": label, "marker": "o" if axis == "by_turn" else None}
            axes.plot(x, y if everything else np.where(solid, y, np.nan), style, **look)
            heights += [height for height in y[solid] if np.isfinite(height)]
    if axis in ALIVE:
        _shade_few_alive(axes, now, start, axis)
        if now.scale == "log":
            axes.set_xscale("log")
    _set_limits(axes, min(heights), max(heights))
    axes.locator_params(axis="y", nbins=NUM_TICKS)  # text is most of the time that drawing takes
    if axis == "by_turn":
        _set_turns(axes, now, start)
    elif axes.get_xscale() == "linear":
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
    """bool [bins], True where at least a tenth of the responses, or of the turns, are alive."""
    binned: BinnedProfile = getattr(window, axis)
    if axis not in ALIVE:
        return np.ones(len(binned.start), dtype=bool)
    return np.array([value is not None and value >= FEW_ALIVE for value in binned.values["survivor_fraction"]])


def _shade_few_alive(axes: Any, window: ProfileWindow, start: ProfileWindow, axis: str) -> None:
    """Grey after the position from which fewer than a tenth of the responses, or of the turns, go on."""
    binned: BinnedProfile = getattr(window, axis)
    few = np.flatnonzero(~_well_counted(window, axis))
    last = len(binned.end) - 1 if axis == "absolute" else last_said((window, start), axis)
    right = binned.end[last] + 0.5
    if len(few) and few[0] <= last:
        axes.axvspan(binned.start[few[0]] - 0.5, right, color=FEW_COLOR, zorder=0, lw=0)
    axes.set_xlim(0.5, right)


def _set_turns(axes: Any, now: ProfileWindow, start: ProfileWindow) -> None:
    """Whole numbers on the axis, up to the last turn that was said."""
    turns = last_said((now, start), "by_turn") + 1
    axes.set_xlim(0.5, turns + 0.5)
    axes.set_xticks(range(1, turns + 1, -(-turns // MOST_TURN_TICKS)))
