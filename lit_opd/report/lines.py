"""Files of one JSON object a line: appended with one write a line, continued without doubles, read back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append each record as one line, written at once and flushed; NaN and infinity are an error, as JSON has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n")
            file.flush()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole record; a last line that a kill cut short is left out. Empty where there is no file.

    Raises:
        ValueError: a line before the last is not JSON; file and line are named.
    """
    if not path.is_file():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number != len(lines):
                raise ValueError(f"{path}:{number} must be a JSON object, got {line[:40]!r}: {error}") from error
    return records


def drop_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the records whose "step" is above ``step`` and a cut last line; returns what was kept."""
    records = read_lines(path)
    kept = [record for record in records if record["step"] <= step]
    if path.is_file():
        temporary = path.with_name(f".{path.name}")
        temporary.unlink(missing_ok=True)
        append_lines(temporary, kept)
        os.replace(temporary, path)
    return kept
