"""The report of a plan with hypotheses: verdicts, tables and pictures, made from the committed outcomes alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.pages import part
from benchmarks.studies.cells import interval, seeds_cell
from benchmarks.studies.reproduce import pictures
from benchmarks.studies.reproduce.choice import choice_lines
from benchmarks.studies.reproduce.hypotheses import (
    ALPHA,
    Finding,
    Hypothesis,
    Outcomes,
    findings,
    hypotheses_of,
    verdict,
)
from benchmarks.studies.reproduce.outcomes import unpacked
from benchmarks.studies.reproduce.plan import REFERENCE, Plan
from benchmarks.studies.reproduce.report import Chosen, choose, days, head, machines, models_line, weights_table
from benchmarks.studies.reproduce.results import Record, all_results
from lit_opd.compare.document import markdown_table, show
from lit_opd.compare.statistics import Estimate, mean_interval
from lit_opd.errors import InputError
from lit_opd.files import read_lines, replace_whole

PART = part("results")
DROPPED = {"label", "wall_seconds", "steps"}  # of a record; the rest is what the page is made of
DIGITS = 5  # significant ones, of a learning rate too
LEAST_P = 0.001
ACCURACY = ("area", "greedy", "reverse KL")
GAP = ("early KL", "late KL", "late minus early KL")
DRAWN = ("area", "greedy", "reverse KL", "late KL")
NOT_FINISHED = (
    "**The study is not finished.** Verdicts are of the runs so far and may change. Runs are made seed by seed, so all "
    "variants of a condition have nearly the same number. A contrast with fewer than two finished seeds is not decided; the "
    "adjustment counts it. Each look at an unfinished study is one more chance to find what is not there: the promised error is "
    "that of the whole plan."
)
DIFFERENCES = "mean difference from uniform, 95 % interval over seeds and problems"
HOW_DIFFERENCES = (
    "Each variant minus uniform on the seeds that both have. A line is the unadjusted 95 % interval over seeds and problems: "
    "blue is better, orange is worse, grey contains 0. What lies too far out is written."
)
HOW_POSITIONS = (
    "Means over seeds by tenth of the response, without intervals; one sample of each of 128 validation problems, weights of all "
    "training tokens. In colour: uniform, and the variants that end nearest to the teacher on the last 30 %."
)
BY_CHANCE = "Unadjusted 95 % intervals: of differences that are truly 0, one in twenty excludes it by chance."
HOW_START = (
    "Brackets of greedy are over problems. The divergence here is a mean over tokens, with intervals over seeds; in the tables "
    "every response counts alike."
)
ENDS = (slice(None, 3), slice(-3, None))  # of ten
CLOSES = (
    "Reverse KL of the last 30 % of a response at the end of training, nats a token; below 0 is nearer to the teacher than "
    "uniform is, late in the response; the gap to early tokens may be as wide, since early KL falls too. Intervals are "
    "unadjusted."
)
NARROWS = (
    "Reverse KL of the last 30 % of a response less that of its first 30 %, at the end of training, nats a token, and that "
    "less uniform's; below 0 the gap is narrower than uniform leaves it. No contrast is of these differences. Intervals are "
    "unadjusted."
)
SCALE = (
    "Size of the step and cost, means over steps and seeds. *Effective sample* is the share of the tokens that effectively "
    "count, `train/weight_ess` of [metrics.md](metrics.md); the gradient norm is the one before it is clipped at 1; the "
    "clip fraction is that of the policy's ratio, not of gradients; tokens are all that were sampled."
)


# -- what is committed ---------------------------------------------------------------------------------------------------


def compact(record: Record) -> Record:
    """A record without what the page does not need, rounded: about 4 KB."""
    kept = {key: value for key, value in record.items() if key not in DROPPED}
    kept["curves"] = {name: record["curves"][name] for name in ("greedy", "reverse_kl")}
    kept["bands"] = [record["bands"][0], record["bands"][-1]]
    return dict(_rounded(kept))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def keep(plan: Plan, records: Iterable[Record], path: Path) -> list[Record]:
    """Add finished runs that the plan names to those kept in ``path``; all of them, in the plan's order, oldest first."""
    place = {job.name: number for number, job in enumerate(plan.jobs(("base", "full")))}
    known = {(record["run"], record["finished"]): record for record in read_lines(path)}
    known |= {(record["run"], record["finished"]): compact(record) for record in records if record["run"] in place}
    found = sorted(known.values(), key=lambda record: (place.get(record["run"], len(place)), record["finished"]))
    text = "".join(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n" for record in found)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_whole(path, text.encode())
    return found


def write_referee(plan: Plan, runs: Path, out: Path) -> Path:
    """Keep what has finished, then write pictures and the page from what is kept; returns the page.

    Args:
        plan: with the key ``hypotheses``.
        runs: folder of the runs; one that is not there adds nothing.
        out: folder of the page.
    Raises:
        InputError: nothing is finished, or the page has no markers.
    """
    page = out / plan.page
    PART.require(page)
    chosen = choose(plan, keep(plan, all_results(runs), out / plan.kept))
    if not chosen.counted:
        raise InputError(f"`--runs` or {out / plan.kept} must hold finished runs of plan {plan.sha[:12]}")
    PART.write(page, "\n".join(["", *lines_of(plan, chosen, out / "pictures"), ""]))
    return page


# -- the page ------------------------------------------------------------------------------------------------------------


def lines_of(plan: Plan, chosen: Chosen, folder: Path) -> list[str]:
    """The whole part: head, verdicts, then a section a condition."""
    outcomes, finished = Outcomes(chosen.counted), len(chosen.counted) == sum(chosen.planned.values())
    lines = [*head(plan, chosen), *([] if finished else [NOT_FINISHED, ""])]
    lines += verdict_lines(plan, findings(plan, outcomes)) if hypotheses_of(plan) else []
    lines += choice_lines(plan, outcomes)
    for reference in plan.content["search"].get("references", [REFERENCE]):
        table = overview(plan, outcomes, "area", reference)
        lines += [f"### Area minus that of {reference}", "", BY_CHANCE, "", *table] if table else []
    lines += [
        "### Late KL minus that of uniform",
        "",
        CLOSES,
        "",
        *overview(plan, outcomes, "late KL"),
        "### The gap (late minus early KL) minus that of uniform",
        "",
        NARROWS,
        "",
        *overview(plan, outcomes, "late minus early KL"),
    ]
    for condition, planned in chosen.planned.items():
        records = [record for record in chosen.counted if record["condition"] == condition]
        if records:
            lines += section(plan, condition, records, planned, outcomes, folder)
    return lines


def verdict_lines(plan: Plan, found: Mapping[str, Sequence[Finding]]) -> list[str]:
    """A table of the hypotheses, and one of their contrasts in every condition."""
    hypotheses = hypotheses_of(plan)
    primary = sum(finding.adjusted is not None for each in found.values() for finding in each)
    rows = [
        [each.name, each.claim, f"**{verdict(found[each.name])}**", tallied(found[each.name])] for each in hypotheses
    ]
    return [
        "### Verdicts",
        "",
        markdown_table(["", "hypothesis", "verdict", "primary contrasts"], rows),
        "",
        f"The contrasts. The verdict of a *primary* one is by its adjusted p (Holm over all {primary} of them). The others have "
        "their own p, and their verdicts, in parentheses, decide nothing. Both are two-sided, with the level "
        f"{ALPHA:g}. Brackets are unadjusted 95 % intervals, bold where they exclude 0. A contrast that is expected to be "
        f"*equal* is supported within +-{plan.content.get('margin', 0):g}.",
        "",
        contrast_table(plan, hypotheses, found),
        "",
    ]


def tallied(found: Sequence[Finding]) -> str:
    """What became of a hypothesis's primary contrasts, and how many of them have no run yet."""
    primary = [finding for finding in found if finding.adjusted is not None]
    each, waiting = [finding.verdict for finding in primary], sum(finding.estimate is None for finding in primary)
    names = ("supported", "contradicted", "not decided")
    text = ", ".join(f"{each.count(name)} {name}" for name in names if name in each)
    return text + (f" ({waiting} not run)" if waiting else "")


def seeds_of(plan: Plan, finding: Finding) -> str:
    """Pairs of runs that are finished, of those that are planned."""
    planned = len(plan.variants_of(finding.condition)[finding.contrast.variant])
    return f"{finding.estimate.count if finding.estimate else 0} of {planned}"


def contrast_table(plan: Plan, hypotheses: Sequence[Hypothesis], found: Mapping[str, Sequence[Finding]]) -> str:
    """One row a contrast and condition."""
    rows = []
    for hypothesis in hypotheses:
        for each in found[hypothesis.name]:
            primary = each.adjusted is not None
            cells = [
                hypothesis.name,
                each.contrast.words,
                each.contrast.expect,
                each.condition + (", primary" if primary else ""),
            ]
            ps = [shown(each.p), shown(each.adjusted) if each.adjusted is not None else ""]
            rows.append(
                [
                    *cells,
                    interval(each.estimate),
                    *(ps if each.estimate and each.estimate.low is not None else ["", ""]),
                    seeds_of(plan, each),
                    "not run" if not each.estimate else each.verdict if primary else f"({each.verdict})",
                ]
            )
    heads = ["", "contrast", "expected", "condition", "difference", "p", "adjusted p", "seeds", "verdict"]
    return markdown_table(heads, rows)


def shown(p: float) -> str:
    """A p with three digits.

    >>> shown(0.00002), shown(0.0312)
    ('< 0.001', '0.031')
    """
    return f"< {LEAST_P:g}" if p < LEAST_P else f"{p:.3f}"


def overview(plan: Plan, outcomes: Outcomes, measure: str, reference: str = REFERENCE) -> list[str]:
    """A measure minus that of a reference: variants by conditions."""
    conditions = [name for name in plan.content["conditions"] if (name, reference) in outcomes.runs]
    rows = []
    for name in (name for name in plan.content["variants"] if name != reference):
        cells = [interval(outcomes.estimate(condition, name, reference, measure)) for condition in conditions]
        if any(cells):
            rows.append([name, *cells])
    return [markdown_table(["variant", *conditions], rows), ""] if rows else []


def section(
    plan: Plan, condition: str, records: Sequence[Record], planned: int, outcomes: Outcomes, folder: Path
) -> list[str]:
    """Heading, tables and pictures of a condition."""
    of = {
        name: outcomes.runs[condition, name]
        for name in plan.variants_of(condition)
        if (condition, name) in outcomes.runs
    }
    order = list(of)
    own = {
        name: {measure: outcomes.estimate(condition, name, None, measure) for measure in (*ACCURACY, *GAP)}
        for name in order
    }
    versus = {
        name: {measure: outcomes.estimate(condition, name, REFERENCE, measure) for measure in DRAWN}
        for name in order
        if name != REFERENCE
    }
    differences, positions = (f"{plan.pictures}-{condition}-{kind}.png" for kind in ("differences", "positions"))
    known = any(estimate is not None for each in versus.values() for estimate in each.values())
    if known:
        pictures.draw_differences(versus, folder / differences, f"{condition}: {DIFFERENCES}")
    runs = {name: list(found.values()) for name, found in of.items()}
    pictures.draw_by_position(runs, folder / positions, closest(own))
    return [
        f"### {condition}: {plan.content['conditions'][condition]['about']}",
        "",
        f"{len(records)} of {planned} runs. {start_lines(records)}",
        "",
        measure_table(order, of, own, versus, ACCURACY),
        "",
        "Divergence from the teacher at the end, nats a token: of the first and of the last 30 % of a response.",
        "",
        measure_table(order, of, own, versus, GAP),
        "",
        SCALE,
        "",
        weights_table(of, order),
        "",
        *([f"![{condition}: differences from uniform with intervals](pictures/{differences})", ""] if known else []),
        *([caption(of, records, HOW_DIFFERENCES), ""] if known else []),
        f"![{condition}: divergence, disagreement and weight by position](pictures/{positions})",
        "",
        caption(of, records, HOW_POSITIONS),
        "",
    ]


def caption(of: Mapping[str, Mapping[int, Record]], records: Sequence[Record], how: str) -> str:
    """Below a picture: how it is read, and what its runs are."""
    counts = sorted({len(runs) for runs in of.values()})
    seeds = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    return f"*{how} Seeds a variant: {seeds}; {machines(records)}; {days(records)}.*"


def closest(own: Mapping[str, Mapping[str, Estimate | None]]) -> list[str]:
    """Variants that a picture names: uniform, and those that end nearest to the teacher at late positions."""

    def late(name: str) -> float:
        estimate = own[name]["late KL"]
        return estimate.mean if estimate else np.inf

    others = sorted((name for name in own if name != REFERENCE), key=late)
    return [*(name for name in own if name == REFERENCE), *others][: pictures.SHOWN]


def start_lines(records: Sequence[Record]) -> str:
    """The student before training, and divergence from the teacher by position then and at the end of uniform's runs."""
    right = unpacked(records[0]["right"][0][1], records[0]["problems"])  # greedy, so the same in every run
    text = models_line(records, show(mean_interval([float(each) for each in right])))
    early, late = (show(ends_of(records, 0, end)) for end in ENDS)
    text += (
        f" Before training the reverse KL of the first three tenths of a response is {early}, of the last three {late}"
    )
    trained = [record for record in records if record["variant"] == REFERENCE]
    if trained:
        early, late = (show(ends_of(trained, -1, end)) for end in ENDS)
        text += f"; at the end of {REFERENCE}'s runs {early} and {late}"
    return f"{text}. {HOW_START}"


def ends_of(records: Sequence[Record], validation: int, bands: slice) -> Estimate:
    """Mean of some tenths in the first or last validation, over seeds: before training a seed's runs are alike."""
    by_seed: dict[int, list[float]] = {}
    for record in records:
        values = np.array(record["kl_bands"][validation][1][bands], dtype=float)
        by_seed.setdefault(record["seed"], []).append(float(np.nanmean(values)))
    return mean_interval([fmean(values) for values in by_seed.values()])


def measure_table(
    order: Sequence[str],
    of: Mapping[str, Mapping[int, Record]],
    own: Mapping[str, Mapping[str, Estimate | None]],
    versus: Mapping[str, Mapping[str, Estimate | None]],
    measures: Sequence[str],
) -> str:
    """Each variant's measures with intervals, and their differences from uniform where those are known."""
    heads, rows = ["variant", "seeds"], []
    for measure in measures:
        heads += [measure, *([f"{measure} - {REFERENCE}"] if measure in DRAWN else [])]
    for name in order:
        cells = [name, paired_seeds(len(of[name]), versus.get(name, {}))]
        for measure in measures:
            cells.append(show(own[name][measure]))
            if measure in DRAWN:
                cells.append(interval(versus.get(name, {}).get(measure)))
        rows.append(cells)
    return markdown_table(heads, rows)


def paired_seeds(count: int, differences: Mapping[str, Estimate | None]) -> str:
    """Seeds of a row; uniform has no differences."""
    pairs = {estimate.count if estimate else 0 for estimate in differences.values()}
    return seeds_cell(count, min(pairs, default=None))
