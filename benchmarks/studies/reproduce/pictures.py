"""The report's pictures: curves with bands and disagreement by position; differences from uniform with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from benchmarks.studies.figures import draw_band, draw_positions, plt, save
from benchmarks.studies.reproduce.results import Record
from lit_opd.compare.statistics import Estimate

SHOWN = 6  # variants in colour in a picture of curves
TICKS = 4  # intervals between ticks at most: "-0.010" five times touches its neighbours
COLORS = ("#202020", "#1f5fa8", "#57a0d3", "#c4500c", "#2f7d32", "#8e44ad")
PANELS = {"greedy": ("greedy accuracy", "exact match"), "reverse_kl": ("KL(student || teacher)", "nats/token")}
GOOD_BELOW = {"reverse KL", "late KL"}  # measures of which less is better


def draw_curves(runs: Mapping[str, Sequence[Record]], path: Path, names: Sequence[str]) -> None:
    """Accuracy and KL against the step, disagreement by relative position at the start and the end.

    Args:
        runs: variant -> its runs.
        path: PNG to write.
        names: variants in colour, ``SHOWN`` at most; of the others, means are drawn in grey without a name.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    for name in (name for name in runs if name not in names):
        for axis, curve in zip(axes, PANELS, strict=False):
            _others(axis, [run["curves"][curve] for run in runs[name]])
    for name, color in zip([name for name in runs if name in names], COLORS, strict=False):
        for axis, curve in zip(axes, PANELS, strict=False):
            draw_band(axis, [run["curves"][curve] for run in runs[name]], color, f"{name} ({len(runs[name])})")
        draw_positions(axes[2], [run["bands"][-1][1] for run in runs[name]], color, "-")
    start = [run["bands"][0][1] for group in runs.values() for run in group]
    draw_positions(axes[2], start, "0.55", "--")
    for axis, (title, unit) in zip(axes, PANELS.values(), strict=False):
        axis.set(title=title, xlabel="optimizer step", ylabel=unit)
    axes[2].set(
        title="disagreement: start (dashes), end", xlabel="position in the response, %", ylabel="|q - s|, nats/token"
    )
    axes[2].set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=SHOWN, frameon=False)
    save(figure, path)


def _others(axis: Axes, curves: Sequence[Sequence[tuple[int, float]]]) -> None:
    """Mean of the seeds, thin and grey."""
    axis.plot(
        [step for step, _ in curves[0]],
        np.mean([[value for _, value in c] for c in curves], axis=0),
        color="0.8",
        lw=0.9,
    )


def draw_differences(found: Mapping[str, Mapping[str, Estimate | None]], path: Path) -> None:
    """A panel a measure, a row a variant: mean difference from uniform and its 95 % interval.

    Args:
        found: variant -> measure -> estimate, None without a common seed; at least one variant.
        path: PNG to write.
    """
    measures = list(next(iter(found.values())))
    height = 1.3 + 0.24 * len(found)
    figure, axes = plt.subplots(1, len(measures), figsize=(13, height), sharey=True, layout="constrained")
    for axis, measure in zip(axes, measures, strict=True):
        for row, (_, estimates) in enumerate(found.items()):
            _estimate(axis, row, estimates[measure], sign=-1 if measure in GOOD_BELOW else 1)
        axis.axvline(0, color="0.4", lw=0.8)
        axis.set_title(f"{measure} - uniform{' (left is better)' if measure in GOOD_BELOW else ''}", fontsize=10)
        axis.grid(axis="y", color="0.93")
        axis.xaxis.set_major_locator(MaxNLocator(TICKS))
    axes[0].set_yticks(range(len(found)), list(found))
    axes[0].set_ylim(len(found) - 0.5, -0.5)
    _limit(axes, [[e[measure] for e in found.values()] for measure in measures])
    save(figure, path)


def draw_by_position(runs: Mapping[str, Sequence[Record]], path: Path, names: Sequence[str]) -> None:
    """Divergence and disagreement at the start and the end, and the mean weight of all steps, by tenth of the response.

    Args:
        runs: variant -> its runs.
        path: PNG to write.
        names: variants in colour, ``SHOWN`` at most; the ends of the others are grey without a name.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    kept = {"KL(student || teacher)": "kl_bands", "disagreement |q - s|": "bands"}
    for axis, (title, key) in zip(axes, kept.items(), strict=False):
        start = [run[key][0][1] for group in runs.values() for run in group]
        draw_positions(axis, start, "0.55", "--")
        for name in (name for name in runs if name not in names):
            draw_positions(axis, [run[key][-1][1] for run in runs[name]], "0.85", "-")
        for name, color in zip(names, COLORS, strict=False):
            draw_positions(axis, [run[key][-1][1] for run in runs[name]], color, "-")
        axis.set(title=f"{title}: start (dashes), end", ylabel="nats/token")
    for name, color in zip(names, COLORS, strict=False):
        draw_positions(axes[2], [run["weight_bands"] for run in runs[name]], color, "-")
        axes[2].lines[-1].set_label(f"{name} ({len(runs[name])})")
    axes[2].set(title="mean weight, all steps", ylabel="weight")
    for axis in axes:
        axis.set(xlabel="position in the response, %")
        axis.set_ylim(bottom=0)
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=SHOWN, frameon=False)
    save(figure, path)


def _estimate(axis: Axes, row: int, estimate: Estimate | None, *, sign: int) -> None:
    if estimate is None:
        return
    color = "0.45" if not estimate.excludes_zero else "#2f7d32" if sign * estimate.mean > 0 else "#b3261e"
    if estimate.low is not None and estimate.high is not None:
        axis.plot([estimate.low, estimate.high], [row, row], color=color, lw=1.8)
    axis.plot([estimate.mean], [row], "o", color=color, ms=4, mfc=color if estimate.low is not None else "white")


def _limit(axes: Sequence[Axes], estimates: Sequence[Sequence[Estimate | None]]) -> None:
    """Axes by the means: an interval of two seeds may be ten times as wide as all else, and runs out of the panel."""
    for axis, column in zip(axes, estimates, strict=True):
        means = [0.0, *(estimate.mean for estimate in column if estimate is not None)]
        margin = 0.5 * (max(means) - min(means)) + 0.005
        axis.set_xlim(min(means) - margin, max(means) + margin)
