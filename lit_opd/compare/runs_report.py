"""A comparison of runs as a document."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_opd.compare.differences import QUANTITIES, Cell, RunsComparison
from lit_opd.compare.document import Document, Section, Table, show
from lit_opd.compare.pictures import LABELS, draw_curves

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
    "show an effect. Area: mean height of the curve up to the horizon. Target: first crossing, linear between evaluations; a "
    "run that does not cross by the horizon is censored and counts as the horizon, so that its variant's mean is a lower bound "
    "and differences are those of min(crossing, horizon)."
)
_PROBLEMS = (
    "Differences by problem at each run's last evaluation, averaged over paired seeds; 95 % bootstrap over problems. That "
    "interval says how far other problems would agree about these trained students, not how far other seeds would."
)


def runs_document(found: RunsComparison, folder: Path) -> Document:
    """Draws the pictures into ``folder`` and puts everything together."""
    measured = [metric for metric in LABELS if any(key[0] == metric for key in found.cells)]
    sections = [Section("What was compared", (_HOW, *found.notes), _overview(found))]
    for metric in measured:
        sections += _metric_sections(found, metric, folder)
    if found.problems:
        sections.append(Section("By problem", (_PROBLEMS,), _problems(found)))
    return Document(f"Runs compared with {found.baseline}", sections, _data(found))


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


def _metric_sections(found: RunsComparison, metric: str, folder: Path) -> Iterable[Section]:
    used = [name for name in QUANTITIES if any((metric, variant, name) in found.cells for variant in found.variants)]
    text, pictures = [], []
    if axes := found.axes_of(metric):
        target = f"Target {found.targets[metric]:.4g}" if metric in found.targets else "No target"
        horizons = ", ".join(f"{found.horizons[metric, axis]:,.0f} {axis}" for axis in axes)
        text.append(f"{target}; horizon {horizons}.")
        pictures.append(draw_curves(found, metric, folder))
    others = [variant for variant in found.variants if variant != found.baseline]
    means = [[name, *(_mean(found, metric, name, quantity) for quantity in used)] for name in found.variants]
    pairs = {name: len({run.seed for run in found.variants[name]} & _seeds(found)) for name in others}
    gaps = [[name, str(pairs[name]), *(_gap(found, metric, name, quantity) for quantity in used)] for name in others]
    header = ["variant", *(COLUMNS[quantity] for quantity in used)]
    yield Section(LABELS[metric], text, Table(header, means), pictures)
    if gaps:
        header = [header[0], "pairs", *header[1:]]
        yield Section(f"{LABELS[metric]}: difference from {found.baseline}, paired by seed", (), Table(header, gaps))


def _seeds(found: RunsComparison) -> set[Any]:
    return {run.seed for run in found.variants[found.baseline]}


def _mean(found: RunsComparison, metric: str, variant: str, quantity: str) -> str:
    cell = found.cells.get((metric, variant, quantity))
    return show(None if cell is None else cell.mean, DIGITS.get(quantity, 3))


def _gap(found: RunsComparison, metric: str, variant: str, quantity: str) -> str:
    """The difference; an asterisk where the interval leaves 0 out."""
    cell = found.cells.get((metric, variant, quantity))
    difference = None if cell is None else cell.difference
    text = show(difference, DIGITS.get(quantity, 3), signed=True)
    return f"{text} *" if difference is not None and difference.excludes_zero else text


def _problems(found: RunsComparison) -> Table:
    rows = [
        [
            name,
            variant,
            str(cell.problems),
            str(cell.seeds),
            f"{cell.mean:.3f}",
            "{:+.3f} [{:+.3f}, {:+.3f}]".format(*cell.difference),
        ]
        for (name, variant), cell in found.problems.items()
    ]
    return Table(["set", "variant", "problems", "seeds", "avg@k", f"difference from {found.baseline}"], rows)


# -- compare.json ------------------------------------------------------------------------------------------------------


def _data(found: RunsComparison) -> dict[str, Any]:
    return {
        "kind": "runs",
        "baseline": found.baseline,
        "targets": found.targets,
        "horizons": {f"{metric}/{axis}": value for (metric, axis), value in found.horizons.items()},
        "variants": {
            name: {
                "runs": [{"folder": str(run.folder), "seed": run.seed, "summary": run.summary} for run in runs],
                "metrics": _variant_data(found, name),
                "problems": {key[0]: vars(cell) for key, cell in found.problems.items() if key[1] == name},
            }
            for name, runs in found.variants.items()
        },
        "notes": found.notes,
    }


def _variant_data(found: RunsComparison, variant: str) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for (metric, name, quantity), cell in found.cells.items():
        if name == variant:
            data.setdefault(metric, {})[quantity] = _cell_data(cell)
    return data


def _cell_data(cell: Cell) -> dict[str, Any]:
    difference = None if cell.difference is None else cell.difference.to_json()
    return {**cell.mean.to_json(), "difference": difference}
