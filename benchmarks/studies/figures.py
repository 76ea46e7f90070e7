"""What the studies' pictures share: no display, curves over seeds, disagreement by position, files written and closed."""

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

__all__ = ["draw_band", "draw_positions", "plt", "save"]
DPI = 120


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
    axis.plot(centres, means, style, color=color, lw=1.6)
