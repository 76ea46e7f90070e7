"""The report's pictures: curves with bands and disagreement by position; differences from uniform with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from benchmarks.studies.figures import draw_band, draw_estimate, draw_positions, far_of, limit, plt, save
from benchmarks.studies.reproduce.results import Record
from lit_opd.compare.statistics import Estimate

SHOWN = 6  # variants in colour in a picture of curves
LEGEND = 4  # entries a row
LARGEST = 8  # mark of uniform, in points, where another line may hide it
TICKS = 4  # intervals between ticks at most: "-0.010" five times touches its neighbours
COLORS = ("#202020", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")  # of Okabe and Ito, for the colour-blind
MARKERS = ("o", "s", "^", "D", "v", "X")  # which tell them apart without colour
START, OTHERS = "0.55", "0.8"  # greys
PANELS = {"greedy": ("greedy accuracy", "exact match"), "reverse_kl": ("KL(student || teacher)", "nats/token")}
GOOD_BELOW = {"reverse KL", "late KL"}  # measures of which less is better
UNITS = {
    "area": "mean accuracy",
    "greedy": "accuracy",
    "avg@4": "accuracy",
    "reverse KL": "nats/token",
    "late KL": "nats/token",
}


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


def draw_differences(found: Mapping[str, Mapping[str, Estimate | None]], path: Path, title: str = "") -> None:
    """A panel a measure, a row a variant: mean difference from uniform and its 95 % interval.

    Args:
        found: variant -> measure -> estimate, None without a common seed; at least one variant.
        path: PNG to write.
        title: above all panels.
    """
    measures = list(next(iter(found.values())))
    height = 1.5 + 0.27 * len(found)
    figure, axes = plt.subplots(1, len(measures), figsize=(11, height), sharey=True, layout="constrained")
    for axis, measure in zip(axes, measures, strict=True):
        known = [each for estimates in found.values() if (each := estimates[measure]) is not None]
        far = far_of([each.mean for each in known])
        for row, estimates in enumerate(found.values()):
            if (each := estimates[measure]) is not None:
                draw_estimate(axis, row, each, far=far, less_is_better=measure in GOOD_BELOW)
        axis.axvline(0, color="0.4", lw=0.8)
        axis.set_title(f"{measure} - uniform", fontsize=10)
        side = "left" if measure in GOOD_BELOW else "right"
        axis.set_xlabel(f"{UNITS.get(measure, measure)} ({side} is better)", fontsize=9)
        axis.grid(axis="y", color="0.93")
        axis.xaxis.set_major_locator(MaxNLocator(TICKS))
        axis.tick_params(labelsize=9)
        limit(axis, known, far)
    axes[0].set_yticks(range(len(found)), list(found))
    axes[0].set_ylim(len(found) - 0.5, -0.5)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def draw_by_position(runs: Mapping[str, Sequence[Record]], path: Path, names: Sequence[str]) -> None:
    """Divergence and disagreement at the start and the end, and the mean weight of all steps, by tenth of the response.

    Args:
        runs: variant -> its runs.
        path: PNG to write.
        names: variants in colour, ``SHOWN`` at most; the ends of the others are grey without a name.
    """
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
    kept = {"KL(student || teacher)": "kl_bands", "disagreement |q - s|": "bands"}
    styles = [(name, color, f"{mark}-") for name, color, mark in zip(names, COLORS, MARKERS, strict=False)]
    for axis, (title, key) in zip(axes, kept.items(), strict=False):
        start = [run[key][0][1] for group in runs.values() for run in group]
        draw_positions(axis, start, START, "--")
        for name in (name for name in runs if name not in names):
            draw_positions(axis, [run[key][-1][1] for run in runs[name]], OTHERS, "-")
        for name, color, style in styles:
            draw_positions(axis, [run[key][-1][1] for run in runs[name]], color, style)
        axis.set_title(f"{title}, end of training", fontsize=10)
        axis.set_ylabel("nats/token")
    for name, color, style in styles:
        draw_positions(axes[2], [run["weight_bands"] for run in runs[name]], color, style)
        axes[2].lines[-1].set_label(f"{name} ({_seeds(runs[name])})")
    axes[2].lines[0].set(markersize=LARGEST, markerfacecolor="white")  # loss variants weigh as uniform does
    axes[2].set_title("mean weight, all steps", fontsize=10)
    axes[2].set_ylabel("weight")
    for axis in axes:
        axis.set_xlabel("position in the response, %")
        axis.set_ylim(bottom=0)
    lines = [*axes[2].get_lines(), Line2D([], [], color=START, ls="--", label="before training, all runs")]
    lines += [Line2D([], [], color=OTHERS, label="other variants")] if set(runs) - set(names) else []
    figure.legend(handles=lines, loc="outside lower center", ncols=LEGEND, frameon=False, fontsize=9)
    save(figure, path)


def _seeds(runs: Sequence[Record]) -> str:
    return f"{len(runs)} seed{'' if len(runs) == 1 else 's'}"
