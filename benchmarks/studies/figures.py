"""What the studies' pictures share: no display, curves over seeds, values by position, means on their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_opd.compare.document import far_of, show
from lit_opd.compare.statistics import Estimate

__all__ = ["BETTER", "OPEN", "WORSE", "draw_band", "draw_estimate", "draw_positions", "far_of", "limit", "plt", "save"]
DPI = 120
BETTER, WORSE, OPEN = "#1f5fa8", "#c4500c", "0.45"  # blue and orange, which the colour-blind tell apart as well
WIDE = 4.0  # an interval above WIDE times the median one may run out of its panel
ROOM: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # around what is written over a line
MARGIN, LEAST_MARGIN = 0.05, 0.02  # of an axis, beside the outermost end; of one on which all is 0


def save(figure: Figure, path: Path, **how: Any) -> None:
    """Write a PNG, into a folder that may be new, and let the figure go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, **{"dpi": DPI, **how})
    plt.close(figure)


def draw_band(axis: Axes, curves: Sequence[Sequence[tuple[int, float]]], color: str, label: str) -> None:
    """Mean of the seeds and one standard deviation either side."""
    steps = [step for step, _ in curves[0]]
    values = np.array([[value for _, value in curve] for curve in curves])
    mean, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(steps))
    axis.plot(steps, mean, "o-", color=color, lw=1.6, ms=3, label=label)
    axis.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.13, lw=0)


def draw_positions(axis: Axes, bands: Sequence[Sequence[float | None]], color: str, style: str) -> None:
    """Mean over runs by tenth of the response, None where a run has no token there."""
    centres = 5 + 10 * np.arange(len(bands[0]))
    means = np.ma.masked_invalid(np.array(bands, dtype=float)).mean(0)
    axis.plot(centres, means, style, color=color, lw=1.6, ms=4)


def draw_estimate(
    axis: Axes, row: float, found: Estimate, *, far: float = np.inf, less_is_better: bool = False
) -> None:
    """A dot on its interval in ``row``; written with an arrow where the mean is above ``far``; hollow without an interval."""
    better = (found.mean < 0) == less_is_better
    color = OPEN if not found.excludes_zero else BETTER if better else WORSE
    if abs(found.mean) > far:
        right = found.mean > 0
        text = f"{show(found, 2, signed=True)} \u25b8" if right else f"\u25c2 {show(found, 2, signed=True)}"
        place, side = (0.98, "right") if right else (0.02, "left")
        where = axis.get_yaxis_transform()  # x of the panel, y of the data
        axis.text(place, row, text, transform=where, ha=side, va="center", fontsize=8, color=color, bbox=ROOM)
        return
    if found.low is not None and found.high is not None:
        axis.plot([found.low, found.high], [row, row], color=color, lw=1.8)
    axis.plot([found.mean], [row], "o", color=color, ms=4, mfc=color if found.low is not None else "white")


def limit(axis: Axes, estimates: Sequence[Estimate], far: float = np.inf) -> None:
    """Room for 0, the means within ``far`` and their intervals, but for one that is much wider than the others."""
    known = [each for each in estimates if abs(each.mean) <= far]
    spans = [(each.low, each.high) for each in known if each.low is not None and each.high is not None]
    usual = WIDE * float(np.median([high - low for low, high in spans] or [0.0]))
    ends = [end for low, high in spans if high - low <= usual for end in (low, high)]
    ends += [0.0, *(each.mean for each in known)]
    margin = MARGIN * (max(ends) - min(ends)) or LEAST_MARGIN
    axis.set_xlim(min(ends) - margin, max(ends) + margin)
