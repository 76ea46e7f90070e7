"""The pictures of a comparison, on matplotlib's Agg canvas without pyplot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lit_opd.compare.differences import RunsComparison
from lit_opd.compare.runs import Run
from lit_opd.compare.statistics import mean_interval
from lit_opd.files import whole_file

DPI = 110
WIDTH = 12.0  # inches
LEGEND_LETTERS = 150  # that fit beside each other
LEGEND_GAP = 8  # letters that a line's sample takes
POINTS = 101  # of a curve that is drawn through runs with differing evaluations
LABELS = {"greedy": "greedy accuracy", "avg_at_4": "avg@4", "reverse_kl": "KL(student || teacher), nats/token"}
AXIS_LABELS = {"steps": "optimizer steps", "tokens": "sampled tokens"}
COLORS = ("#1f5fa8", "#c2571a", "#2e8b57", "#8e44ad", "#b8860b", "#c0392b", "#16a2b8", "#6b6b6b")
STYLES = ("-", "--", ":", "-.")


def draw_curves(found: RunsComparison, metric: str, folder: Path) -> Path:
    """One metric over steps, and over tokens where they are known: means of each variant's runs with 95 % bands."""
    figure = _figure(WIDTH, 4.6)
    for place, axis in enumerate(found.axes_of(metric)):
        axes = figure.add_subplot(1, len(found.axes_of(metric)), place + 1)
        for number, (variant, runs) in enumerate(found.variants.items()):
            _draw_variant(axes, [run for run in runs if metric in run.curves], metric, axis, variant, number)
        if metric in found.targets:
            axes.axhline(found.targets[metric], color="0.5", lw=0.8, ls=":")
        _label(axes, x=AXIS_LABELS[axis], y=LABELS[metric])
    _shared_legend(figure)
    figure.suptitle(f"{LABELS[metric]}: mean over seeds, band: 95 % interval of the mean, dotted: target", fontsize=11)
    return _save(figure, folder / f"curve_{metric}.png")


def _draw_variant(axes: Any, runs: Sequence[Run], metric: str, axis: str, variant: str, number: int) -> None:
    if not runs:
        return
    curves = [run.curves[metric] for run in runs]
    end = min(curve.along(axis)[-1] for curve in curves)
    same = axis == "steps" and len({curve.steps for curve in curves}) == 1
    grid = np.array(curves[0].steps, dtype=float) if same else np.linspace(0.0, end, POINTS)
    table = np.stack([np.interp(grid, curve.along(axis), curve.values) for curve in curves])
    estimates = [mean_interval(column.tolist()) for column in table.T]
    color, style = _look(number)
    axes.plot(
        grid, [found.mean for found in estimates], style, color=color, lw=1.8, label=f"{variant} (n = {len(runs)})"
    )
    if len(runs) > 1:
        low, high = ([getattr(found, side) for found in estimates] for side in ("low", "high"))
        axes.fill_between(grid, low, high, color=color, alpha=0.15, lw=0)


def draw_weights(curves: Mapping[str, Sequence[float | None]], folder: Path) -> Path:
    """Mean weight by tenth of the response, a line a strategy."""
    figure = _figure(WIDTH, 4.6)
    axes = figure.add_subplot()
    axes.axhline(1.0, color="0.6", lw=0.8)
    for number, (name, values) in enumerate(curves.items()):
        color, style = _look(number)
        heights = [np.nan if value is None else value for value in values]
        centres = (np.arange(len(heights)) + 0.5) * 100.0 / len(heights)
        axes.plot(centres, heights, style, color=color, lw=1.8, marker="o", ms=3, label=name)
    _label(axes, x="position in the response, % of its length", y="mean weight (0 where dropped)")
    axes.set_ylim(bottom=0.0)
    _shared_legend(figure)
    return _save(figure, folder / "weights.png")


def draw_cosines(cosines: Mapping[str, Mapping[str, float | None]], folder: Path) -> Path:
    """Bars: each strategy's gradient against the references named in the inner mappings."""
    figure = _figure(WIDTH, 1.2 + 0.4 * len(cosines))
    axes = figure.add_subplot()
    references = list(next(iter(cosines.values())))
    height = 0.8 / len(references)
    for number, reference in enumerate(references):
        widths = [own[reference] or 0.0 for own in cosines.values()]
        places = np.arange(len(cosines)) + number * height
        axes.barh(places, widths, height, color=_look(number)[0], label=f"with {reference}")
    axes.set_yticks(np.arange(len(cosines)) + 0.4 - height / 2, list(cosines))
    axes.invert_yaxis()
    axes.axvline(0.0, color="0.3", lw=0.8)
    _label(axes, x="cosine of the gradients", y="")
    _shared_legend(figure)
    return _save(figure, folder / "cosines.png")


def _look(number: int) -> tuple[str, str]:
    """Colour and line style of the n-th line; thirty-two before one repeats."""
    return COLORS[number % len(COLORS)], STYLES[number // len(COLORS) % len(STYLES)]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _label(axes: Any, *, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)


def _shared_legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = max(1, LEGEND_LETTERS // (max(map(len, labels)) + LEGEND_GAP))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), columns), fontsize=9, frameon=False
    )


def _save(figure: Figure, path: Path) -> Path:
    with whole_file(path) as draft:
        figure.savefig(draft, format="png", dpi=DPI)
    return path
