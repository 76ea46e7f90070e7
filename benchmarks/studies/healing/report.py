"""docs/healing/models.md: the table, the picture and samples of what is finished, with intervals over seeds and problems."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.pages import part
from benchmarks.studies.cells import interval
from benchmarks.studies.figures import draw_positions, plt, save
from benchmarks.studies.healing.measures import BY_TENTH, MEASURES
from benchmarks.studies.healing.plan import START, Plan
from benchmarks.studies.healing.records import SHORT, Place, Record, is_finished, is_started, read
from lit_opd.compare.document import markdown_table, show
from lit_opd.compare.statistics import Estimate, paired_two_way, two_way_interval
from lit_opd.files import replace_whole

PAGE, PART = "models.md", part("healing-models")
TITLE = "# Two real models healed"
COLORS = ("#202020", "#1f5fa8", "#c4500c", "#2f7d32", "#8e44ad", "#b8860b", "#0f8b8d", "#d1478c")
CHARS = 300  # of a sample that is shown
RESPONSES = ("tokens a response", "ended by itself", "different bigrams")
FIRST, LAST = 0, -1  # tenths of a response
ROW_HEIGHT = 3.2  # inches of a model in the picture
Problems = dict[str, float]  # problem -> value


@dataclass(frozen=True)
class Results:
    """What is finished on one device.

    Args:
        device: its name in the plan.
        planned: how many runs the plan has there.
        starts: model -> record of before training.
        runs: model -> variant -> seed -> record; only what has a run.
    """

    device: str
    planned: int
    starts: dict[str, Record]
    runs: dict[str, dict[str, dict[int, Record]]]

    @property
    def records(self) -> list[Record]:
        """Of all runs."""
        return [record for of in self.runs.values() for seeds in of.values() for record in seeds.values()]


def read_results(plan: Plan, device: str, records: Path) -> Results:
    """The records of this plan's runs.

    Raises:
        InputError: a record of another plan's settings.
    """
    place = Place(plan, Path(), Path(), records)
    jobs = plan.jobs(device)
    runs: dict[str, dict[str, dict[int, Record]]] = {}
    for model in plan.content["models"]:
        for variant in plan.content["variants"]:
            for job in jobs:
                if (job.model, job.variant) == (model, variant) and is_finished(job, place):
                    record = read(place.record(job)) or {}
                    runs.setdefault(model, {}).setdefault(variant, {})[job.seed] = record
    starts = {
        model: read(place.start(device, model)) or {}
        for model in plan.content["models"]
        if is_started(model, device, place)
    }
    return Results(device, len(jobs), starts, runs)


# -- figures -------------------------------------------------------------------------------------------------------------


def by_problem(figures: Mapping[str, Any], measure: str) -> Problems:
    """Problem -> value, in the form that paired intervals take."""
    return {f"{place:04d}": value for place, value in enumerate(figures[measure])}


def level(seeds: Mapping[int, Record], measure: str) -> Estimate:
    """Mean over seeds and problems."""
    return two_way_interval([record["end"][measure] for record in seeds.values()])


def from_reference(ours: Mapping[int, Record], theirs: Mapping[int, Record], measure: str) -> Estimate | None:
    """Difference paired by seed and problem; None without a common seed."""
    both = [{seed: by_problem(record["end"], measure) for seed, record in seeds.items()} for seeds in (ours, theirs)]
    return paired_two_way(*both) if both[0].keys() & both[1].keys() else None


def contrast(results: Results, model: str, ours: str, theirs: str, measure: str) -> Estimate | None:
    """Of a pair of the plan, paired by seed and problem; a start is the same for every seed. None where a side has no run."""
    of, start = results.runs.get(model, {}), results.starts.get(model)
    if ours not in of or (theirs not in of if theirs != START else start is None):
        return None
    other = of[theirs] if theirs != START else {seed: {"end": (start or {})["student"]} for seed in of[ours]}
    return from_reference(of[ours], other, measure)


def bands(seeds: Mapping[int, Record]) -> list[list[float | None]]:
    """Disagreement by tenth, a list a seed."""
    return [record["end"]["bands"] for record in seeds.values()]


# -- the page ------------------------------------------------------------------------------------------------------------


def table(plan: Plan, results: Results, model: str) -> str:
    """A row a variant: levels, then differences from the reference."""
    of, start = results.runs.get(model, {}), results.starts.get(model)
    names = [title.split(",")[0] for title in MEASURES.values()]
    header = ["", "seeds", *MEASURES.values(), *(f"{name} - {plan.reference}" for name in names), *RESPONSES]
    rows: list[list[str]] = []
    if start is not None:
        for who in ("teacher", "student"):
            means = [f"{fmean(start[who][name]):.3f}" if name in start[who] else "" for name in MEASURES]
            name = "(start)" if who == "student" else "(teacher)"
            rows.append([name, "", *means, *[""] * len(names), *_responses([start[who]])])
    for variant, seeds in of.items():
        cells = [show(level(seeds, name)) for name in MEASURES]
        compared = variant != plan.reference and plan.reference in of
        cells += [interval(from_reference(seeds, of[plan.reference], name)) if compared else "" for name in MEASURES]
        rows.append([variant, str(len(seeds)), *cells, *_responses([record["end"] for record in seeds.values()])])
    return markdown_table(header, rows)


def _responses(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Mean tokens of a response; the share that ended by itself; that of different bigrams: mean, lowest and highest run."""
    tokens, ended = ([value for own in found for value in own[name]] for name in ("lengths", "ended"))
    distinct = [own["distinct_2"] for own in found]
    spread = f" ({min(distinct):.3f} to {max(distinct):.3f})" if len(distinct) > 1 else ""
    return [f"{fmean(tokens):.0f}", f"{100 * fmean(ended):.0f} %", f"{fmean(distinct):.3f}{spread}"]


