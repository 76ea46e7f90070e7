"""A replay as a document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_opd.compare.curves import POSITION_LABEL
from lit_opd.compare.document import Document, Interval, Section, Table
from lit_opd.compare.pictures import draw_cosines, draw_weights
from lit_opd.compare.replay import REFERENCES, TENTHS, Replay
from lit_opd.report.charts import Chart, Series

_WEIGHTS = (
    "Mean weight and effective sample size (sum w)^2 / (n sum w^2) are over the tokens that stay in the denominator, the curve "
    "over all sampled tokens (0 where dropped)."
)
_GRADIENTS = (
    "Gradient of the sampled-token policy loss at these responses, against uniform's and against that of the exact "
    "full-vocabulary KL(student || teacher) at the same prefixes, every token alike. Means over the files, with their range; "
    "drawn: the cosine with the exact KL's."
)


def replay_document(found: Replay, folder: Path) -> Document:
    """Draws the pictures into ``folder`` and puts everything together."""
    weights = {name: sums.to_json() for name, sums in found.weights.items()}
    gradients = {name: sums.to_json() for name, sums in found.gradients.items()}
    by_tenth = {name: own["weight_by_tenth"] for name, own in weights.items()}
    about = (*found.notes, _WEIGHTS)
    sections = [
        Section("Weights", about, _weight_table(weights)),
        Section("Weight by position", (), _tenth_table(by_tenth), [draw_weights(by_tenth, folder)], [_chart(by_tenth)]),
    ]
    if gradients:
        cosines = draw_cosines({name: own["cosine"] for name, own in gradients.items()}, folder)
        sections.append(Section("Gradients", (_GRADIENTS,), _gradient_table(gradients), [cosines]))
    sections.append(Section("Files", [str(path) for path in found.files], folded=True))
    data = {
        "kind": "replay",
        "files": [str(path) for path in found.files],
        "strategies": {name: own | {"gradient": gradients.get(name)} for name, own in weights.items()},
        "exact_kl": gradients.get(REFERENCES[1]),
        "notes": found.notes,
    }
    batches = f"{len(found.files)} saved batch{'' if len(found.files) == 1 else 'es'} of rollouts"
    headline = f"{len(weights)} weighting{'' if len(weights) == 1 else 's'} on {batches}"
    brief = [_line(name, own, gradients.get(name)) for name, own in weights.items()]
    return Document("Saved rollouts under other weightings", sections, data, headline, [*brief, *found.notes])


def _line(name: str, weights: dict[str, Any], gradient: dict[str, Any] | None) -> str:
    """One a strategy, for the terminal."""
    text = f"{name}: mean weight {_number(weights['weight_mean'])}, effective size {_number(weights['weight_ess'])}"
    if gradient is not None:
        text += f", cosine with the exact KL's gradient {_number(gradient['cosine'][REFERENCES[1]])}"
    return text


def _chart(by_tenth: dict[str, list[float | None]]) -> Chart:
    centres = [(tenth + 0.5) * 100.0 / TENTHS for tenth in range(TENTHS)]
    series = [Series(name, centres, values, (), (), number) for number, (name, values) in enumerate(by_tenth.items())]
    return Chart("Mean weight (0 where dropped)", POSITION_LABEL, "1 is uniform", series, reference=1.0)


def _weight_table(weights: dict[str, dict[str, Any]]) -> Table:
    keys = ("weight_mean", "weight_ess", "dropped_fraction")
    rows = [[name, *(_number(own[key]) for key in keys)] for name, own in weights.items()]
    return Table(["strategy", "mean", "effective size", "dropped"], rows)


def _tenth_table(by_tenth: dict[str, list[float | None]]) -> Table:
    header = ["strategy", *(f"{10 * tenth}-{10 * tenth + 10} %" for tenth in range(TENTHS))]
    return Table(header, [[name, *map(_number, values)] for name, values in by_tenth.items()])


def _gradient_table(gradients: dict[str, dict[str, Any]]) -> Table:
    rows = [
        [name, _ranged(own["norm"], own["by_file"]["norm"])]
        + [_ranged(own["cosine"][other], own["by_file"]["cosine"][other]) for other in REFERENCES]
        for name, own in gradients.items()
    ]
    drawn = [_spread(own["by_file"]["cosine"][REFERENCES[1]]) for own in gradients.values()]
    return Table(["gradient of", "norm", *(f"cosine with {name}" for name in REFERENCES)], rows, intervals=drawn)


def _spread(values: Sequence[float | None]) -> Interval | None:
    """The mean over the files between the least and the most."""
    known = [value for value in values if value is not None]
    return Interval(sum(known) / len(known), min(known), max(known), True) if known else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _ranged(mean: float | None, values: Sequence[float | None]) -> str:
    """The mean, and the range where there are several files."""
    known = [value for value in values if value is not None]
    if mean is None or len(known) < 2:
        return "-" if mean is None else f"{mean:.4g}"
    return f"{mean:.4g} ({min(known):.4g} to {max(known):.4g})"
