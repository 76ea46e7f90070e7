"""What counts as a usable parameter: plain numbers, no NaN, no infinity, no bool in disguise."""

from __future__ import annotations

from typing import Any

from lit_opd.errors import is_finite


def is_fraction(value: Any) -> bool:
    """A number in (0, 1]."""
    return is_finite(value) and 0 < value <= 1


def is_unit(value: Any) -> bool:
    """A number in [0, 1]."""
    return is_finite(value) and 0 <= value <= 1


def is_nonnegative(value: Any) -> bool:
    """A finite number >= 0."""
    return is_finite(value) and value >= 0
