"""Answers cut out of responses and compared with references. No code in an answer is ever run."""

from __future__ import annotations

BOX = "\\boxed{"


def boxed_answer(text: str) -> str | None:
    """The content of the last ``\\boxed{...}`` with braces matched; None where there is none or it is not closed.

    >>> boxed_answer(r"so \\boxed{\\frac{1}{2}} and \\boxed{042}.")
    '042'
    """
    start = text.rfind(BOX)
    if start < 0:
        return None
    depth = 1
    for place in range(start + len(BOX), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len(BOX) : place]
    return None


def _as_integer(text: str) -> int | None:
    digits = text.strip().replace(",", "")
    body = digits[1:] if digits[:1] in "+-" else digits
    return int(digits) if body.isascii() and body.isdigit() and len(body) <= 100 else None


def exact_match(response: str, reference: str) -> bool:
    """True when the last boxed answer equals the reference: as integers where both are (042 = 42), else as text."""
    answer = boxed_answer(response)
    if answer is None:
        return False
    ours, theirs = _as_integer(answer), _as_integer(reference)
    if ours is not None and theirs is not None:
        return ours == theirs
    return answer.strip() == reference.strip()
