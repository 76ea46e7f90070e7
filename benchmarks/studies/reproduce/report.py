"""The report: tables and pictures of finished runs, written between the markers of docs/findings.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from benchmarks.pages import part
from benchmarks.studies.cells import interval, spread
from benchmarks.studies.reproduce import pictures
from benchmarks.studies.reproduce.plan import REFERENCE, Plan
from benchmarks.studies.reproduce.results import Record, area, is_finished
from lit_opd.compare.document import markdown_table, show
from lit_opd.compare.statistics import Estimate, mean_interval, paired, reached
from lit_opd.errors import InputError

PART = part("results")
BASE = "base"
SHORT = 12  # digits of a hash that are shown
NOT_TUNED = "**Learning rates were not tuned by variant: all took the rate of the plan's settings.**"
MEAN_OF_CONDITIONS = (
    "Mean: over the conditions, for variants that have all of them. "
    "Its interval is over conditions, which share seeds and problems."
)
NAMED = 6  # run names that a sentence lists


@dataclass(frozen=True)
class Chosen:
    """Which finished runs count under a plan; runs it does not name are another plan's in the same folder.

    Args:
        counted: runs with the settings of this plan.
        older: those of them that were made under another plan, whose own settings have not changed since.
        shared: those of them that are the plan's that this one extends, on purpose.
        other: runs the plan names, made with settings that are not its own; they are left out.
        replaced: earlier results of runs that were made again; they are left out.
        planned: runs in the plan, by condition.
    """

    counted: list[Record]
    older: list[Record]
    shared: list[Record]
    other: list[Record]
    replaced: list[Record]
    planned: dict[str, int]


def choose(plan: Plan, records: Iterable[Record]) -> Chosen:
    """Sort finished runs by whether they are of this plan.

    Args:
        plan: what should have been run.
        records: all lines, oldest first; of a run's results the newest is taken.
    """
    jobs = {job.name: job for job in plan.jobs(("base", "full"))}
    known = [record for record in records if record["run"] in jobs]
    newest = {record["run"]: record for record in known}
    counted = [newest[name] for name, job in jobs.items() if is_finished(job, newest.get(name))]
    below = {job.name: job for job in plan.below.jobs(("base", "full"))} if plan.below else {}
    foreign = [record for record in counted if record["plan"] != plan.sha]
    shared = [record for record in foreign if record["run"] in below and is_finished(below[record["run"]], record)]
    return Chosen(
        counted=counted,
        older=[record for record in foreign if record not in shared],
        shared=shared,
        other=[record for record in newest.values() if not is_finished(jobs[record["run"]], record)],
        replaced=[record for record in known if record is not newest[record["run"]]],
        planned=dict(Counter(job.condition for job in jobs.values())),
    )


def write_report(plan: Plan, records: Sequence[Record], out: Path) -> Path:
    """Write pictures and the part of ``findings.md`` between its markers; returns the page.

    Args:
        plan: what should have been run.
        records: all lines, oldest first.
        out: folder of the page.
    Raises:
        InputError: nothing is finished, or the page has no markers.
    """
    chosen = choose(plan, records)
    if not chosen.counted:
        raise InputError(
            f"`--runs` must hold finished runs of plan {plan.sha[:SHORT]}, got {len(records)} others; make reproduce"
        )
    page = out / plan.page
    PART.require(page)  # before pictures are drawn
    PART.write(page, "\n".join(["", *lines_of(plan, chosen, out / "pictures"), ""]))
    return page


def lines_of(plan: Plan, chosen: Chosen, folder: Path) -> list[str]:
    """The whole part: head, then a section a condition."""
    lines = head(plan, chosen)
    for condition, spec in plan.content["conditions"].items():
        records = [record for record in chosen.counted if record["condition"] == condition]
        if records:
            lines += section(plan, condition, spec["about"], records, chosen.planned[condition], folder)
            lines += factor_table(plan, condition, chosen.counted)
    return lines + tally(plan, chosen.counted) + verdicts(plan, chosen.counted)


# -- where the numbers are from ------------------------------------------------------------------------------------------


def head(plan: Plan, chosen: Chosen) -> list[str]:
    """Plan, machine, dates, cost, and whether the plan changed after results existed."""
    code = sorted({f"`{record['code']}`" for record in chosen.counted})
    cpu = [record["cpu_seconds"] for record in chosen.counted]
    return [
        f"Plan sha256 `{plan.sha}`. {len(chosen.counted)} of {sum(chosen.planned.values())} planned runs are finished"
        f" ({days(chosen.counted)}; {machines(chosen.counted)}; one thread a run, median {median(cpu):.0f} CPU seconds, "
        f"{sum(cpu) / 3600:.1f} CPU hours in all; code {', '.join(code)}).",
        *([] if plan.tuned else [NOT_TUNED]),
        *changes(chosen),
        *([f"Shared with {plan.below.path.name}: {described(chosen.shared)}."] if plan.below and chosen.shared else []),
        "",
    ]


def days(records: Iterable[Record]) -> str:
    """When the runs finished."""
    dates = sorted(record["finished"][:10] for record in records)
    return dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"


def machines(records: Iterable[Record]) -> str:
    """What the runs were made on."""
    return "; ".join(sorted({record["machine"] for record in records}))


def changes(chosen: Chosen) -> list[str]:
    """What to know of runs that were made under another plan, and of results that are shown no more."""
    now = {record["run"]: record["settings"] for record in chosen.counted + chosen.other}
    changed = [record for record in chosen.replaced if record["settings"] != now[record["run"]]]
    repeated = [record for record in chosen.replaced if record["settings"] == now[record["run"]]]
    lines = [] if chosen.shared else ["All of them were made under this plan."]
    if chosen.older or chosen.other or changed:
        lines = ["**The plan changed after results existed.**"]
    if chosen.older:
        lines.append(
            f"Made under another plan, with the settings this one has, and counted: {described(chosen.older)}."
        )
    if chosen.other:
        lines.append(f"Made with settings that are not this plan's, and left out: {described(chosen.other)}.")
    if changed:
        lines.append(f"Made again under other settings, and replaced: {described(changed)}.")
    if repeated:
        lines.append(f"Made again under the same settings, and replaced: {described(repeated)}.")
    return lines


def described(records: Sequence[Record]) -> str:
    """Number, plans and names of runs."""
    plans = ", ".join(sorted({f"`{record['plan'][:SHORT]}`" for record in records}))
    names = ", ".join(record["run"] for record in records[:NAMED])
    return f"{len(records)} runs of plan {plans} ({names}{', ...' if len(records) > NAMED else ''})"


# -- one condition -------------------------------------------------------------------------------------------------------

Value = Callable[[Record], float]


def end_of(name: str) -> Value:
    """Last value of a curve."""
    return lambda record: float(record["curves"][name][-1][1])


MEASURES: dict[str, Value] = {
    "greedy": end_of("greedy"),
    "avg@4": end_of("avg_at_4"),
    "reverse KL": end_of("reverse_kl"),
    "area": area,
}


TALLIED = ("greedy", "area")


def grouped(records: Iterable[Record]) -> dict[str, dict[int, Record]]:
    """Variant -> seed -> run."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        found.setdefault(record["variant"], {})[record["seed"]] = record
    return found


