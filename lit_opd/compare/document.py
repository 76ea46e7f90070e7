"""One report in three forms: Markdown, JSON and a self-contained HTML page without script."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from lit_opd.compare.statistics import Estimate
from lit_opd.files import replace_whole

NAME = "compare"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { border-bottom: 1px solid rgb(128 128 128 / .4); padding: .25rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; background: white; }
"""


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
        body = "\n".join(map(_html_section, self.sections))
        return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(self.title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(self.title)}</h1>
{body}
</body></html>
"""


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


def _html_section(section: Section) -> str:
    parts = [f"<section><h2>{escape(section.title)}</h2>", *(f"<p>{escape(text)}</p>" for text in section.text)]
    if section.table is not None:
        rows = [_html_row("th", section.table.header), *(_html_row("td", row) for row in section.table.rows)]
        parts.append(f'<div class="wide"><table>{"".join(rows)}</table></div>')
    for picture in section.pictures:
        inside = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<img alt="{escape(section.title)}" src="data:image/png;base64,{inside}">')
    return "\n".join([*parts, "</section>"])


def _html_row(kind: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"
