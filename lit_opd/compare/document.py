"""One report in four forms: a few lines for the terminal, Markdown, JSON and a self-contained HTML page."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from lit_opd.compare.statistics import Estimate
from lit_opd.files import replace_whole
from lit_opd.report import html
from lit_opd.report.charts import Drawing, measured

NAME = "compare"
FOREST_WIDTH = 176.0  # of the drawn intervals, in CSS pixels
FAR, NEAR = 6.0, 0.02  # a mean above FAR times the median one and NEAR is not drawn to scale
FEW = 4  # of so few all are
_ACTIVE = re.compile(r"[\\`*_<$~]|\](?=[(\[:])|^(?=#|>|[+-] )|(?<=^[0-9])[.)](?= )")


@dataclass(frozen=True)
class Interval:
    """A mean between its ends, drawn as a dot on a line.

    Args:
        mean: the dot.
        low: end of the line, None where there is no interval.
        high: the other end.
        marked: it leaves 0 out.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Args:
        header: one a column.
        rows: as many cells each.
        text_columns: places of columns that hold sentences, which are set to the left; the first always is.
        intervals: a drawn interval a row, all on one scale with 0; empty for none.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Sequence[int] = ()
    intervals: Sequence[Interval | None] = ()

    def forest(self) -> list[dict[str, Any] | None]:
        """Where dot, line and 0 of each row stand, pixels from the left; where ``beyond`` is not 0, an arrow stands for them."""
        known = [own for own in self.intervals if own is not None]
        far, ends = far_of([own.mean for own in known]), [0.0]
        for own in (own for own in known if abs(own.mean) <= far):
            ends += [value for value in (own.mean, own.low, own.high) if value is not None]
        return [_drawn(own, ends, far) for own in self.intervals]


def far_of(means: Sequence[float]) -> float:
    """Beyond it one mean would squeeze all others together.

    >>> far_of([0.01, -0.02, 0.03, 0.01, -0.5]), far_of([0.01, 0.5])
    (0.14, inf)
    """
    return FAR * median(map(abs, means)) + NEAR if len(means) > FEW else inf


def _drawn(own: Interval | None, ends: Sequence[float], far: float) -> dict[str, Any] | None:
    if own is None:
        return None
    low, high = min(ends), max(ends)
    width = high - low or 1.0
    places = {"zero": 0.0, "dot": own.mean, "low": own.low, "high": own.high}
    found = {
        name: None if value is None else f"{(value - low) / width * FOREST_WIDTH:.1f}" for name, value in places.items()
    }
    beyond = 0 if abs(own.mean) <= far else 1 if own.mean > 0 else -1
    return found | {"marked": own.marked, "beyond": beyond, "width": FOREST_WIDTH}


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Args:
        title: its heading.
        text: paragraphs above the table.
        table: None for none.
        pictures: PNG files below, beside the report, for Markdown.
        drawings: charts of the page, in the pictures' place.
        folded: the page shows the heading only, until one asks for the rest.
    """

    title: str
    text: Sequence[str] = ()
    table: Table | None = None
    pictures: Sequence[Path] = ()
    drawings: Sequence[Drawing] = ()
    folded: bool = False


@dataclass(frozen=True)
class Document:
    """A whole report.

    Args:
        title: what was compared.
        sections: in order.
        data: what ``compare.json`` holds.
        headline: the result in one sentence; empty for none.
        brief: what the terminal shows below it, a line each.
    """

    title: str
    sections: Sequence[Section]
    data: dict[str, Any] = field(default_factory=dict)
    headline: str = ""
    brief: Sequence[str] = ()

    def write(self, folder: Path) -> None:
        """``compare.md``, ``compare.json`` and ``compare.html`` in ``folder``, each whole or not at all."""
        plain = json.dumps(self.data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        for suffix, text in (("md", self.markdown()), ("json", plain), ("html", self.html())):
            replace_whole(folder / f"{NAME}.{suffix}", text.encode())

    def lines(self) -> str:
        """For a terminal: the result first, and what the reader must know."""
        return "\n".join([self.headline or self.title, *self.brief]) + "\n"

    def markdown(self) -> str:
        """Pictures by file name; names are text, whatever they hold."""
        parts = [f"# {markdown_text(self.title)}"]
        parts += [f"**{markdown_text(self.headline)}**"] if self.headline else []
        for section in self.sections:
            if section.drawings and not section.pictures and section.table is None:
                continue  # its pictures are another section's
            parts += [f"## {markdown_text(section.title)}", *map(markdown_text, section.text)]
            if section.table is not None and section.table.rows:
                rows = [list(map(markdown_text, row)) for row in (section.table.header, *section.table.rows)]
                parts.append(markdown_table(rows[0], rows[1:]))
            parts += [f"![{markdown_text(section.title)}](<{picture.name}>)" for picture in section.pictures]
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """Charts from the numbers, pictures inside where there are none; all text escaped."""
        drawings = [drawing for section in self.sections for drawing in measured(section.drawings)]
        places = iter(range(len(drawings)))
        numbered = [[(next(places), drawing) for drawing in measured(section.drawings)] for section in self.sections]
        data = {"drawings": [drawing.to_json() for drawing in drawings]}
        return html.render(
            "compare.html.j2",
            title=self.title,
            headline=self.headline,
            sections=list(zip(self.sections, numbered, strict=True)),
            base64=_base64,
            data=html.embedded(data),
        )


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: no emphasis, code, links, markup or lists come from it.

    >>> print(markdown_text("_a_ <b> [x](y) $1"))
    \\_a\\_ \\<b> [x\\](y) \\$1
    """
    return _ACTIVE.sub(lambda found: "\\" + found[0], " ".join(text.split()))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; bars inside cells are escaped.

    >>> print(markdown_table(["a", "b"], [["1", "x|y"]]))
    | a | b |
    |---|---|
    | 1 | x\\|y |
    """
    lines = [header, ["---"] * len(header), *rows]
    texts = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]
    texts[1] = texts[1].replace(" ", "")
    return "\n".join(texts)


def show(estimate: Estimate | None, digits: int = 3, *, signed: bool = False) -> str:
    """An estimate as text: the mean, its interval, what is censored.

    One value has no interval, and a mean that is a bound is given without: Student's holds for values that are all known.

    >>> show(Estimate(0.5, 0.25, 0.75, 4)), show(Estimate(30.0, 20.0, 40.0, 3, censored=1), 1), show(None)
    ('0.500 [0.250, 0.750]', '>= 30.0 (1 of 3 censored)', '-')
    """
    if estimate is None:
        return "-"
    form = f"{'+' if signed else ''},.{digits}f"
    if estimate.censored == estimate.count and not signed:
        return f"> {estimate.mean:{form}} (never, {estimate.count} of {estimate.count})"
    text = f"{estimate.mean:{form}}"
    if estimate.low is not None and estimate.high is not None and not estimate.censored:
        text += f" [{estimate.low:{form}}, {estimate.high:{form}}]"
    if not estimate.censored:
        return text
    return f"{'' if signed else '>= '}{text} ({estimate.censored} of {estimate.count} censored)"


def _base64(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()