def difference(runs: Mapping[int, Record], reference: Mapping[int, Record], value: Value) -> Estimate | None:
    """Paired by seed; None without a common seed."""
    ours, theirs = ({seed: value(record) for seed, record in group.items()} for group in (runs, reference))
    return paired(ours, theirs) if set(ours) & set(theirs) else None


def section(plan: Plan, condition: str, about: str, records: Sequence[Record], planned: int, folder: Path) -> list[str]:
    """Heading, both tables and both pictures of a condition."""
    of = grouped(records)
    order = [name for name in plan.variants_of(condition) if name in of]
    curves, differences = (f"{plan.pictures}-{condition}-{kind}.png" for kind in ("curves", "differences"))
    runs = {name: list(of[name].values()) for name in order}
    pictures.draw_curves(runs, folder / curves, coloured(runs, plan.content["search"].get("references", ())))
    reference = of.get(REFERENCE, {})
    found = {
        name: {title: difference(of[name], reference, value) for title, value in MEASURES.items()}
        for name in order
        if name != REFERENCE
    }
    known = any(estimate is not None for estimates in found.values() for estimate in estimates.values())
    if known:
        pictures.draw_differences(found, folder / differences)
    return [
        f"### {condition}: {about}",
        "",
        f"{len(records)} of {planned} runs. {models_line(records)}",
        "",
        results_table(of, order, found, plan.content["target"]),
        "",
        weights_table(of, order),
        "",
        f"![{condition}: curves and disagreement by position](pictures/{curves})",
        "",
        *([f"![{condition}: differences from uniform](pictures/{differences})", ""] if known else []),
    ]


