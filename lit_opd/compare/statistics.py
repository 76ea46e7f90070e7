"""Means and paired differences over a handful of seeds, with intervals that hold at such counts; ways to a target."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, fmean, stdev
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_opd.errors import InputError

CONFIDENCE = 0.95
TWO_WAY_DRAWS = 2000
_HALVINGS = 60  # of (0, pi / 2): to the last bit
_ENDS_HALVINGS = 20  # of a range some widths wide, to a millionth of it

Key = TypeVar("Key", bound=Hashable)
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Args:
        mean: of the values.
        low: lower end, None where one value gives no interval.
        high: upper end.
        count: values.
        censored: of them, only known to be at least what they count as.
    """

    mean: float
    low: float | None
    high: float | None
    count: int
    censored: int = 0

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0; False without one, and where a value is only a bound."""
        if self.low is None or self.high is None or self.censored:
            return False
        return not self.low <= 0.0 <= self.high

    def to_json(self) -> dict[str, Any]:
        """Plain values by name."""
        return dict(vars(self))


@cache
def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """t with P(|T| <= t) = ``confidence`` for Student's T with ``freedom`` degrees of freedom.

    The finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4 in the angle atan(t / sqrt(freedom)), inverted by halving.

    >>> round(t_quantile(1), 3), round(t_quantile(5), 3), round(t_quantile(30), 3)
    (12.706, 2.571, 2.042)
    """
    low, high = 0.0, math.pi / 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _inside(angle: Any, freedom: int) -> Any:
    """P(|T| <= sqrt(freedom) tan(angle)), of one angle or an array of them; below 0 its negative."""
    cosine, odd = np.cos(angle), freedom % 2
    term = cosine if odd else np.ones_like(cosine)
    total = term if freedom > 1 else np.zeros_like(cosine)
    for power in range(3 if odd else 2, freedom - 1, 2):
        term = term * ((power - 1) / power * cosine * cosine)
        total = total + term
    total = total * np.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def mean_interval(values: Sequence[float], *, censored: int = 0) -> Estimate:
    """The mean and its Student t interval.

    Not the percentile bootstrap, which undercovers at the 2 to 8 seeds of a comparison: it lacks the factor
    sqrt(n / (n - 1)) of the sample variance and the heavier tails of t (Hesterberg 2015, "What Teachers Should Know About
    the Bootstrap", The American Statistician 69), so that at n = 3 it is 1.96 sqrt(2/3) / 4.30 = 0.37 times as wide. t is
    exact for normal values; differences between runs of one distribution are symmetric, which is what it needs most.

    Args:
        values: one a seed, at least one.
        censored: how many are lower bounds.
    """
    mean, count = fmean(values), len(values)
    if count < 2:
        return Estimate(mean, None, None, count, censored)
    half = t_quantile(count - 1) * stdev(values) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count, censored)


def paired(ours: Mapping[Key, float], theirs: Mapping[Key, float]) -> Estimate:
    """Mean of ours - theirs over the seeds that both have, and its Student t interval.

    Raises:
        InputError: no common seed.
    """
    common = [seed for seed in ours if seed in theirs]
    if not common:
        raise InputError(
            f"a paired difference must have a common seed, got {sorted(ours, key=str)} and {sorted(theirs, key=str)}; train "
            "both with the same `seed_everything`"
        )
    return mean_interval([ours[seed] - theirs[seed] for seed in common])


# -- seeds and problems ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoWay:
    """What the mean of a table of seeds x problems might have been: the distribution of a two-way bootstrap, see ``two_way``.

    A problem part, drawn, plus Student's t. The t is integrated over, not drawn: its far tail is what small p and the ends of an
    interval are made of, and few of some thousand draws lie there.

    Args:
        mean: of the table.
        scale: of the t, 0 where seeds do not differ.
        freedom: of the t.
        again: [draws] deviations of the problems' mean.
    """

    mean: float
    scale: float
    freedom: int
    again: Values

    def below(self, bound: float) -> float:
        """Share at ``bound`` or below."""
        gaps = bound - self.mean - self.again
        if not self.scale:
            return float((gaps >= 0).mean())
        return float(0.5 + _inside(np.arctan(gaps / (self.scale * math.sqrt(self.freedom))), self.freedom).mean() / 2)

    def above(self, bound: float) -> float:
        """Share at ``bound`` or above."""
        return TwoWay(-self.mean, self.scale, self.freedom, -self.again).below(-bound)

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Both ends, with equal shares beyond them."""
        tail = (1 - confidence) / 2
        if not self.scale:
            low, high = np.quantile(self.mean + self.again, [tail, 1 - tail])
            return float(low), float(high)
        return self._end(tail), self._end(1 - tail)

    def estimate(self) -> Estimate:
        """The mean with its interval; it counts seeds."""
        return Estimate(self.mean, *self.interval(), self.freedom + 1)

    def _end(self, share: float) -> float:
        """Where ``share`` lies below: halving a range that holds it, for each part of the mixture alone does."""
        reach = self.scale * t_quantile(self.freedom, abs(2 * share - 1)) * (1 if share > 0.5 else -1)
        low, high = (self.mean + float(end) + reach for end in (self.again.min(), self.again.max()))
        for _ in range(_ENDS_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.below(middle) < share else (low, middle)
        return (low + high) / 2


def two_way(table: ArrayLike, *, seed: int = 0, draws: int = TWO_WAY_DRAWS) -> TwoWay | None:
    """The two-way bootstrap of the mean of a table of seeds x problems, over other seeds and other problems at once.

    For y_sp = mean + seed_s + problem_p + rest_sp. It adds a deviation of the seeds' mean, Student's t with S - 1 degrees of
    freedom (why not drawn again: ``mean_interval``), and one of the problems' mean, from the problems drawn again with
    replacement. Seeds' means hold the rest once, and so do problems' means; it must count once (resampling both counts it three
    times, Owen 2007, "The pigeonhole bootstrap", The Annals of Applied Statistics 1), so the problems' deviations are scaled down
    to the variance that is left of them without it, and up by what a percentile interval of P values lacks (Hesterberg 2015).

    Args:
        table: [S, P], every seed on the same problems. Where each seed has problems of its own, take ``mean_interval`` of the
            seeds' means instead: they hold both.
        seed: of the draws.
        draws: bootstrap samples of the problems.
    Returns:
        the distribution; None below two seeds or two problems.
    Raises:
        InputError: no table of finite numbers.
    """
    values = _seeds_by_problems(table)
    mean, (seeds, problems) = float(values.mean()), values.shape
    if seeds < 2 or problems < 2:
        return None
    rows, columns = values.mean(1) - mean, values.mean(0) - mean
    rest = np.square(values - mean - rows[:, None] - columns).sum() / ((seeds - 1) * (problems - 1))
    between = seeds * np.square(columns).sum() / (problems - 1)  # expected: rest + seeds * variance of problems
    left = max(1.0 - rest / between, 0.0) if between > 0 else 0.0
    lacking = (
        math.sqrt(problems / (problems - 1)) * t_quantile(problems - 1) / NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    )
    drawn = np.random.default_rng(seed).integers(problems, size=(draws, problems))
    scale = math.sqrt(np.square(rows).sum() / ((seeds - 1) * seeds))
    return TwoWay(mean, scale, seeds - 1, columns[drawn].mean(1) * math.sqrt(left) * lacking)


def two_way_interval(table: ArrayLike, *, seed: int = 0, draws: int = TWO_WAY_DRAWS) -> Estimate:
    """The mean of a table of seeds x problems, and its 95 % interval by ``two_way``.

    Args:
        table, seed, draws: as there.
    Returns:
        the estimate, with S as its count; without an interval below two seeds or two problems.
    Raises:
        InputError: no table of finite numbers.
    """
    values, found = _seeds_by_problems(table), two_way(table, seed=seed, draws=draws)
    return found.estimate() if found else Estimate(float(values.mean()), None, None, len(values))


def _seeds_by_problems(table: ArrayLike) -> Values:
    values = np.asarray(table, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise InputError(
            f"a two-way interval must be of a table [seeds, problems] of finite numbers, got {values.shape}"
        )
    return values


def paired_two_way(
    ours: Mapping[Key, Mapping[str, float]], theirs: Mapping[Key, Mapping[str, float]], *, seed: int = 0
) -> Estimate:
    """``two_way_interval`` of ours - theirs, paired by seed and by problem.

    Args:
        ours: by seed, values by problem.
        theirs: the same; seeds that only one side has and problems that not every one of the common seeds has on both sides are
            left out.
        seed: of the draws.
    Raises:
        InputError: no common seed, or no common problem.
    """
    seeds = [name for name in ours if name in theirs]
    sides = [side[name].keys() for side in (ours, theirs) for name in seeds]
    problems = sorted(set.intersection(*map(set, sides))) if sides else []
    if not problems:
        raise InputError(
            "a two-way difference must have a common seed and a problem that every common seed has on both sides, got seeds "
            f"{sorted(ours, key=str)} and {sorted(theirs, key=str)}; evaluate both on the same problems"
        )
    table = [[ours[name][problem] - theirs[name][problem] for problem in problems] for name in seeds]
    return two_way_interval(table, seed=seed)


# -- curves ------------------------------------------------------------------------------------------------------------


def cut(places: Sequence[float], values: Sequence[float], *, start: float) -> tuple[list[float], list[float]]:
    """The polygon through the points from ``start`` on, which lies between its first and its last place.

    >>> cut([0, 10, 20], [2.0, 1.0, 0.5], start=15)
    ([15, 20], [0.75, 0.5])
    """
    rest = [(place, value) for place, value in zip(places, values, strict=True) if place > start]
    height = float(np.interp(start, places, values))
    return [start, *(place for place, _ in rest)], [height, *(value for _, value in rest)]


def mean_height(places: Sequence[float], values: Sequence[float], *, horizon: float) -> float:
    """Area under the polygon through the points from the first place to ``horizon``, over that width.

    >>> mean_height([0, 10, 20], [0.0, 1.0, 1.0], horizon=20)
    0.75
    """
    inside = [place for place in places if place < horizon]
    grid = np.array([*inside, horizon], dtype=np.float64)
    heights = np.interp(grid, places, values)
    width = grid[-1] - grid[0]
    return float((heights[1:] + heights[:-1]) @ np.diff(grid) / (2 * width)) if width > 0 else float(heights[-1])


def reached(places: Sequence[float], values: Sequence[float], target: float, *, rising: bool) -> float | None:
    """Where the polygon through the points first is at the target or past it; None where it never is.

    >>> reached([0, 10, 20], [0.2, 0.4, 0.8], 0.6, rising=True)
    15.0
    """
    sign = 1.0 if rising else -1.0
    gaps = [sign * (value - target) for value in values]
    for index, gap in enumerate(gaps):
        if gap >= 0:
            if index == 0:
                return float(places[0])
            share = -gaps[index - 1] / (gap - gaps[index - 1])
            return float(places[index - 1] + share * (places[index] - places[index - 1]))
    return None
