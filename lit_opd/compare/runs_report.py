"""A comparison of runs as a document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_opd.compare.curves import LABELS, TITLES, curve_chart, position_charts
from lit_opd.compare.differences import QUANTITIES, Cell, ProblemCell, RunsComparison
from lit_opd.compare.document import Document, Section, Table, show
from lit_opd.compare.pictures import draw_curves, draw_positions
from lit_opd.compare.verdict import caution, headline, measured, others, sentence
from lit_opd.compare.verdict import data as verdict_data
from lit_opd.compare.verdict import table as verdict_table

COLUMNS = {
    "end": "end",
    "area_steps": "area over steps",
    "area_tokens": "area over tokens",
    "steps_to_target": "steps to target",
    "tokens_to_target": "tokens to target",
}
DIGITS = {"steps_to_target": 1, "tokens_to_target": 0}
_HOW = (
    "Intervals over seeds are 95 % Student t intervals; differences are paired by seed, and an interval that holds 0 does not "
    "show an effect; an asterisk marks one that leaves it out. Area: mean height of the curve from "
    "the latest first evaluation of a run up to the horizon. Target: first crossing in that part, linear between evaluations; a "
    "run that does not cross by the horizon is censored and counts as the horizon, so that its variant's mean is a lower bound "
    "and differences are those of min(crossing, horizon)."
)
_POSITIONS = (
    "q and s are the log-probs that teacher and student give a sampled token. Lines are means over a variant's runs, bands "
    "their 95 % intervals; the last window of the position profile of each run, and dashed the first one of all."
)
_CURVES = "Means over the seeds of a variant, bands: 95 % intervals of the mean, dotted: the target."
_PROBLEMS = (
    "Differences by seed and problem at each run's last evaluation, averaged over the seeds of a problem; 95 % intervals. "
    "Over problems (bootstrap): how far other problems would agree about these trained students, not how far other seeds "
    "would. Over seeds and problems (two-way bootstrap): how far both would; it needs two seeds, and problems that all of them "
    "have."
)


def runs_document(found: RunsComparison, folder: Path) -> Document:
    """Draws the pictures into ``folder`` and puts everything together, the verdict first."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = measured(found)
    about = (*caution(found), *found.notes)
    sections = [Section("Verdict", about, verdict_table(found, metrics[0]) if metrics else None)]
    sections += [Section(f"{TITLES[metric]} at the end", (), verdict_table(found, metric)) for metric in metrics[1:]]
    sections += _positions(found, folder)
    if found.problems:
        sections.append(Section("By problem", (_PROBLEMS,), _problems(found)))
    sections += _curves(found, folder)
    sections.append(Section("What was compared", (_HOW,), _overview(found), folded=True))
    for metric in metrics:
        if details := _details(found, metric):
            sections.append(
                Section(f"{LABELS[metric]}: areas and targets", _horizons(found, metric), details, folded=True)
            )
    return Document(
        f"Runs compared with {found.baseline}",
        sections,
        _data(found),
        headline=headline(found),
        brief=_brief(found),
    )


def _brief(found: RunsComparison) -> list[str]:
    """For the terminal: a sentence a variant unless the headline is the only one, and the notes."""
    names = others(found)
    sentences = [sentence(found, name) for name in names] if len(names) > 1 else []
    return [*sentences, *caution(found), *found.notes]


def _positions(found: RunsComparison, folder: Path) -> list[Section]:
    charts = position_charts(found)
    picture = draw_positions(charts, folder)
    return [] if picture is None else [Section("Where in the response", (_POSITIONS,), None, [picture], charts)]


def _curves(found: RunsComparison, folder: Path) -> list[Section]:
    """Over steps, and folded over tokens; one picture a metric has both."""
    sections = []
    for axis, title in (("steps", "Over training"), ("tokens", "Over sampled tokens")):
        metrics = [metric for metric in LABELS if axis in found.axes_of(metric)]
        pictures = [draw_curves(found, metric, folder) for metric in metrics] if axis == "steps" else []
        charts = [curve_chart(found, metric, axis) for metric in metrics]
        if charts:
            sections.append(Section(title, (_CURVES,), None, pictures, charts, folded=axis == "tokens"))
    return sections


