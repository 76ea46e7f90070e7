"""The tables that ``preflight`` prints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_opd.preflight.checks import Finding
from lit_opd.preflight.memory import Budget
from lit_opd.preflight.plan import GIB, Plan

WIDTH = 150  # characters, where no terminal is near; 80, what rich takes, breaks every second word
_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def show(findings: Sequence[Finding], found: Budget | None, plan: Plan, stream: TextIO) -> None:
    """Print the checks, and the memory budget where there is one."""
    console = Console(file=stream, width=_width(stream), highlight=False)
    if found is not None:
        console.print(budget_table(found, plan))
    console.print(checks_table(findings))
    counts = {status: sum(finding.status == status for finding in findings) for status in _STYLES}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))


def _width(stream: TextIO) -> int | None:
    """Of the table; None for that of the terminal, which in a pipe is the one behind input or errors, or of COLUMNS."""
    near = stream.isatty() or "COLUMNS" in os.environ or any(os.isatty(place) for place in (0, 1, 2))
    return None if near else WIDTH


def checks_table(findings: Sequence[Finding]) -> Table:
    """A row a check."""
    table = Table(title="preflight", title_justify="left")
    for heading in ("check", "", "found", "remedy"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        status = Text(finding.status, style=_STYLES[finding.status])
        table.add_row(finding.name, status, Text(finding.found), Text(finding.remedy))
    return table


def budget_table(found: Budget, plan: Plan) -> Table:
    """A row a part and a column a phase; parts that a rank always holds stand in every column."""
    unit, name = (GIB, "GiB") if found.peak >= GIB else (2**20, "MiB")
    table = Table(title=f"memory of one rank, {name}: {plan.describe()}", title_justify="left")
    table.add_column("part")
    for phase in found.phases:
        table.add_column(phase, justify="right")
    parts = [*found.always, *dict.fromkeys(part for held in found.phases.values() for part in held)]
    for part in parts:
        values = [(found.always | held).get(part, 0.0) for held in found.phases.values()]
        if any(values):
            table.add_row(part, *(f"{value / unit:.2f}" if value else "" for value in values))
    if found.fragmentation:
        table.add_row("fragmentation", *(f"{_fragmentation(found, phase) / unit:.2f}" for phase in found.phases))
    table.add_section()
    table.add_row("total", *(_total(found, phase, unit) for phase in found.phases))
    return table


def _fragmentation(found: Budget, phase: str) -> float:
    return found.total(phase) * (1 - 1 / (1 + found.fragmentation))


def _total(found: Budget, phase: str, unit: int) -> Text:
    return Text(f"{found.total(phase) / unit:.2f}", style="bold" if phase == found.worst else "")
