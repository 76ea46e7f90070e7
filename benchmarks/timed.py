"""Seconds spent in one method of an object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Timed:
    """Stands in the place of a method, and counts what each call takes.

    Args:
        owner: the object.
        name: of its method.
        clock: seconds, whatever they are to mean.
    """

    def __init__(self, owner: Any, name: str, clock: Callable[[], float]) -> None:
        self.inner, self.clock, self.spent = getattr(owner, name), clock, 0.0
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        start = self.clock()
        out = self.inner(*args, **kwargs)
        self.spent += self.clock() - start
        return out

    def taken(self) -> float:
        """Seconds since the last call."""
        spent, self.spent = self.spent, 0.0
        return spent
