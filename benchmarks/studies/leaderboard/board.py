"""What records say of variants in conditions: values with intervals, ranks, cost. The numbers of the page, without its words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

import numpy as np

from benchmarks.studies.leaderboard.ranks import Standing, Values, joint_draws, ranks_of, standings
from benchmarks.studies.reproduce.hypotheses import Outcomes
from benchmarks.studies.reproduce.plan import REFERENCE, Job, Plan
from benchmarks.studies.reproduce.results import Record, area
from lit_opd.compare.statistics import CONFIDENCE, Estimate, mean_interval, paired
from lit_opd.streams import stable_hash

MEASURE = "area"
LEAST_SEEDS = 2
SEED_RANGE = 1 << 32


@dataclass(frozen=True)
class Row:
    """A variant in a condition.

    Args:
        variant: its name.
        added: it is no variant of the plan.
        by_problem: its intervals are over seeds and problems; False: over seeds only.
        own: its area.
        minus: its area less that of uniform, paired; None for uniform itself and without a common seed.
        standing: among the plan's variants; None where it is not ranked.
        learning_rate: of its runs.
        cpu_seconds: median of a run; None where only the clock was read.
        seconds: median of a run by the clock; None where it was not kept.
        tokens: sampled, mean of a run.
    """

    variant: str
    added: bool
    by_problem: bool
    own: Estimate
    minus: Estimate | None
    standing: Standing | None
    learning_rate: float
    cpu_seconds: float | None
    seconds: float | None
    tokens: float


@dataclass(frozen=True)
class Condition:
    """All that is known of a condition.

    Args:
        name: of the plan.
        rows: the ranked ones first, by mean rank.
        ranked: variants of the plan that are ranked.
        seeds: that all of these have, which the ranks are of.
        draws: ranks in each draw, [draws, V] in the order of ``ranked``; empty without ranks.
    """

    name: str
    rows: list[Row]
    ranked: list[str]
    seeds: list[int]
    draws: Values = field(repr=False)

    def row(self, variant: str) -> Row | None:
        """The row of a variant."""
        return next((row for row in self.rows if row.variant == variant), None)


@dataclass(frozen=True)
class Overall:
    """Mean ranks over the conditions that every variant of the plan is ranked in.

    Args:
        conditions: which.
        order: variants by mean rank, the lowest first.
        mean: variant -> mean rank with its 95 % interval.
        standing: variant -> its place by mean rank.
    """

    conditions: list[str]
    order: list[str]
    mean: dict[str, Estimate]
    standing: dict[str, Standing]


@dataclass(frozen=True)
class Board:
    """The whole of it.

    Args:
        conditions: those with a finished run, in the plan's order.
        overall: None while no condition has every variant ranked.
    """

    conditions: list[Condition]
    overall: Overall | None


def board_of(plan: Plan, records: Sequence[Record], added: Sequence[Record] = ()) -> Board:
    """The board of finished runs.

    Args:
        plan: which variants and conditions there are.
        records: of the plan, one a run.
        added: runs of other variants in its conditions, see ``added.py``; those that do not fit the plan are left out.
    """
    added = fitting(plan, added)[0]
    outcomes = Outcomes([*records, *added])
    conditions = [
        condition_of(plan, name, outcomes)
        for name in plan.content["conditions"]
        if any(record["condition"] == name for record in (*records, *added))
    ]
    return Board(conditions, overall_of(plan, conditions))


def fitting(plan: Plan, added: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Added runs that fit the plan as it is now, and a line on each of the others."""
    jobs = {(job.condition, job.seed): job for job in plan.jobs(("base", "full")) if job.variant == REFERENCE}
    reasons = [misfit(plan, record, jobs.get((record["condition"], record["seed"]))) for record in added]
    pairs = list(zip(added, reasons, strict=True))
    return [each for each, reason in pairs if not reason], [
        f"left out: {each['run']}, {reason}" for each, reason in pairs if reason
    ]


def misfit(plan: Plan, record: Record, job: Job | None) -> str:
    """Why an added run has no place beside the plan's, whose run of uniform with its seed is ``job``; empty where it has one."""
    if record["variant"] in plan.content["variants"]:
        return "the plan has a variant of that name; add it under another one"
    if job is None:
        return f"the plan has no {REFERENCE} with that condition and seed"
    if record.get("settings") != job.settings_sha:
        return "it was added when the plan had other settings or problems; train it for those of now and add it again"
    return ""