def coloured(runs: Mapping[str, Sequence[Record]], references: Sequence[str]) -> list[str]:
    """Variants that a picture of curves names: those with the most seeds, in the plan's order.

    In a search, where all have as many: its references, then those with the largest mean area.
    """

    def rank(name: str) -> tuple[bool, int, float]:
        return name not in references, -len(runs[name]), -fmean(map(area, runs[name])) if references else 0.0

    return sorted(runs, key=rank)[: pictures.SHOWN]


def models_line(records: Sequence[Record], start: str = "") -> str:
    """Where the student starts, with three digits or as ``start`` says, and the models that are not the shipped ones."""
    start = start or f"{fmean(record['curves']['greedy'][0][1] for record in records):.3f}"
    models = {role: about for record in records for role, about in record["models"].items()}
    parts = [f"{about['name']} (greedy {about['greedy']:.3f} on 128 other problems, {about['steps']} steps)"
             for about in models.values()]  # fmt: skip
    return f"The student starts at greedy {start}." + (f" Models: {', '.join(parts)}." if parts else "")


def results_table(
    of: Mapping[str, Mapping[int, Record]],
    order: Sequence[str],
    found: Mapping[str, Mapping[str, Estimate | None]],
    target: float,
) -> str:
    """Ends with standard deviations, then differences from uniform with 95 % intervals."""
    titles = [*MEASURES, f"steps to {target:.2f}", *(f"{title} - {REFERENCE}" for title in MEASURES)]
    rows = []
    for name in order:
        runs = list(of[name].values())
        cells = [spread([value(run) for run in runs]) for value in MEASURES.values()]
        cells.append(steps_to(runs, target))
        cells += [interval(found[name][title]) if name in found else "" for title in MEASURES]
        rows.append([name, str(len(runs)), *cells])
    return markdown_table(["variant", "seeds", *titles], rows)


def factor_table(plan: Plan, condition: str, records: Sequence[Record]) -> list[str]:
    """What the condition's factor does to each variant: minus the same variant in base, if not there the one it is ``like``.

    Only where the models are those of base; elsewhere the runs start from another student.
    """
    if condition == BASE or plan.content["conditions"][condition].get("models"):
        return []
    here, base = (grouped(record for record in records if record["condition"] == name) for name in (condition, BASE))
    rows = []
    for name in here:
        like = name if name in base else plan.content["variants"][name].get("like", name)
        cells = [interval(difference(here[name], base.get(like, {}), value)) for value in MEASURES.values()]
        rows.append([name, f"{BASE}, {like}", *cells])
    table = markdown_table(["variant", "against", *MEASURES], rows)
    return [f"{condition} minus base, paired by seed:", "", table, ""]


def tally(plan: Plan, records: Sequence[Record]) -> list[str]:
    """Every variant against the plan's ``search.references`` in every condition; without them those of several against uniform.

    With the mean over the conditions where a variant has all, each counting once: its interval is over conditions, which share
    seeds and some problems.
    """
    lines: list[str] = []
    named = plan.content["search"].get("references", ())
    for reference, title in ((r, t) for r in named or (REFERENCE,) for t in (TALLIED if named else MEASURES)):
        found = against(plan, records, reference, title)
        shown = found if named else {name: cells for name, cells in found.items() if len(cells) > 1}
        conditions = [c for c in plan.content["conditions"] if any(c in cells for cells in shown.values())]
        if not shown:
            continue
        heads = [*conditions, "mean"] if len(conditions) > 1 else conditions
        lines += [f"### {title} minus that of {reference}", ""]
        lines += [MEAN_OF_CONDITIONS, ""] if len(conditions) > 1 else []
        rows = []
        for name, cells in shown.items():
            row = [interval(cells.get(condition)) for condition in conditions]
            whole = len(cells) == len(conditions)
            mean = interval(mean_interval([each.mean for each in cells.values()])) if whole else ""
            rows.append([name, *[*row, mean][: len(heads)]])
        lines += [markdown_table(["variant", *heads], rows), ""]
    return lines


