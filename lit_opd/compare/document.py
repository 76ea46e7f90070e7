"""One report in three forms: Markdown, JSON and a self-contained HTML page without script."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_opd.compare.statistics import Estimate
from lit_opd.files import replace_whole
from lit_opd.report import html

NAME = "compare"


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Args:
        header: one a column.
        rows: as many cells each.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Args:
        title: its heading.
        text: paragraphs above the table.
        table: None for none.
        pictures: PNG files below, beside the report.
    """

    title: str
    text: Sequence[str] = ()
    table: Table | None = None
    pictures: Sequence[Path] = ()


@dataclass(frozen=True)
class Document:
    """A whole report.

    Args:
        title: its heading.
        sections: in order.
        data: what ``compare.json`` holds.
    """

    title: str
    sections: Sequence[Section]
    data: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """``compare.md``, ``compare.json`` and ``compare.html`` in ``folder``, each whole or not at all."""
        plain = json.dumps(self.data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        for suffix, text in (("md", self.markdown()), ("json", plain), ("html", self.html())):
            replace_whole(folder / f"{NAME}.{suffix}", text.encode())

    def markdown(self) -> str:
        """Pictures by file name."""
        parts = [f"# {self.title}"]
        for section in self.sections:
            parts += [f"## {section.title}", *section.text]
            parts += [markdown_table(section.table.header, section.table.rows)] if section.table else []
            parts += [f"![{section.title}]({picture.name})" for picture in section.pictures]
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """Pictures inside; all text escaped."""
        return html.render("compare.html.j2", title=self.title, sections=self.sections, base64=_base64)


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
