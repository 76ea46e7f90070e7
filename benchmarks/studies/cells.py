"""Figures over seeds as cells of a table, and what they were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from statistics import fmean, stdev

from lit_opd.compare.document import show
from lit_opd.compare.statistics import Estimate


def machine() -> str:
    """This machine, as the pages name it."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


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
    text = show(estimate, signed=True)
    return f"**{text}**" if estimate.excludes_zero else text


def seeds_cell(count: int, pairs: int | None) -> str:
    """How many seeds a row has and, where its difference is of fewer, how many of them are paired.

    >>> seeds_cell(4, 4), seeds_cell(4, 3), seeds_cell(1, 0), seeds_cell(4, None)
    ('4', '4 (3 paired)', '1 (0 paired)', '4')
    """
    return str(count) if pairs in (None, count) else f"{count} ({pairs} paired)"
