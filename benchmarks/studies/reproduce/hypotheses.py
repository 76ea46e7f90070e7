"""Hypotheses of a plan and what finished runs say of them.

A plan's ``hypotheses``: name -> ``claim`` and ``contrasts``, each with

    variant, minus    what is compared, paired by seed and problem; without ``minus`` the variant's own measure with 0
    measure           one of MEASURES, left out: area
    expect            above, below or equal (within the plan's ``margin``)
    conditions        where it is predicted; the first is the primary one, which the verdict is of
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from benchmarks.studies.reproduce.outcomes import PER_NAT, unpacked
from benchmarks.studies.reproduce.plan import Plan
from benchmarks.studies.reproduce.results import Record
from lit_opd.compare.statistics import Estimate, TwoWay, mean_height, two_way, two_way_interval
from lit_opd.errors import InputError

Expectation = Literal["above", "below", "equal"]
Verdict = Literal["supported", "contradicted", "not decided"]
Values = NDArray[np.float64]
ALPHA = 0.05  # of all primary contrasts together
DRAWS = 10_000  # of the problems: leave a tenth of a small p open, where problems decide it
WHOLE, EARLY, LATE = range(3)  # columns of a record's ``kl``


# -- measures, by problem ------------------------------------------------------------------------------------------------


def area_by_problem(record: Record) -> Values:
    """Mean height of each problem's curve of right and wrong; their mean is the area of greedy accuracy, [P]."""
    steps = [step for step, _ in record["right"]]
    units = np.eye(len(steps))
    shares = [mean_height(steps, units[place], horizon=steps[-1]) for place in range(len(steps))]
    return np.asarray(shares @ _right(record))


def _right(record: Record) -> Values:
    return np.array([unpacked(bits, record["problems"]) for _, bits in record["right"]], dtype=np.float64)


def _kl(record: Record) -> Values:
    return np.array(record["kl"], dtype=np.float64) / PER_NAT


MEASURES: dict[str, Callable[[Record], Values]] = {
    "area": area_by_problem,
    "greedy": lambda record: _right(record)[-1],
    "reverse KL": lambda record: _kl(record)[:, WHOLE],
    "early KL": lambda record: _kl(record)[:, EARLY],
    "late KL": lambda record: _kl(record)[:, LATE],
    "late minus early KL": lambda record: _kl(record)[:, LATE] - _kl(record)[:, EARLY],
}


class Outcomes:
    """Values by problem of finished runs, each read once.

    Args:
        records: of one plan.
        draws: of every interval and p, so that a difference has one interval wherever it is shown.
    """

    def __init__(self, records: Iterable[Record], *, draws: int = DRAWS) -> None:
        self.draws = draws
        self.runs: dict[tuple[str, str], dict[int, Record]] = {}
        for record in records:
            self.runs.setdefault((record["condition"], record["variant"]), {})[record["seed"]] = record
        self._known: dict[tuple[str, str], Values] = {}

    def values(self, record: Record, measure: str) -> Values:
        """[P]."""
        key = (record["run"], measure)
        if key not in self._known:
            self._known[key] = MEASURES[measure](record)
        return self._known[key]

    def table(self, condition: str, variant: str, minus: str | None, measure: str) -> Values | None:
        """Seeds that both have x problems: the variant's values, less those of ``minus``; None without such a seed."""
        ours = self.runs.get((condition, variant), {})
        theirs = self.runs.get((condition, minus), {}) if minus else ours
        seeds = sorted(set(ours) & set(theirs))
        if not seeds:
            return None
        rows = [
            self.values(ours[seed], measure) - (self.values(theirs[seed], measure) if minus else 0.0) for seed in seeds
        ]
        return np.stack(rows)

    def estimate(self, condition: str, variant: str, minus: str | None, measure: str) -> Estimate | None:
        """Mean of ``table`` with its two-way interval."""
        table = self.table(condition, variant, minus, measure)
        return None if table is None else two_way_interval(table, draws=self.draws)


# -- hypotheses ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contrast:
    """One predicted difference; see the module."""

    variant: str
    minus: str | None
    measure: str
    expect: Expectation
    conditions: tuple[str, ...]

    @property
    def words(self) -> str:
        """As a table names it."""
        what = f"{self.variant} - {self.minus}" if self.minus else self.variant
        return f"{self.measure}, {what}" if self.measure != "area" else what


@dataclass(frozen=True)
class Hypothesis:
    """A claim and what it predicts."""

    name: str
    claim: str
    contrasts: tuple[Contrast, ...]


def hypotheses_of(plan: Plan) -> list[Hypothesis]:
    """Those of a plan, checked; none where it names none.

    Raises:
        InputError: a contrast names what the plan does not have.
    """
    found = []
    for name, spec in plan.content.get("hypotheses", {}).items():
        _require_keys(plan, f"hypotheses.{name}", spec, {"claim", "contrasts"})
        contrasts = [_contrast(plan, f"hypotheses.{name}", each) for each in spec["contrasts"]]
        found.append(Hypothesis(name, spec["claim"], tuple(contrasts)))
    return found


