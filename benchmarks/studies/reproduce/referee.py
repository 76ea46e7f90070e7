"""The report of a plan with hypotheses: verdicts, tables and pictures, made from the committed outcomes alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pages import part
from benchmarks.studies.cells import interval
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
from benchmarks.studies.reproduce.plan import REFERENCE, Plan
from benchmarks.studies.reproduce.report import Chosen, choose, head, models_line, weights_table
from benchmarks.studies.reproduce.results import Record, all_results
from lit_opd.compare.document import markdown_table, show
from lit_opd.compare.statistics import Estimate
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
    "**The study is not finished.** Verdicts are of the seeds that are; runs are made seed by seed, so that every variant of a "
    "condition has about as many. A contrast without two finished seeds counts as not decided and in the adjustment."
)
BY_CHANCE = "Unadjusted 95 % intervals: one in twenty excludes 0 by chance."
CLOSES = "Reverse KL of the last 30 % of a response at the end of training; below 0 is nearer to the teacher. Unadjusted, too."


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
        "### Late KL minus that of uniform: what closes the gap",
        "",
        CLOSES,
        "",
        *overview(plan, outcomes, "late KL"),
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
        f"The contrasts. *Primary* ones have a p adjusted by Holm over all {primary} of them, and the verdict is by it; others "
        f"are read by their own p. Both are two-sided against {ALPHA:g}. Brackets are unadjusted 95 % intervals, bold where they "
        f"exclude 0; a contrast that is expected to be *equal* is held against +-{plan.content.get('margin', 0):g}.",
        "",
        contrast_table(plan, hypotheses, found),
        "",
    ]


def tallied(found: Sequence[Finding]) -> str:
    """What became of a hypothesis's primary contrasts."""
    each = [finding.verdict for finding in found if finding.adjusted is not None]
    return ", ".join(
        f"{each.count(name)} {name}" for name in ("supported", "contradicted", "not decided") if name in each
    )


def contrast_table(plan: Plan, hypotheses: Sequence[Hypothesis], found: Mapping[str, Sequence[Finding]]) -> str:
    """One row a contrast and condition."""
    rows = []
    for hypothesis in hypotheses:
        for each in found[hypothesis.name]:
            planned = len(plan.variants_of(each.condition)[each.contrast.variant])
            seeds = f"{each.estimate.count if each.estimate else 0} of {planned}"
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
                    *(ps if each.estimate else ["", ""]),
                    seeds,
                    each.verdict if each.estimate else "not run",
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
        pictures.draw_differences(versus, folder / differences)
    runs = {name: list(found.values()) for name, found in of.items()}
    pictures.draw_by_position(runs, folder / positions, closest(own))
    return [
        f"### {condition}: {plan.content['conditions'][condition]['about']}",
        "",
        f"{len(records)} of {planned} runs. {models_line(records)} {start_line(records)}",
        "",
        measure_table(order, of, own, versus, ACCURACY),
        "",
        "Divergence from the teacher at the end, nats a token: of the first and of the last 30 % of a response.",
        "",
        measure_table(order, of, own, versus, GAP),
        "",
        weights_table(of, order),
        "",
        *([f"![{condition}: differences from uniform with intervals](pictures/{differences})", ""] if known else []),
        f"![{condition}: divergence, disagreement and weight by position](pictures/{positions})",
        "",
    ]


def closest(own: Mapping[str, Mapping[str, Estimate | None]]) -> list[str]:
    """Variants that a picture names: uniform, and those that end nearest to the teacher at late positions."""

    def late(name: str) -> float:
        estimate = own[name]["late KL"]
        return estimate.mean if estimate else np.inf

    others = sorted((name for name in own if name != REFERENCE), key=late)
    return [*(name for name in own if name == REFERENCE), *others][: pictures.SHOWN]


def start_line(records: Sequence[Record]) -> str:
    """Divergence by position before training."""
    bands = np.array([record["kl_bands"][0][1] for record in records], dtype=float)
    means = np.ma.masked_invalid(bands).mean(0)
    early, late = float(means[:3].mean()), float(means[-3:].mean())
    return f"Before training the reverse KL of the first three tenths of a response is {early:.3f}, of the last three {late:.3f}."


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
        cells = [name, str(len(of[name]))]
        for measure in measures:
            cells.append(show(own[name][measure]))
            if measure in DRAWN:
                cells.append(interval(versus.get(name, {}).get(measure)))
        rows.append(cells)
    return markdown_table(heads, rows)
