"""A replay as a document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_opd.compare.document import Document, Section, Table
from lit_opd.compare.pictures import draw_cosines, draw_weights
from lit_opd.compare.replay import REFERENCES, TENTHS, Replay

_WEIGHTS = (
    "Mean weight and effective sample size (sum w)^2 / (n sum w^2) are over the tokens that stay in the denominator, the curve "
    "over all sampled tokens (0 where dropped)."
)
_GRADIENTS = (
    "Gradient of the sampled-token policy loss at these responses, against uniform's and against that of the exact "
    "full-vocabulary KL(student || teacher) at the same prefixes, every token alike. Means over the files, with their range."
)


def replay_document(found: Replay, folder: Path) -> Document:
    """Draws the pictures into ``folder`` and puts everything together."""
    weights = {name: sums.to_json() for name, sums in found.weights.items()}
    gradients = {name: sums.to_json() for name, sums in found.gradients.items()}
    files = f"Files: {', '.join(map(str, found.files))}."
    picture = draw_weights({name: own["weight_by_tenth"] for name, own in weights.items()}, folder)
    sections = [Section("Weights", (files, _WEIGHTS, *found.notes), _weight_table(weights), [picture])]
    if gradients:
        cosines = draw_cosines({name: own["cosine"] for name, own in gradients.items()}, folder)
        sections.append(Section("Gradients", (_GRADIENTS,), _gradient_table(gradients), [cosines]))
    data = {
        "kind": "replay",
        "files": [str(path) for path in found.files],
        "strategies": {name: own | {"gradient": gradients.get(name)} for name, own in weights.items()},
        "exact_kl": gradients.get(REFERENCES[1]),
        "notes": found.notes,
    }
    return Document("Saved rollouts under other weightings", sections, data)


def _weight_table(weights: dict[str, dict[str, Any]]) -> Table:
    header = [
        "strategy",
        "mean",
        "effective size",
        "dropped",
        *(f"{10 * tenth}-{10 * tenth + 10} %" for tenth in range(TENTHS)),
    ]
    rows = [
        [
            name,
            *(_number(own[key]) for key in ("weight_mean", "weight_ess", "dropped_fraction")),
            *map(_number, own["weight_by_tenth"]),
        ]
        for name, own in weights.items()
    ]
    return Table(header, rows)


def _gradient_table(gradients: dict[str, dict[str, Any]]) -> Table:
    rows = [
        [name, _ranged(own["norm"], own["by_file"]["norm"])]
        + [_ranged(own["cosine"][other], own["by_file"]["cosine"][other]) for other in REFERENCES]
        for name, own in gradients.items()
    ]
    return Table(["gradient of", "norm", *(f"cosine with {name}" for name in REFERENCES)], rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _ranged(mean: float | None, values: Sequence[float | None]) -> str:
    """The mean, and the range where there are several files."""
    known = [value for value in values if value is not None]
    if mean is None or len(known) < 2:
        return "-" if mean is None else f"{mean:.4g}"
    return f"{mean:.4g} ({min(known):.4g} to {max(known):.4g})"