def _overview(found: RunsComparison) -> Table:
    rows = [
        [
            name,
            ", ".join(str(run.seed) for run in runs),
            *(_range([run.summary[key] for run in runs]) for key in _SPENT),
        ]
        for name, runs in found.variants.items()
    ]
    return Table(["variant", "seeds", *_SPENT], rows)


_SPENT = ("steps", "tokens", "seconds")


def _range(values: list[float]) -> str:
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return low if low == high else f"{low} to {high}"


def _horizons(found: RunsComparison, metric: str) -> list[str]:
    if not (axes := found.axes_of(metric)):
        return []
    target = f"Target {found.targets[metric]:.4g}" if metric in found.targets else "No target"
    start, horizon = (
        ", ".join(f"{ends[metric, axis]:,.0f} {axis}" for axis in axes) for ends in (found.starts, found.horizons)
    )
    later = f", from {start} on" if any(found.starts[metric, axis] for axis in axes) else ""
    return [f"{target}; horizon {horizon}{later}."]


def _details(found: RunsComparison, metric: str) -> Table | None:
    """A row a quantity and variant; what the verdict has is not in it."""
    rows = []
    for quantity in QUANTITIES:
        for variant in found.variants:
            cell = found.cells.get((metric, variant, quantity))
            if cell is None or quantity == "end":
                continue
            pairs = "" if cell.difference is None else str(cell.difference.count)
            own = variant == found.baseline
            rows.append([COLUMNS[quantity], variant, _mean(cell, quantity), "" if own else _gap(cell, quantity), pairs])
    header = ["measure", "variant", "mean", f"difference from {found.baseline}", "pairs"]
    return Table(header, rows, text_columns=(1,)) if rows else None


def _mean(cell: Cell, quantity: str) -> str:
    return show(cell.mean, DIGITS.get(quantity, 3))


def _gap(cell: Cell, quantity: str) -> str:
    """The difference; an asterisk where the interval leaves 0 out."""
    text = show(cell.difference, DIGITS.get(quantity, 3), signed=True)
    return f"{text} *" if cell.difference is not None and cell.difference.excludes_zero else text


def _problems(found: RunsComparison) -> Table:
    rows = [
        [
            name,
            variant,
            str(cell.problems),
            str(cell.seeds),
            f"{cell.mean:.3f}",
            "{:+.3f} [{:+.3f}, {:+.3f}]".format(*cell.difference),
            show(cell.both, 3, signed=True),
        ]
        for (name, variant), cell in found.problems.items()
    ]
    columns = [f"difference from {found.baseline}, over problems", "over seeds and problems"]
    return Table(["set", "variant", "problems", "seeds", "avg@k", *columns], rows)


# -- compare.json ------------------------------------------------------------------------------------------------------


def _data(found: RunsComparison) -> dict[str, Any]:
    return {
        "kind": "runs",
        "baseline": found.baseline,
        "headline": headline(found),
        "verdict": verdict_data(found),
        "targets": found.targets,
        "starts": {f"{metric}/{axis}": value for (metric, axis), value in found.starts.items()},
        "horizons": {f"{metric}/{axis}": value for (metric, axis), value in found.horizons.items()},
        "variants": {
            name: {
                "runs": [{"folder": str(run.folder), "seed": run.seed, "summary": run.summary} for run in runs],
                "metrics": _variant_data(found, name),
                "problems": {key[0]: _problem_data(cell) for key, cell in found.problems.items() if key[1] == name},
            }
            for name, runs in found.variants.items()
        },
        "notes": found.notes,
    }


def _problem_data(cell: ProblemCell) -> dict[str, Any]:
    return {**vars(cell), "both": None if cell.both is None else cell.both.to_json()}


def _variant_data(found: RunsComparison, variant: str) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for (metric, name, quantity), cell in found.cells.items():
        if name == variant:
            data.setdefault(metric, {})[quantity] = _cell_data(cell)
    return data


def _cell_data(cell: Cell) -> dict[str, Any]:
    difference = None if cell.difference is None else cell.difference.to_json()
    return {**cell.mean.to_json(), "difference": difference}