def condition_of(plan: Plan, name: str, outcomes: Outcomes) -> Condition:
    """Rows and ranks of one condition."""
    own = [variant for variant in plan.variants_of(name) if (name, variant) in outcomes.runs]
    others = [variant for condition, variant in outcomes.runs if condition == name and variant not in own]
    ranked = [variant for variant in own if len(outcomes.runs[name, variant]) >= LEAST_SEEDS]
    seeds = common_seeds(name, ranked, outcomes)
    if len(seeds) < LEAST_SEEDS or len(ranked) < 2:  # a rank is among others
        ranked, seeds = [], []
    drawn = draws_of(name, ranked, seeds, outcomes) if ranked else np.empty((0, 0))
    standing = dict(zip(ranked, standings(drawn), strict=True)) if ranked else {}
    standing |= {variant: found for variant in others if (found := guest(name, variant, ranked, outcomes)) is not None}
    rows = [row_of(name, variant, variant in others, standing.get(variant), outcomes) for variant in own + others]
    rows.sort(key=lambda row: (row.standing is None, row.standing.mean if row.standing else -row.own.mean))
    return Condition(name, rows, ranked, seeds, ranks_of(drawn) if ranked else drawn)


def common_seeds(condition: str, variants: Iterable[str], outcomes: Outcomes) -> list[int]:
    """Seeds that all of the variants have."""
    sets = [set(outcomes.runs[condition, variant]) for variant in variants]
    return sorted(set.intersection(*sets)) if sets else []


def draws_of(condition: str, variants: Sequence[str], seeds: Sequence[int], outcomes: Outcomes) -> Values:
    """Joint draws of the areas, [draws, V]; conditions, which have problems of their own, are drawn apart."""
    runs = outcomes.runs
    tables = [[outcomes.values(runs[condition, name][seed], MEASURE) for seed in seeds] for name in variants]
    return joint_draws(np.array(tables), seed=stable_hash(condition) % SEED_RANGE)


def guest(condition: str, variant: str, ranked: Sequence[str], outcomes: Outcomes) -> Standing | None:
    """An added variant among the plan's, on the seeds that it has: the plan's own ranks stay as they are."""
    seeds = common_seeds(condition, [*ranked, variant], outcomes)
    if not ranked or len(seeds) < LEAST_SEEDS or not by_problem(condition, variant, outcomes):
        return None
    return standings(draws_of(condition, [*ranked, variant], seeds, outcomes))[-1]


def by_problem(condition: str, variant: str, outcomes: Outcomes) -> bool:
    """Whether every run of it has outcomes by problem."""
    return all("right" in record for record in outcomes.runs[condition, variant].values())


def row_of(condition: str, variant: str, added: bool, standing: Standing | None, outcomes: Outcomes) -> Row:
    """Values and cost of a variant."""
    runs = list(outcomes.runs[condition, variant].values())
    whole = by_problem(condition, variant, outcomes)
    reference = outcomes.runs.get((condition, REFERENCE), {})
    areas = {run["seed"]: area(run) for run in runs}
    minus: Estimate | None = None
    if variant != REFERENCE and set(areas) & set(reference):
        if whole:
            minus = outcomes.estimate(condition, variant, REFERENCE, MEASURE)
        else:
            minus = paired(areas, {seed: area(run) for seed, run in reference.items()})
    own = outcomes.estimate(condition, variant, None, MEASURE) if whole else mean_interval(list(areas.values()))
    assert own is not None  # it has runs
    return Row(
        variant=variant,
        added=added,
        by_problem=whole,
        own=own,
        minus=minus,
        standing=standing,
        learning_rate=runs[0]["learning_rate"],
        cpu_seconds=_median(runs, "cpu_seconds"),
        seconds=_median(runs, "wall_seconds"),
        tokens=fmean(run["tokens"] for run in runs),
    )


def _median(runs: Sequence[Record], key: str) -> float | None:
    values = [run[key] for run in runs if key in run]
    return float(median(values)) if values else None


def overall_of(plan: Plan, conditions: Sequence[Condition]) -> Overall | None:
    """Mean ranks over the conditions that are planned for all variants and in which all of them are ranked."""
    names = list(plan.content["variants"])
    whole = [each for each in conditions if set(each.ranked) == set(names)]
    if not whole:
        return None
    drawn = [each.draws[:, [each.ranked.index(name) for name in names]] for each in whole]
    ranks = np.mean(drawn, axis=0)  # [draws, V]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ranks, [tail, 1 - tail], axis=0)
    mean = {
        name: Estimate(float(ranks[:, at].mean()), float(low[at]), float(high[at]), len(whole))
        for at, name in enumerate(names)
    }
    standing = dict(zip(names, standings(-ranks), strict=True))
    return Overall([each.name for each in whole], sorted(names, key=lambda name: mean[name].mean), mean, standing)
