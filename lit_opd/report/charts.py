"""Charts and heat maps of an HTML page as plain numbers; ``templates/page.js`` draws them in the browser."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

DIGITS = 6  # significant ones in a page
MOST_POINTS = 400  # of a line; of more every n-th is kept, and the ends


@dataclass(frozen=True)
class Series:
    """One line.

    Args:
        name: in the legend.
        x: [N] rising.
        y: [N], None where nothing was measured.
        low: [N] lower ends of intervals; empty for none.
        high: [N] upper ends.
        color: number in the page's palette.
        dashed: the line it is compared with.
        points: mark each value; lines of a few values are marked anyway.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    color: int = 0
    dashed: bool = False
    points: bool = False

    @property
    def measured(self) -> bool:
        """Whether there is anything to draw."""
        return any(_finite(value) is not None for value in self.y)

    def to_json(self) -> dict[str, Any]:
        """At most ``MOST_POINTS`` values."""
        kept = spread(len(self.x), MOST_POINTS)
        columns = {name: [rounded(getattr(self, name)[at]) for at in kept] for name in ("x", "y")}
        if len(self.low) and len(self.high):
            columns |= {name: [rounded(getattr(self, name)[at]) for at in kept] for name in ("low", "high")}
        look = {"name": self.name, "color": self.color, "dashed": self.dashed, "points": self.points}
        return look | columns


@dataclass(frozen=True)
class Chart:
    """Lines over one axis.

    Args:
        title: what is shown.
        x: label of the horizontal axis, with its unit.
        y: unit of the vertical axis.
        series: lines, those without a value are left out.
        note: a sentence below.
        reference: height of a thin line; None for none.
        from_zero: the vertical axis holds 0.
        shaded_from: where a grey part of the horizontal axis begins; None for none.
        log_x: the horizontal axis is logarithmic.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    note: str = ""
    reference: float | None = None
    from_zero: bool = True
    shaded_from: float | None = None
    log_x: bool = False

    @property
    def measured(self) -> bool:
        """Whether there is anything to draw."""
        return any(series.measured for series in self.series)

    def to_json(self) -> dict[str, Any]:
        """What the page's script reads."""
        plain = {
            name: getattr(self, name) for name in ("title", "x", "y", "reference", "from_zero", "shaded_from", "log_x")
        }
        return {"kind": "lines", **plain, "series": [series.to_json() for series in self.series if series.measured]}


@dataclass(frozen=True)
class HeatMap:
    """A value by column and row, drawn as colours.

    Args:
        title: what is shown.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        unit: of the values.
        x_edges: [columns + 1] rising.
        y_edges: [rows + 1] rising.
        values: [columns][rows], None where nothing was measured.
        from_zero: the colours begin at 0.
        note: a sentence below.
    """

    title: str
    x: str
    y: str
    unit: str
    x_edges: Sequence[float]
    y_edges: Sequence[float]
    values: Sequence[Sequence[float | None]] = field(repr=False)
    from_zero: bool = True
    note: str = ""

    @property
    def measured(self) -> bool:
        """Whether there is anything to draw."""
        return any(_finite(value) is not None for column in self.values for value in column)

    def to_json(self) -> dict[str, Any]:
        """What the page's script reads."""
        plain = {name: getattr(self, name) for name in ("title", "x", "y", "unit", "from_zero")}
        edges = {name: [rounded(edge) for edge in getattr(self, name)] for name in ("x_edges", "y_edges")}
        return {"kind": "heat", **plain, **edges, "values": [list(map(rounded, column)) for column in self.values]}


Drawing = Chart | HeatMap


def measured(drawings: Iterable[Drawing]) -> list[Drawing]:
    """Those that have something to show."""
    return [drawing for drawing in drawings if drawing.measured]


def rounded(value: float | None) -> float | None:
    """To ``DIGITS`` significant digits; None for what is no finite number, as JSON has none."""
    number = _finite(value)
    return None if number is None else float(f"{number:.{DIGITS}g}")


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def spread(count: int, most: int) -> list[int]:
    """Evenly spread places among ``count``, at most ``most``, with the first and the last.

    >>> spread(5, 9), spread(9, 3), spread(9, 1), spread(0, 3)
    ([0, 1, 2, 3, 4], [0, 4, 8], [8], [])
    """
    if count <= most:
        return list(range(count))
    if most < 2:
        return [count - 1]
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]
