"""Files of one JSON object a line: appended with one write a line, continued without doubles, read back."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_opd.errors import InputError

_waiting: dict[Path, bytes] = {}  # lines that the disk did not take, by file


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append each record as one line, written at once; NaN and infinity are an error, as JSON has none.

    Lines that the disk does not take are no reason to lose a training: they are written with the next ones, and a warning
    says so.
    """
    lines = _lines(records)
    late = _waiting.pop(path, b"")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        append_whole(path, late + lines)
    except OSError as error:
        _waiting[path] = late + lines
        if not late:
            warn_unwritten(path, error)


def _lines(records: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n" for record in records).encode()


def append_whole(path: Path, content: bytes) -> None:
    """Append all of ``content`` or, where the disk refuses a part, nothing.

    Raises:
        OSError: as the disk gave it.
    """
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(content) != len(content):
                file.write(content[file.tell() - size :])  # gives the reason
        except OSError:
            file.truncate(size)
            raise


def warn_unwritten(path: Path, error: OSError) -> None:
    """Said once until the disk takes lines again."""
    warnings.warn(
        f"{path} could not be written ({error}); training goes on, and its lines are kept in memory until there is room: free "
        "some before the next checkpoint, which will stop the run otherwise",
        stacklevel=2,
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole record; a last line that a kill cut short is left out. Empty where there is no file.

    Raises:
        ValueError: a line before the last is not JSON; file and line are named.
    """
    if not path.is_file():
        return []
    records = []
    lines = path.read_bytes().split(b"\n")  # decoded one by one: the last may end inside a character
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                records.append(json.loads(line.decode()))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            if number != len(lines):
                shown = line[:40].decode(errors="replace")
                raise ValueError(f"{path}:{number} must be a JSON object, got {shown!r}: {error}") from error
    return records


def drop_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the records whose "step" is above ``step`` and a cut last line; returns what was kept.

    Raises:
        InputError: the disk does not take what is kept; the file stays as it was.
    """
    _waiting.pop(path, None)
    records = read_lines(path)
    kept = [record for record in records if record["step"] <= step]
    if path.is_file():
        replace_or_refuse(path, _lines(kept))
    return kept


def replace_whole(path: Path, content: bytes) -> None:
    """Give the file another content, in one step.

    Raises:
        OSError: as the disk gave it; the file is as it was.
    """
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.unlink(missing_ok=True)
        append_whole(temporary, content)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def replace_or_refuse(path: Path, content: bytes) -> None:
    """The same for a file without which a run does not start.

    Raises:
        InputError: the disk does not take it.
    """
    try:
        replace_whole(path, content)
    except OSError as error:
        raise InputError(
            f"`--run_dir` must be a writable folder on a disk with room, but {path} could not be written: {error}; free some "
            "space and give the same command again"
        ) from error
