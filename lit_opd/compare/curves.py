"""Means over a variant's runs with their intervals: over training, and by position in the response."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from lit_opd.compare.differences import RunsComparison
from lit_opd.compare.runs import Run
from lit_opd.compare.statistics import Estimate, mean_interval
from lit_opd.report.charts import Chart, Series
from lit_opd.report.profile import BinnedProfile

POINTS = 101  # of a curve that is drawn through runs with differing evaluations
LABELS = {"greedy": "greedy accuracy", "avg_at_4": "avg@4", "reverse_kl": "KL(student || teacher), nats/token"}
TITLES = {"greedy": "Greedy accuracy", "avg_at_4": "avg@4", "reverse_kl": "KL(student || teacher)"}
UNITS = {"greedy": "fraction right", "avg_at_4": "fraction right", "reverse_kl": "nats/token"}
AXIS_LABELS = {"steps": "optimizer step", "tokens": "sampled tokens"}
POSITION_LABEL = "position in the response, % of its length"
BY_POSITION = {  # quantity of the profile -> title, unit, height to compare with
    "disagreement": ("Disagreement |q - s|, last window", "nats/token", None),
    "weight": ("Weight (0 where dropped), last window", "1 is uniform", 1.0),
}
PERCENT = 100.0
GREY = 7


def mean_curve(runs: Sequence[Run], metric: str, axis: str) -> tuple[list[float], list[Estimate]]:
    """Places and means with intervals of the runs that have the metric, where all of them have; empty without any."""
    curves = [run.curves[metric] for run in runs if metric in run.curves]
    if not curves:
        return [], []
    begin, end = max(curve.along(axis)[0] for curve in curves), min(curve.along(axis)[-1] for curve in curves)
    if begin > end:
        return [], []
    same = axis == "steps" and len({curve.steps for curve in curves}) == 1
    grid = np.array(curves[0].steps, dtype=float) if same else np.linspace(begin, end, POINTS)
    table = np.stack([np.interp(grid, curve.along(axis), curve.values) for curve in curves])
    return grid.tolist(), [mean_interval(column.tolist()) for column in table.T]


def curve_chart(found: RunsComparison, metric: str, axis: str) -> Chart:
    """One metric of all variants over steps or tokens."""
    series = []
    for number, (variant, runs) in enumerate(found.variants.items()):
        places, means = mean_curve(runs, metric, axis)
        count = sum(metric in run.curves for run in runs)
        series.append(_series(f"{variant} (n = {count})", places, means, number))
    return Chart(
        TITLES[metric], AXIS_LABELS[axis], UNITS[metric], series, reference=found.targets.get(metric), from_zero=False
    )


def _series(
    name: str, places: Sequence[float], means: Sequence[Estimate], number: int, *, dashed: bool = False
) -> Series:
    known = any(mean.low is not None for mean in means)
    low, high = ([mean.low for mean in means], [mean.high for mean in means]) if known else ([], [])
    return Series(name, places, [mean.mean for mean in means], low, high, GREY if dashed else number, dashed)


# -- by position -------------------------------------------------------------------------------------------------------


def position_curve(
    profiles: Iterable[BinnedProfile | None], quantity: str
) -> tuple[list[float], list[Estimate | None]]:
    """Bin centres in % and means over the profiles that have the first one's bins; empty without any."""
    having = [own for own in profiles if own is not None and quantity in own.values]
    alike = [own for own in having if (own.start, own.end) == (having[0].start, having[0].end)]
    if not alike:
        return [], []
    means: list[Estimate | None] = []
    for column in zip(*(own.values[quantity] for own in alike), strict=True):
        values = [value for value in column if value is not None]
        means.append(mean_interval(values) if values else None)
    return [PERCENT * centre for centre in alike[0].centres], means


def position_charts(found: RunsComparison) -> list[Chart]:
    """Disagreement and weight by position: each variant's last window, and the first one of all runs together."""
    charts = []
    everyone = [run for runs in found.variants.values() for run in runs]
    for quantity, (title, unit, reference) in BY_POSITION.items():
        series = []
        for number, (variant, runs) in enumerate(found.variants.items()):
            profiles = [run.profile[1].relative for run in runs if run.profile]
            series.append(_placed(f"{variant} (n = {len(profiles)})", profiles, quantity, number))
        if quantity == "disagreement":
            first = [run.profile[0].relative for run in everyone if run.profile]
            series.append(_placed("first window, all runs", first, quantity, GREY, dashed=True))
        charts.append(Chart(title, POSITION_LABEL, unit, series, reference=reference, from_zero=reference is None))
    return charts


def _placed(
    name: str, profiles: Sequence[BinnedProfile], quantity: str, number: int, *, dashed: bool = False
) -> Series:
    places, means = position_curve(profiles, quantity)
    known = [(place, mean) for place, mean in zip(places, means, strict=True) if mean is not None]
    return _series(name, [place for place, _ in known], [mean for _, mean in known], number, dashed=dashed)
