"""Learning rates by variant: a function of the tuning runs, written into the plan between its markers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.pages import Part
from benchmarks.studies.reproduce.plan import PLAN, Plan, read_plan
from benchmarks.studies.reproduce.results import Record, area
from lit_opd.compare.document import markdown_table
from lit_opd.errors import InputError

PART = Part("# <tuned>", "# </tuned>", option="--plan")


def table_path(plan: Plan) -> Path:
    """Where what was tried stands: beside the plan's file, tuning.md for the committed plan."""
    name = "tuning.md" if plan.path.stem == PLAN.stem else f"{plan.path.stem}-tuning.md"
    return plan.path.parent / name


def scores(records: Sequence[Record]) -> dict[float, tuple[float, float]]:
    """Learning rate -> (area under greedy accuracy, reverse KL at the end), means over the tuning seeds."""
    rates = sorted({float(record["learning_rate"]) for record in records})
    of = {rate: [record for record in records if record["learning_rate"] == rate] for rate in rates}
    return {
        rate: (fmean(map(area, found)), fmean(record["curves"]["reverse_kl"][-1][1] for record in found))
        for rate, found in of.items()
    }


def chosen(records: Sequence[Record], *, tolerance: float) -> float:
    """The smallest rate whose area is at most ``tolerance`` below the largest: what lies closer is noise."""
    found = scores(records)
    best = max(height for height, _ in found.values())
    return min(rate for rate, (height, _) in found.items() if height >= best - tolerance)


def by_variant(plan: Plan, records: Iterable[Record]) -> dict[str, list[Record]]:
    """The tuning runs of this plan, whole.

    Raises:
        InputError: a run is missing, or of other settings.
    """
    known = {record["run"]: record for record in records}
    found: dict[str, list[Record]] = {}
    for job in plan.tuning_jobs():
        record = known.get(job.name)
        if record is None or record["settings"] != job.settings_sha:
            raise InputError(
                f"`tune` must have all its runs finished, got none of this plan for {job.name}; run it again"
            )
        found.setdefault(job.variant, []).append(record)
    return found


def write_rates(plan: Plan, found: dict[str, list[Record]]) -> Plan:
    """Put the chosen rates into the plan's file and the table of what was tried beside it; the new plan."""
    tolerance = tolerance_of(plan)
    lines = [f"  {variant}: {chosen(records, tolerance=tolerance)!r}\n" for variant, records in found.items()]
    block = f"learning_rates:    # tried: {table_path(plan).name}, tuning of plan {plan.untuned_sha[:12]} without its rates\n"
    PART.write(plan.path, block + "".join(lines))
    table_path(plan).write_text(table(plan, found), encoding="utf-8")
    return read_plan(plan.path)


def tolerance_of(plan: Plan) -> float:
    """Areas closer than this count as equal."""
    return float(plan.content["tuning"]["tolerance"])


def table(plan: Plan, found: dict[str, list[Record]]) -> str:
    """Markdown: what was tried for each variant."""
    tuning, seeds = plan.content["tuning"], plan.content["seeds"]["tuning"]
    rates = sorted(map(float, tuning["learning_rates"]))
    steps = next(plan.tuning_jobs()).steps
    lines = [
        "# What `make tune` tried",
        "",
        f"Plan {plan.untuned_sha[:12]} without its learning rates; condition {tuning['condition']}, {steps} steps, "
        f"seeds {seeds}.",
        "An entry is the area under greedy accuracy and, in brackets, the reverse KL at the end. Bold: the chosen rate, the "
        f"smallest whose area is at most {tolerance_of(plan):g} below the largest.",
        "At the edge of the grid a better rate may lie outside.",
        "",
    ]
    rows = []
    for variant, records in found.items():
        best, tried = chosen(records, tolerance=tolerance_of(plan)), scores(records)
        cells = [f"{tried[rate][0]:.3f} ({tried[rate][1]:.2f})" for rate in rates]
        cells = [f"**{cell}**" if rate == best else cell for rate, cell in zip(rates, cells, strict=True)]
        rows.append([variant, *cells, "yes" if best in (rates[0], rates[-1]) else ""])
    heads = ["variant", *(f"{rate:g}" for rate in rates), "at the edge"]
    return "\n".join([*lines, markdown_table(heads, rows)]) + "\n"


def tuning_folder(root: Path) -> Path:
    """Where tuning runs are kept, apart from the others."""
    return root / "tuning"
