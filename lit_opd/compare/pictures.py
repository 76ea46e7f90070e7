"""The pictures of a comparison, on matplotlib's Agg canvas without pyplot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lit_opd.compare.curves import AXIS_LABELS, LABELS, mean_curve
from lit_opd.compare.differences import RunsComparison
from lit_opd.compare.statistics import Estimate
from lit_opd.files import whole_file
from lit_opd.report.charts import Chart

DPI = 110
WIDTH = 12.0  # inches
LEGEND_LETTERS = 150  # that fit beside each other
LEGEND_GAP = 8  # letters that a line's sample takes
COLORS = ("#1f5fa8", "#c2571a", "#2e8b57", "#8e44ad", "#b8860b", "#c0392b", "#16a2b8", "#6b6b6b")
STYLES = ("-", "--", ":", "-.")


def draw_curves(found: RunsComparison, metric: str, folder: Path) -> Path:
    """One metric over steps, and over tokens where they are known: means of each variant's runs with 95 % bands."""
    figure = _figure(WIDTH, 4.6)
    for place, axis in enumerate(found.axes_of(metric)):
        axes = figure.add_subplot(1, len(found.axes_of(metric)), place + 1)
        for number, (variant, runs) in enumerate(found.variants.items()):
            places, means = mean_curve(runs, metric, axis)
            if places:
                count = sum(metric in run.curves for run in runs)
                _draw_line(axes, places, means, f"{variant} (n = {count})", number)
        if metric in found.targets:
            axes.axhline(found.targets[metric], color="0.5", lw=0.8, ls=":")
        _label(axes, x=AXIS_LABELS[axis], y=LABELS[metric])
    _shared_legend(figure)
    figure.suptitle(f"{LABELS[metric]}: mean over seeds, band: 95 % interval of the mean, dotted: target", fontsize=11)
    return _save(figure, folder / f"curve_{metric}.png")


def draw_positions(charts: Sequence[Chart], folder: Path) -> Path | None:
    """Disagreement and weight by position, a panel each; None where no run has a profile."""
    shown = [chart for chart in charts if chart.measured]
    if not shown:
        return None
    figure = _figure(WIDTH, 4.6)
    for place, chart in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), place + 1)
        for series in (own for own in chart.series if own.measured):
            color, style = ("0.5", "--") if series.dashed else _look(series.color)
            heights, low, high = (
                np.array(part, dtype=float) for part in (series.y, series.low, series.high)
            )  # None is NaN
            axes.plot(series.x, heights, style, color=color, lw=1.8, label=plain(series.name))
            if len(low):
                axes.fill_between(series.x, low, high, color=color, alpha=0.15, lw=0)
        if chart.reference is not None:
            axes.axhline(chart.reference, color="0.6", lw=0.8)
        axes.set_title(chart.title, fontsize=10)
        _label(axes, x=chart.x, y=chart.y)
    _shared_legend(figure)
    return _save(figure, folder / "by_position.png")


def _draw_line(axes: Any, places: Sequence[float], means: Sequence[Estimate], name: str, number: int) -> None:
    color, style = _look(number)
    axes.plot(places, [found.mean for found in means], style, color=color, lw=1.8, label=plain(name))
    if means[0].low is not None:
        low, high = ([getattr(found, side) for found in means] for side in ("low", "high"))
        axes.fill_between(places, low, high, color=color, alpha=0.15, lw=0)


def plain(name: str) -> str:
    """A name as matplotlib shows it: "$" begins no formula, and a leading "_" does not keep it out of the legend."""
    return (f" {name}" if name.startswith("_") else name).replace("$", r"\$")


def draw_weights(curves: Mapping[str, Sequence[float | None]], folder: Path) -> Path:
    """Mean weight by tenth of the response, a line a strategy."""
    figure = _figure(WIDTH, 4.6)
    axes = figure.add_subplot()
    axes.axhline(1.0, color="0.6", lw=0.8)
    for number, (name, values) in enumerate(curves.items()):
        color, style = _look(number)
        heights = [np.nan if value is None else value for value in values]
        centres = (np.arange(len(heights)) + 0.5) * 100.0 / len(heights)
        axes.plot(centres, heights, style, color=color, lw=1.8, marker="o", ms=3, label=plain(name))
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
        axes.barh(places, widths, height, color=_look(number)[0], label=plain(f"with {reference}"))
    axes.set_yticks(np.arange(len(cosines)) + 0.4 - height / 2, list(map(plain, cosines)))
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
    """Every line once, whichever panel has it."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not found:
        return
    columns = max(1, LEGEND_LETTERS // (max(map(len, found)) + LEGEND_GAP))
    figure.legend(
        found.values(),
        found.keys(),
        loc="outside lower center",
        ncols=min(len(found), columns),
        fontsize=9,
        frameon=False,
    )


def _save(figure: Figure, path: Path) -> Path:
    with whole_file(path) as draft:
        figure.savefig(draft, format="png", dpi=DPI)
    return path
