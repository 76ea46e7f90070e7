"""Files and folders written whole or not at all; files of one JSON object a line: appended, continued, read back."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lit_opd.errors import InputError

_waiting: dict[Path, bytes] = {}  # lines that the disk did not take, by file


# -- whole or not at all -----------------------------------------------------------------------------------------------


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which takes its place when the block ends well and goes when it does not.

    It has ``path``'s own ending, as formats are told by it, and one name, so that a killed process leaves one of it at most:
    a path has one writer at a time. The folder is made.

    Raises:
        OSError: as the disk gave it; ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    draft.unlink(missing_ok=True)
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())  # a power cut must not leave the new name with nothing in it
        os.replace(draft, path)
    finally:
        with suppress(OSError):  # what was written of it would keep a full disk full
            draft.unlink(missing_ok=True)


def replace_whole(path: Path, content: bytes) -> None:
    """Give the file another content, in one step.

    Raises:
        OSError: as the disk gave it; the file is as it was.
    """
    with whole_file(path) as draft:
        draft.write_bytes(content)


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


@contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``path`` when the block ends well and goes when it does not.

    Args:
        path: the folder; those above it are made.
        replace: whatever is at ``path`` goes then; False leaves it, unless it is an empty folder.
    Raises:
        OSError: as the disk gave it, or there is something at ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent, ignore_cleanup_errors=True) as beside:
        draft = Path(beside) / "new"  # inside, as the outer one is for this user only
        draft.mkdir()
        yield draft
        if replace and os.path.lexists(path):
            os.replace(path, Path(beside) / "old")
        os.replace(draft, path)


# -- lines -------------------------------------------------------------------------------------------------------------


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append each record as one line, written at once; NaN and infinity are an error, as JSON has none.

    Lines that the disk does not take are no reason to lose a training: they are written with the next ones, and a warning
    says so.
    """
    lines = as_lines(records)
    late = _waiting.pop(path, b"")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        append_whole(path, late + lines)
    except OSError as error:
        _waiting[path] = late + lines
        if not late:
            warn_unwritten(path, error)


def as_lines(records: Iterable[dict[str, Any]]) -> bytes:
    """Each record as one line; NaN and infinity are an error, as JSON has none."""
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
        replace_or_refuse(path, as_lines(kept))
    return kept