def _require_keys(plan: Plan, field: str, spec: Any, needed: set[str], optional: frozenset[str] = frozenset()) -> None:
    keys = set(spec) if isinstance(spec, Mapping) else set()
    if not needed <= keys <= needed | optional:
        raise InputError(
            f"`{plan.path}: {field}` must have the keys {', '.join(sorted(needed))}, "
            f"got {', '.join(sorted(keys)) or repr(spec)}"
        )


def _contrast(plan: Plan, field: str, spec: Mapping[str, Any]) -> Contrast:
    _require_keys(plan, field, spec, {"variant", "expect", "conditions"}, frozenset({"minus", "measure"}))
    found = Contrast(
        spec["variant"], spec.get("minus"), spec.get("measure", "area"), spec["expect"], tuple(spec["conditions"])
    )

    def require(given: str | None, known: Iterable[str]) -> None:
        if given not in known:
            raise InputError(f"`{plan.path}: {field}` must name one of {', '.join(known)}, got {given!r}")

    require(found.measure, MEASURES)
    require(found.expect, get_args(Expectation))
    for condition in found.conditions:
        require(condition, plan.content["conditions"])
        for variant in filter(None, (found.variant, found.minus)):
            require(variant, plan.variants_of(condition))
    if found.expect == "equal" and not plan.content.get("margin", 0) > 0:
        raise InputError(f"`{plan.path}: margin` must be above 0 where a contrast is `equal`, got {field} without one")
    return found


# -- verdicts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """A contrast in one condition.

    Args:
        contrast, condition: what was asked.
        estimate: None where no seed has finished on both sides.
        p: that the opposite of what was seen holds, two-sided; 1 where there is no interval.
        agrees: whether what was seen is what was expected.
        adjusted: p after Holm; None where the condition is not the primary one.
    """

    contrast: Contrast
    condition: str
    estimate: Estimate | None
    p: float
    agrees: bool
    adjusted: float | None = None

    @property
    def verdict(self) -> Verdict:
        """By the adjusted p, elsewhere by the p."""
        p = self.p if self.adjusted is None else self.adjusted
        if p >= ALPHA:
            return "not decided"
        return "supported" if self.agrees else "contradicted"


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p, in the order given (Holm 1979, "A simple sequentially rejective multiple test procedure").

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = highest
    return adjusted


def evidence(found: TwoWay, expect: Expectation, margin: float) -> tuple[float, bool]:
    """Two-sided p of what was seen, and whether that was expected.

    Seen are a mean above or below 0, or for "equal" one inside or outside the margin; p is twice the share of the bootstrap that
    lies on the other side of the bound, inside the margin of the nearer bound. So "equal" is two one-sided tests (Schuirmann
    1987, Journal of Pharmacokinetics and Biopharmaceutics 15), each at half of the level: p below 0.05 is a 95 % interval inside
    the margin, as elsewhere it is one that leaves 0 out. No p is below 2 in the number of draws, for problems are drawn.
    """
    mean, draws = found.mean, len(found.again)

    def twice(share: float) -> float:
        return min(1.0, 2 * (share * draws + 1) / (draws + 1))

    if expect == "equal":
        if abs(mean) < margin:
            return max(twice(found.above(margin)), twice(found.below(-margin))), True
        return twice(found.below(margin) if mean > 0 else found.above(-margin)), False
    return twice(found.below(0.0) if mean > 0 else found.above(0.0)), (mean > 0) == (expect == "above")


def tried(contrast: Contrast, condition: str, outcomes: Outcomes, margin: float) -> Finding:
    """What finished runs say of a contrast in a condition; interval and p are of the same draws."""
    table = outcomes.table(condition, contrast.variant, contrast.minus, contrast.measure)
    if table is None:
        return Finding(contrast, condition, None, 1.0, agrees=False)
    found = two_way(table, draws=outcomes.draws)
    if found is None or not np.ptp(table):  # one seed; or the same value everywhere, which has no spread to test with
        return Finding(contrast, condition, two_way_interval(table, draws=outcomes.draws), 1.0, agrees=False)
    p, agrees = evidence(found, contrast.expect, margin)
    return Finding(contrast, condition, found.estimate(), p, agrees)


def findings(plan: Plan, outcomes: Outcomes) -> dict[str, list[Finding]]:
    """Hypothesis -> its contrasts in their conditions; primary ones adjusted over all that are planned, finished or not."""
    margin = float(plan.content.get("margin", 0))
    pairs = [
        (hypothesis.name, tried(contrast, condition, outcomes, margin))
        for hypothesis in hypotheses_of(plan)
        for contrast in hypothesis.contrasts
        for condition in contrast.conditions
    ]
    primary = [finding for _, finding in pairs if finding.condition == finding.contrast.conditions[0]]
    adjusted = dict(zip(map(id, primary), holm([finding.p for finding in primary]), strict=True))
    found: dict[str, list[Finding]] = {}
    for name, finding in pairs:
        shown = Finding(
            finding.contrast, finding.condition, finding.estimate, finding.p, finding.agrees, adjusted.get(id(finding))
        )
        found.setdefault(name, []).append(shown)
    return found


def verdict(found: Sequence[Finding]) -> Verdict:
    """Of a hypothesis, from its primary contrasts: all supported, or one contradicted."""
    each = [finding.verdict for finding in found if finding.adjusted is not None]
    if "contradicted" in each:
        return "contradicted"
    return "supported" if set(each) == {"supported"} else "not decided"
