"""What the heat maps need of every past window, in a few hundred bytes each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_opd.report.profile import TURN_AXES, ProfileWindow, Scale

HEAT_QUANTITIES = ("disagreement", "weight", "survivor_fraction")
COUNT = "count"  # sampled tokens
OF_TOKENS = ("disagreement", "weight")  # means over the tokens of a bin


class ProfileHistory:
    """Windows in order of their steps; windows of other bins than the newest are forgotten."""

    def __init__(self) -> None:
        self.scale: Scale = "linear"
        self._edges: dict[str, Any] = {}
        self._steps: list[tuple[int, int]] = []
        self._rows: dict[tuple[str, str], list[Any]] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, window: ProfileWindow) -> None:
        """Append a window."""
        edges = {
            "absolute": np.array([*window.absolute.start, window.absolute.end[-1] + 1.0]) - 0.5,
            "relative": np.array([*window.relative.start, window.relative.end[-1]]),
        }
        for axis in TURN_AXES:
            binned = getattr(window, axis)
            if binned is not None:
                edges[axis] = np.array([*binned.start, binned.end[-1] + 1.0]) - 0.5
        same = edges.keys() == self._edges.keys() and all(
            np.array_equal(edges[axis], self._edges[axis]) for axis in edges
        )
        if not same:
            self._steps, self._rows = [], {}
        self._edges, self.scale = edges, window.scale
        self._steps.append((window.previous_step, window.step))
        for axis in edges:
            values = getattr(window, axis).values
            self._rows.setdefault((axis, COUNT), []).append(np.array(getattr(window, axis).count, dtype=np.float32))
            for name in HEAT_QUANTITIES:  # a row a window, of one without a token too: columns stand at their steps
                column = values.get(name, (None,) * (len(edges[axis]) - 1))
                row = np.array([np.nan if value is None else value for value in column], dtype=np.float32)
                self._rows.setdefault((axis, name), []).append(row)

    def has(self, axes: Sequence[str]) -> bool:
        """Whether the windows have these axes."""
        return all(axis in self._edges for axis in axes)

    def edges(self, axis: str) -> Any:
        """[bins + 1], bin edges: half positions or turns, or fractions (relative)."""
        return self._edges[axis]

    def step_edges(self, most: int) -> Any:
        """[columns + 1] optimizer steps at which the columns of ``table`` start and end."""
        groups = np.array_split(np.array(self._steps, dtype=float), min(most, len(self)))
        return np.array([groups[0][0, 0], *(group[-1, 1] for group in groups)])

    def table(self, axis: str, name: str, most: int) -> Any:
        """[columns, bins], at most ``most`` columns: more windows are averaged in groups, means over tokens by their tokens; NaN
        where nothing was counted."""
        rows = np.stack(self._rows[axis, name])
        sizes = np.stack(self._rows[axis, COUNT]) if name in OF_TOKENS else np.ones_like(rows)
        groups = np.array_split(np.arange(len(rows)), min(most, len(self)))
        return np.stack([_mean(rows[group], sizes[group]) for group in groups])


def _mean(rows: Any, sizes: Any) -> Any:
    """[N, bins] -> [bins], over what is no NaN, each value as often as its size says."""
    sizes = np.where(np.isfinite(rows), sizes, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.where(sizes > 0, rows, 0.0) * sizes).sum(0) / sizes.sum(0)
