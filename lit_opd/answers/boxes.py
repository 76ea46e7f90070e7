r"""Where a response or a worked solution states its answer: the last ``\boxed{...}``, or what follows ``####``."""

from __future__ import annotations

import re

BOX = "\\boxed{"

_BOX_START = re.compile(r"\\(?:boxed|fbox)\s*(\{|$)")
_HASHES = re.compile(r"####[ \t]*([^\n]*)")


def boxed_answer(text: str) -> str | None:
    """The content of the last ``\\boxed{...}`` with braces matched; None where there is none or it is not closed.

    >>> boxed_answer(r"so \\boxed{\\frac{1}{2}} and \\boxed{042}.")
    '042'
    """
    return last_box(text)[0]


def last_box(text: str) -> tuple[str | None, bool]:
    """Content of the last box, and whether there is one that is not closed. Escaped braces do not count."""
    start = None
    for match in _BOX_START.finditer(text):
        start = match
    if start is None:
        return None, False
    depth, place = 1, start.end()
    while place < len(text) and start[1]:
        if text[place] == "\\":
            place += 1
        else:
            depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start.end() : place], False
        place += 1
    return None, True


def after_hashes(text: str) -> str | None:
    """What follows the last "####" on its line, as GSM8K writes answers; None without one."""
    found = _HASHES.findall(text)
    return found[-1] if found else None
