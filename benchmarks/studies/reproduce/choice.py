"""Which candidates of a search are named: the rule of a plan's ``search.choose``, and its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot
from statistics import fmean

from benchmarks.studies.cells import interval
from benchmarks.studies.reproduce.hypotheses import Outcomes
from benchmarks.studies.reproduce.plan import REFERENCE, Plan
from lit_opd.compare.document import markdown_table
from lit_opd.compare.statistics import Estimate

MEASURE = "area"
RULE = (
    "Named in each group: the candidate with the largest mean over the conditions of the area minus that of uniform, among those "
    "whose unadjusted 95 % interval lies below 0 in no condition. A choice, not a result: the largest "
    "of many is large by chance, too."
)


@dataclass(frozen=True)
class Candidate:
    """A variant's area minus that of uniform.

    Args:
        name: of the variant.
        differences: condition -> estimate, None where one of the two has no finished run.
    """

    name: str
    differences: Mapping[str, Estimate | None]

    @property
    def mean(self) -> Estimate | None:
        """Over the conditions, each counting once; None before all have runs.

        Conditions have problems, models and runs of their own, so the arms of their intervals add up as independent errors do.
        """
        known = [estimate for estimate in self.differences.values() if estimate is not None]
        if len(known) < len(self.differences):
            return None
        mean = fmean(each.mean for each in known)
        below = hypot(*(each.mean - each.low for each in known)) / len(known)
        above = hypot(*(each.high - each.mean for each in known)) / len(known)
        return Estimate(mean, mean - below, mean + above, min(each.count for each in known))

    @property
    def worse(self) -> list[str]:
        """Conditions where the interval lies below 0."""
        return [name for name, each in self.differences.items() if each and each.excludes_zero and each.mean < 0]


def candidates(plan: Plan, outcomes: Outcomes) -> dict[str, list[Candidate]]:
    """Group -> its candidates in the plan's order, in every condition that has runs planned."""
    conditions = [name for name in plan.content["conditions"] if plan.variants_of(name)]

    def of(name: str) -> Candidate:
        return Candidate(name, {each: outcomes.estimate(each, name, REFERENCE, MEASURE) for each in conditions})

    return {
        group: [of(name) for name in names] for group, names in (plan.content["search"].get("choose") or {}).items()
    }


def best(group: list[Candidate]) -> Candidate | None:
    """The one that the rule names; None before a candidate has runs in every condition, or where each lost somewhere."""
    able = [(each.mean.mean, each) for each in group if each.mean is not None and not each.worse]
    return max(able, key=lambda pair: pair[0])[1] if able else None


def choice_lines(plan: Plan, outcomes: Outcomes) -> list[str]:
    """Markdown: the candidates of each group; nothing where the plan chooses nothing."""
    rows = []
    for title, group in candidates(plan, outcomes).items():
        named = best(group)
        for each in group:
            cells = [interval(estimate) for estimate in (each.mean, *each.differences.values())]
            rows.append([title, each.name, *cells, "**named**" if each is named else ""])
    if not rows:
        return []
    conditions = [name for name in plan.content["conditions"] if plan.variants_of(name)]
    return ["### Choice", "", RULE, "", markdown_table(["group", "candidate", "mean", *conditions, ""], rows), ""]
