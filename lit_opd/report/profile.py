"""One logging window of the position profile as a record, and as a line of ``profile.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lit_opd.files import read_lines

Scale = Literal["linear", "log"]
_WHOLE = ("from", "to", "count")
AXES = ("absolute", "relative", "in_turn", "by_turn")
TURN_AXES = ("in_turn", "by_turn")
FEW_ALIVE = 0.1  # of the responses, or of the turns: after this position a mean rests on few of them


@dataclass(frozen=True)
class BinnedProfile:
    """Means by bin along one axis; N bins.

    Args:
        start: [N] first position of each bin (absolute) or its lower edge in [0, 1] (relative).
        end: [N] last position of each bin, included (absolute), or its upper edge (relative).
        count: [N] sampled tokens.
        values: quantity -> [N] values, None where nothing was counted.
    """

    start: tuple[float, ...]
    end: tuple[float, ...]
    count: tuple[int, ...]
    values: dict[str, tuple[float | None, ...]]

    @property
    def centres(self) -> list[float]:
        """[N], the middle of each bin."""
        return [(low + high) / 2 for low, high in zip(self.start, self.end, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Lists by column name."""
        columns = {"from": self.start, "to": self.end, "count": self.count, **self.values}
        return {name: list(column) for name, column in columns.items()}

    @classmethod
    def from_json(cls, columns: dict[str, Any]) -> BinnedProfile:
        """The inverse of ``to_json``."""
        whole = {name: tuple(columns[name]) for name in _WHOLE}
        values = {name: tuple(column) for name, column in columns.items() if name not in _WHOLE}
        return cls(start=whole["from"], end=whole["to"], count=whole["count"], values=values)


@dataclass(frozen=True)
class ProfileWindow:
    """What was seen since the window before, over all ranks.

    Args:
        step: optimizer steps done at the window's end.
        previous_step: optimizer steps done at its start.
        rows: responses with at least one token.
        tokens: sampled tokens.
        scale: spacing of the absolute bins.
        absolute: by position 1, 2, ... inside the response.
        relative: by (position - 1/2) / length.
        scalars: what went to the loggers, by logged name.
        in_turn: by position 1, 2, ... inside the turn; None where responses are one turn.
        by_turn: by turn 1, 2, ...
    """

    step: int
    previous_step: int
    rows: int
    tokens: int
    scale: Scale
    absolute: BinnedProfile
    relative: BinnedProfile
    scalars: dict[str, float]
    in_turn: BinnedProfile | None = None
    by_turn: BinnedProfile | None = None

    def to_json(self) -> dict[str, Any]:
        """One line of ``profile.jsonl``."""
        plain = {name: getattr(self, name) for name in ("step", "previous_step", "rows", "tokens", "scale")}
        binned = {axis: getattr(self, axis).to_json() for axis in AXES if getattr(self, axis) is not None}
        return {**plain, **binned, "scalars": dict(self.scalars)}

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> ProfileWindow:
        """The inverse of ``to_json``."""
        binned = {axis: BinnedProfile.from_json(line[axis]) for axis in AXES if axis in line}
        return cls(**{**line, **binned})


def with_shares(window: ProfileWindow) -> ProfileWindow:
    """With what its counts say of turns: ``survivor_fraction`` by position in the turn, against the first bin, and
    ``token_share`` by turn. Bins that are empty here have no value."""
    found: dict[str, Any] = {}
    for axis, name in zip(TURN_AXES, ("survivor_fraction", "token_share"), strict=True):
        binned: BinnedProfile | None = getattr(window, axis)
        if binned is not None:
            pairs = zip(binned.count, binned.start, binned.end, strict=True)
            counts = [count / (end - start + 1) for count, start, end in pairs]
            whole = counts[0] if name == "survivor_fraction" else sum(counts)
            shares = tuple(count / whole if count else None for count in counts)
            values = {
                known: tuple(value if count else None for value, count in zip(column, binned.count, strict=True))
                for known, column in binned.values.items()
            }
            found[axis] = replace(binned, values={**values, name: shares})
    return replace(window, **found)


def last_said(windows: Sequence[ProfileWindow], axis: str) -> int:
    """The last bin of an axis of turns that has tokens in one of ``windows``; later ones belong to turns that nobody said."""
    return max(
        place for window in windows for place, count in enumerate(getattr(window, axis).count) if count or not place
    )


def read_profile(path: str | Path) -> list[ProfileWindow]:
    """Every window of a ``profile.jsonl``, in order."""
    return [ProfileWindow.from_json(line) for line in read_lines(Path(path))]
