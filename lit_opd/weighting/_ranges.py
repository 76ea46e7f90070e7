"""What counts as a usable parameter: plain numbers, no NaN, no infinity, no bool in disguise."""

from __future__ import annotations

import math
from typing import Any


def is_integer(value: Any) -> bool:
    """An int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """A real number other than NaN and the infinities."""
    return (is_integer(value) or isinstance(value, float)) and math.isfinite(value)


def is_fraction(value: Any) -> bool:
    """A number in (0, 1]."""
    return is_finite(value) and 0 < value <= 1


def is_unit(value: Any) -> bool:
    """A number in [0, 1]."""
    return is_finite(value) and 0 <= value <= 1


def is_nonnegative(value: Any) -> bool:
    """A finite number >= 0."""
    return is_finite(value) and value >= 0