def contrasts_table(plan: Plan, results: Results, model: str) -> str:
    """A row a pair of the plan's contrasts, as far as both sides have runs; empty without one."""
    rows = []
    for ours, theirs in plan.content["contrasts"]:
        found = [contrast(results, model, ours, theirs, name) for name in MEASURES]
        if any(found):
            rows.append([f"{ours} - {theirs}", *map(interval, found)])
    return "\n" + markdown_table(["", *MEASURES.values()], rows) + "\n" if rows else ""


def positions_table(results: Results, model: str) -> str:
    """What is kept by tenth, in the first and the last one, before and after."""
    start, of = results.starts.get(model), results.runs.get(model, {})
    before = {} if start is None else {"(start)": {0: {"end": start["student"]}}}
    rows = [
        [name, *(cell for measure in BY_TENTH for cell in _ends(seeds, measure))]
        for name, seeds in {**before, **of}.items()
    ]
    titles = [MEASURES[name].split(",")[0] for name in BY_TENTH]
    return markdown_table(
        ["", *(f"{title}, {end}" for title in titles for end in ("first tenth", "last tenth", "last - first"))], rows
    )


def tenth(figures: Mapping[str, Any], measure: str, place: int) -> Problems:
    """Problem -> mean in a tenth of its response, where that has a token."""
    return {
        f"{number:04d}": row[place] for number, row in enumerate(figures["tenths"][measure]) if row[place] is not None
    }


def late_from_early(seeds: Mapping[int, Record], measure: str) -> Estimate | None:
    """Last tenth - first tenth, paired by seed and problem; None without a problem that has both in all seeds."""
    last, first = (
        {seed: tenth(record["end"], measure, place) for seed, record in seeds.items()} for place in (LAST, FIRST)
    )
    both = [problems.keys() & first[seed].keys() for seed, problems in last.items()]
    return paired_two_way(last, first) if set.intersection(*map(set, both)) else None


def _ends(seeds: Mapping[int, Record], measure: str) -> list[str]:
    """Means over seeds and problems of both tenths, and their difference."""
    sides = [
        [value for record in seeds.values() for value in tenth(record["end"], measure, place).values()]
        for place in (FIRST, LAST)
    ]
    return [*(f"{fmean(side):.3f}" if side else "" for side in sides), interval(late_from_early(seeds, measure))]


def samples(plan: Plan, results: Results, model: str) -> list[str]:
    """The first held-out problem, answered by the teacher, the damaged student and every variant's first seed."""
    start = results.starts.get(model)
    if start is None:
        return []
    lines = ["", f"> {start['problems'][0]}", ""]
    lines += [f"- {who}: {_cut(start[who]['samples'][0]['sampled'])}" for who in ("teacher", "student")]
    for variant, seeds in results.runs.get(model, {}).items():
        seed = min(seeds)
        lines.append(f"- {variant}, seed {seed}: {_cut(seeds[seed]['end']['samples'][0]['sampled'])}")
    return lines


def _cut(text: str) -> str:
    """One line that Markdown shows as it is."""
    line = " ".join(text.split())
    return "`" + line[:CHARS].replace("`", "'") + ("…`" if len(line) > CHARS else "`")


