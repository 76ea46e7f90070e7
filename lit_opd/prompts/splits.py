"""Parts of a split, written as ``datasets`` has them, for rows that are read without it: "train[:80%]", "train[-5:]"."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lit_opd.errors import InputError

_ADDED = re.compile(r"\s*\+\s*")
_PART = re.compile(
    r"""(?P<name>[\w.-]+)
        (?:\[ (?:(?P<start>-?\d[\d_]*)(?P<start_percent>%)?)? : (?:(?P<stop>-?\d[\d_]*)(?P<stop_percent>%)?)? \])?""",
    re.VERBOSE,
)
_WHOLE_PERCENT = 100


def split_ranges(split: str, sizes: Mapping[str, int], path: str, remedy: str) -> list[tuple[str, range]]:
    """The rows that ``split`` takes, in its order.

    Args:
        split: names with or without [from:to] in rows or whole per cents, joined with "+"; a negative number counts from the
            end, and a percentage is rounded to the nearest row.
        sizes: rows of each split there is.
        path: of the data, for messages.
        remedy: what to do where it names another split.
    Returns:
        Names of ``sizes`` with the numbers of their rows.
    Raises:
        InputError: it cannot be read, names a split that is not there, or takes no row of splits that have some.

    >>> split_ranges("train[80%:]", {"train": 10}, "d.jsonl", "")
    [('train', range(8, 10))]
    """
    parts = [_PART.fullmatch(part) for part in _ADDED.split(split.strip())]
    ranges = [(part["name"], _range(part, sizes[part["name"]])) for part in parts if part and part["name"] in sizes]
    if len(ranges) < len(parts) or any(rows is None for _, rows in ranges):
        names = " or ".join(repr(name) for name in sizes)
        raise InputError(
            f"{path}: `DataSource.split` must be {names}, or a part of it such as '{next(iter(sizes), 'train')}[:80%]', "
            f"got {split!r}; {remedy}"
        )
    total = sum(sizes[name] for name in {name for name, _ in ranges})
    if total and not any(rows for _, rows in ranges):
        raise InputError(f"{path}: `DataSource.split` must take at least one of {total} rows, got {split!r}; widen it")
    return [(name, rows) for name, rows in ranges if rows is not None]


def _range(part: re.Match[str], size: int) -> range | None:
    """The rows of one part; None for a percentage above 100."""
    percent = bool(part["start_percent"] or part["stop_percent"])  # one sign is enough, as in `datasets`
    bounds = [None if text is None else int(text) for text in (part["start"], part["stop"])]
    if percent and any(abs(bound or 0) > _WHOLE_PERCENT for bound in bounds):
        return None
    if percent:
        bounds = [None if bound is None else round(bound * size / _WHOLE_PERCENT) for bound in bounds]
    return range(*slice(*bounds).indices(size))