def against(plan: Plan, records: Sequence[Record], reference: str, title: str) -> dict[str, dict[str, Estimate]]:
    """Variant -> condition -> difference from ``reference`` in one measure, where both have a common seed."""
    found: dict[str, dict[str, Estimate]] = {}
    for condition in plan.content["conditions"]:
        of = grouped(record for record in records if record["condition"] == condition)
        for name in (name for name in plan.content["variants"] if name in of and name != reference):
            estimate = difference(of[name], of.get(reference, {}), MEASURES[title])
            if estimate is not None:
                found.setdefault(name, {})[condition] = estimate
    return found


def verdicts(plan: Plan, records: Sequence[Record]) -> list[str]:
    """By the rule of a confirmation: above every reference in ``search.wins_in`` conditions in one measure, below none in any.

    Nothing where the plan has no ``wins_in``; no verdict before every condition has been run with every seed.
    """
    needed, references = plan.content["search"].get("wins_in"), plan.content["search"].get("references", ())
    if not needed:
        return []
    found = {(title, ref): against(plan, records, ref, title) for title in TALLIED for ref in references}
    rows, conditions = [], list(plan.content["conditions"])
    for name in (name for name in plan.content["variants"] if any(name in cells for cells in found.values())):
        if name in references:
            continue
        of = {title: [found[title, reference].get(name, {}) for reference in references] for title in TALLIED}
        seeds = {c: len(plan.variants_of(c).get(name, ())) for c in conditions}
        known = [c for c in conditions if all(c in cells and cells[c].count == seeds[c] for cells in of[TALLIED[0]])]
        won = {t: [c for c in known if all(side(cells[c]) > 0 for cells in of[t])] for t in TALLIED}
        lost = {t: [c for c in known if any(side(cells[c]) < 0 for cells in of[t])] for t in TALLIED}
        wins = any(len(names) >= needed for names in won.values()) and not any(lost.values())
        verdict = "**confirmed**" if wins else "not confirmed"
        if len(known) < len(conditions):
            verdict = f"open: {len(known)} of {len(conditions)} conditions"
        rows += [[name, t, ", ".join(won[t]) or "none", ", ".join(lost[t]) or "none", verdict] for t in TALLIED]
    heads = ["variant", "measure", "above all references", "below one of them", "verdict"]
    return ["### Verdict", "", markdown_table(heads, rows), ""] if rows else []


def side(estimate: Estimate) -> int:
    """1 or -1 where the interval lies above or below 0, else 0."""
    return (1 if estimate.mean > 0 else -1) if estimate.excludes_zero else 0


def weights_table(of: Mapping[str, Mapping[int, Record]], order: Sequence[str]) -> str:
    """Step scale and cost: learning rate, what was logged of weights and gradients, tokens; means over steps and seeds."""
    titles = {"weight_mean": "mean weight", "weight_ess": "effective sample", "grad_norm": "gradient norm"}
    titles |= {"clip_fraction": "clip fraction"}
    rows = []
    for name in order:
        runs = list(of[name].values())
        cells = [f"{fmean(run['means'][key] for run in runs):.3f}" for key in titles]
        rates = ", ".join(f"{rate:g}" for rate in sorted({run["learning_rate"] for run in runs}))
        cells.append(f"{fmean(run['tokens'] for run in runs) / 1000:.0f}")
        rows.append([name, rates, *cells])
    return markdown_table(["variant", "learning rate", *titles.values(), "thousand tokens"], rows)


def steps_to(runs: Sequence[Record], target: float) -> str:
    """Mean and interval; a run that never reaches the target counts as its last step and makes the mean a lower bound."""
    curves = [tuple(zip(*run["curves"]["greedy"], strict=True)) for run in runs]
    ways = [reached(places, values, target, rising=True) for places, values in curves]
    steps = [places[-1] if way is None else way for way, (places, _) in zip(ways, curves, strict=True)]
    return show(mean_interval(steps, censored=ways.count(None)), 1)
