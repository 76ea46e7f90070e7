"""Paired differences over seeds, and where a curve stands: the report's arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from lit_opd.types import InputError

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Args:
        mean: of the values.
        low: lower end, None where one value gives no interval.
        high: upper end.
        count: values.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0; False without one."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate:
    """Mean of ours - theirs over the seeds that both have, and its Student t interval.

    >>> paired({1: 0.5, 2: 0.7}, {1: 0.4, 2: 0.4}).mean
    0.2
    """
    values = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not 1 <= len(values) <= len(T_QUANTILES) + 1:
        raise InputError(
            f"`paired` must have 1 to {len(T_QUANTILES) + 1} common seeds, got {len(values)} of {sorted(ours)} and "
            f"{sorted(theirs)}; train both with the same seeds"
        )
    if len(values) == 1:
        return Estimate(values[0], None, None, 1)
    mean, half = fmean(values), T_QUANTILES[len(values) - 2] * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, len(values))


def mean_height(places: Sequence[float], values: Sequence[float], *, horizon: float) -> float:
    """Area under the polygon through the points, which end at ``horizon``, over its width.

    >>> mean_height([0, 10, 20], [0.0, 1.0, 1.0], horizon=20)
    0.75
    """
    if places[-1] != horizon or len(places) < 2:
        raise InputError(f"`mean_height.places` must end at {horizon} and be 2 or more, got {list(places)}")
    widths = [after - before for before, after in zip(places, places[1:], strict=False)]
    heights = [(left + right) / 2 for left, right in zip(values, values[1:], strict=False)]
    return sum(w * h for w, h in zip(widths, heights, strict=True)) / (horizon - places[0])


def reached(places: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """Where the polygon through the points first is at the target or above; None where it never is.

    >>> reached([0, 10, 20], [0.2, 0.4, 0.8], 0.6)
    15.0
    """
    for index, value in enumerate(values):
        if value >= target:
            if index == 0:
                return float(places[0])
            before = values[index - 1]
            share = (target - before) / (value - before)
            return float(places[index - 1] + share * (places[index] - places[index - 1]))
    return None