def about(plan: Plan, results: Results) -> list[str]:
    """What was run, and how to read the intervals."""
    records = results.records
    first = records[0]
    seconds = [record["seconds"] for record in records]
    plans = ", ".join(sorted({record["plan"][:SHORT] for record in records}))
    earlier = sum(record["plan"] != plan.sha for record in records)
    compared = sum(
        (len(of) - 1) * len(MEASURES) for of in results.runs.values() if plan.reference in of and len(of) > 1
    )
    pairs = [(model, *pair) for model in results.runs for pair in plan.content["contrasts"]]
    compared += sum(contrast(results, *pair, name) is not None for pair in pairs for name in MEASURES)
    compared += sum(len(of) for of in results.runs.values()) * len(BY_TENTH)
    return [
        f"{len(records)} of {results.planned} runs, {first['steps']} steps of {first['batch']} prompts, "
        f"{plan.content['new_tokens']} new tokens, plan {plans}. Median training {sorted(seconds)[len(seconds) // 2]:.0f} s "
        f"a run; {'; '.join(sorted({record['machine'] for record in records}))}, {min(r['finished'] for r in records)} to "
        f"{max(r['finished'] for r in records)}.",
        "",
        *(_changed(plan, earlier) if earlier else ()),
        f"A problem counts once, by the mean over the tokens of its response, the end symbol among them; the KL is exact over "
        f"the vocabulary, at temperature 1. Brackets are 95 % intervals over seeds and the {len(plan.held_out)} held-out "
        f"problems at once (two-way bootstrap, Student's t for seeds); one seed has none. They hold what another seed (order, "
        f"training problems, sampling) and other problems of this kind would change, not another model, pruning or learning "
        f"rate. Differences are paired by seed and problem, bold where 0 lies outside. {compared} differences were looked at: "
        f"of so many, about {compared / 20:.1f} would be bold by chance. Right answers are greedy. A tenth is of the response's "
        f"own length; a response without a token there is left out of it. Different bigrams are the share of a run's sampled "
        f"token pairs, all responses pooled, that are no repetition, with the lowest and highest seed; where it is near 0 the "
        f"student repeats itself, and its reverse KL says little.",
    ]


def _changed(plan: Plan, earlier: int) -> list[str]:
    return [
        f"**The plan has changed since:** it is {plan.sha[:SHORT]} now. Made under an earlier one that had the same settings for "
        f"them, and counted: {earlier} {'run' if earlier == 1 else 'runs'}.",
        "",
    ]


def body(plan: Plan, results: Sequence[Results], picture: Mapping[str, str]) -> str:
    """All lines between the markers."""
    lines: list[str] = []
    for own in results:
        lines += ["", f"### On {own.device}", ""]
        if not own.records:
            lines.append(f"None of {own.planned} runs is finished.")
            continue
        lines += about(plan, own)
        for model in own.runs:
            lines += ["", f"**{plan.content['models'][model]['title']}**", "", table(plan, own, model)]
            lines += [contrasts_table(plan, own, model), positions_table(own, model), *samples(plan, own, model)]
        lines += ["", f"![differences from {plan.reference}, and disagreement by position]({picture[own.device]})"]
    return "\n".join(lines[1:]) + "\n"


def draw(plan: Plan, results: Results, path: Path) -> None:
    """A row a model: differences from the reference in reverse KL with intervals, and disagreement by position."""
    models = list(results.runs)
    figure, axes = plt.subplots(
        len(models), 2, figsize=(10, ROW_HEIGHT * len(models)), layout="constrained", squeeze=False
    )
    colors = dict(zip(plan.content["variants"], itertools.cycle(COLORS), strict=False))
    for (left, right), model in zip(axes, models, strict=True):
        of = results.runs[model]
        others = [name for name in of if name != plan.reference] if plan.reference in of else []
        for place, variant in enumerate(others):
            found = from_reference(of[variant], of[plan.reference], "reverse_kl")
            if found is None:
                continue
            left.plot(found.mean, place, "o", color=colors[variant])
            if found.low is not None and found.high is not None:
                left.plot([found.low, found.high], [place, place], color=colors[variant], lw=1.6)
        if others:
            left.axvline(0, color="0.6", lw=0.8)
        else:
            left.text(0.5, 0.5, "nothing to compare yet", ha="center", va="center", transform=left.transAxes)
            left.set_xticks([])
        left.set_yticks(range(len(others)), others)
        left.invert_yaxis()
        left.set(
            xlabel=f"held-out reverse KL - {plan.reference}, nats/token", title=plan.content["models"][model]["title"]
        )
        if model in results.starts:
            draw_positions(right, [results.starts[model]["student"]["bands"]], "0.55", "--")
        for variant, seeds in of.items():
            draw_positions(right, bands(seeds), colors[variant], "-")
            right.plot([], [], color=colors[variant], label=f"{variant} ({len(seeds)})")
        right.set(xlabel="position in the response, %", ylabel="|q - s|, nats/token", title="start (dashes), end")
        right.set_ylim(bottom=0)
        right.legend(frameon=False, fontsize=7, ncols=2)
    save(figure, path)


def write_report(plan: Plan, records: Path, out: Path) -> Path:
    """The page's part between its markers, and a picture for each device with runs; a folder without the page gets one.

    Raises:
        InputError: the page has no place for it, or a record is of other settings.
    """
    page = out / PAGE
    if not page.exists():
        replace_whole(page, f"{TITLE}\n\n{PART.start}\n{PART.end}\n".encode())
    PART.require(page)
    results = [read_results(plan, device, records) for device in plan.content["devices"]]
    pictures = {own.device: f"models_{own.device}.png" for own in results}
    for own in results:
        if own.records:
            draw(plan, own, out / pictures[own.device])
    PART.write(page, body(plan, results, pictures))
    return page
