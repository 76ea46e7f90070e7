"""Figures over seeds as cells of a table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from lit_opd.compare.statistics import Estimate


def spread(values: Sequence[float]) -> str:
    """Mean +- standard deviation.

    >>> spread([0.5, 0.7])
    '0.600 +- 0.141'
    """
    return f"{fmean(values):.3f}" + (f" +- {stdev(values):.3f}" if len(values) > 1 else "")


def interval(estimate: Estimate | None) -> str:
    """Mean and interval, bold where it excludes 0.

    >>> interval(Estimate(0.1, 0.05, 0.15, 3))
    '**+0.100 [+0.050, +0.150]**'
    """
    if estimate is None:
        return ""
    if estimate.low is None:
        return f"{estimate.mean:+.3f}"
    text = f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
    return f"**{text}**" if estimate.excludes_zero else text
