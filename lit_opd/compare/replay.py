"""Saved rollouts through any list of strategies: what each weighs where, and which way its gradient points.

Weights come from the stored signal. Where the models are given, everything is scored anew with them, so that a strategy may
also read what was not stored, and each strategy's gradient is compared with uniform's and with the exact one.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lit_opd.compare.gradients import ReplayModels, cosine, dot
from lit_opd.errors import InputError
from lit_opd.masked import lengths, positions
from lit_opd.report.replay import load_record
from lit_opd.types import StepRecord
from lit_opd.weighting import WeightingStrategy
from lit_opd.weighting.uniform import Uniform

TENTHS = 10
GAP_TOLERANCE = 0.01  # nats a token: rounding stays below, another student does not
REFERENCES = ("uniform", "exact KL")


@dataclass
class WeightSums:
    """What a strategy does to the tokens of several batches."""

    tokens: int = 0
    kept: int = 0
    weight: float = 0.0
    square: float = 0.0
    tenths: Tensor = field(default_factory=lambda: torch.zeros(2, TENTHS, dtype=torch.float64))

    def add(self, weights: Tensor, kept: Tensor, mask: Tensor) -> None:
        """Add a batch: three tensors [B, T]."""
        values = weights.double()
        self.tokens += int(mask.sum())
        self.kept += int(kept.sum())
        self.weight += float(values.sum())
        self.square += float(values.square().sum())
        tenth = (2 * positions(mask) - 1) * TENTHS // (2 * lengths(mask).unsqueeze(-1)).clamp(min=1)
        for place, part in enumerate((values, torch.ones_like(values))):
            self.tenths[place].index_add_(0, tenth[mask], part[mask])

    def to_json(self) -> dict[str, Any]:
        """``weight_mean`` and ``weight_ess`` as a run logs them (over kept tokens), the dropped share, the curve."""
        totals, counts = self.tenths.tolist()
        return {
            "weight_mean": self.weight / self.kept if self.kept else None,
            "weight_ess": self.weight**2 / (self.kept * self.square) if self.square else None,
            "dropped_fraction": 1.0 - self.kept / self.tokens if self.tokens else None,
            "weight_by_tenth": [total / count if count else None for total, count in zip(totals, counts, strict=True)],
        }


@dataclass(frozen=True)
class GradientSums:
    """One strategy's gradient at each file: its norm, and its cosine with each of ``REFERENCES``."""

    norms: list[float] = field(default_factory=list)
    cosines: dict[str, list[float | None]] = field(default_factory=lambda: {name: [] for name in REFERENCES})

    def to_json(self) -> dict[str, Any]:
        """Means over the files, and every file's value."""
        return {
            "norm": fmean(self.norms),
            "cosine": {name: _mean(values) for name, values in self.cosines.items()},
            "by_file": {"norm": self.norms, "cosine": self.cosines},
        }


@dataclass(frozen=True)
class Replay:
    """What ``replay_files`` found.

    Args:
        files: what was read.
        weights: by strategy.
        gradients: by strategy, with the exact KL's own entry; empty without models.
        notes: what the reader must know.
    """

    files: list[Path]
    weights: dict[str, WeightSums]
    gradients: dict[str, GradientSums]
    notes: list[str]


def find_files(words: Sequence[str]) -> list[Path]:
    """The files that the words name, each a file or a pattern; those of a pattern by their numbers, step 2 before step 10."""
    return [Path(found) for word in words for found in sorted(glob.glob(word), key=_by_number) or [word]]


def _by_number(path: str) -> list[tuple[int, str]]:
    """Digits count as a number, so that names compare as people read them."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", path)]


def replay_files(
    files: Sequence[Path], strategies: Mapping[str, WeightingStrategy], *, models: ReplayModels | None = None
) -> Replay:
    """Weigh the responses of every file with every strategy.

    Args:
        files: ``rollouts/step-N.safetensors`` of a run.
        strategies: by name.
        models: student and teacher for gradients.
    Raises:
        InputError: a file of another kind, or a strategy that reads what is not there.
    """
    found = Replay(list(files), {name: WeightSums() for name in strategies}, {}, [])
    gaps: dict[Path, dict[str, float]] = {}
    for path in files:
        record = load_record(path)
        if models is None:
            for name, strategy in strategies.items():
                _require_stored(name, strategy, record, path)
                weights, kept = (part(record.signal, record.progress) for part in (strategy, strategy.kept))
                found.weights[name].add(weights, kept, record.signal.mask)
        else:
            gaps[path] = _replay_gradients(found, record, strategies, models)
    return replace(found, notes=_gap_notes(gaps))


def _require_stored(name: str, strategy: WeightingStrategy, record: StepRecord, path: Path) -> None:
    missing = sorted(what for what in strategy.requires if getattr(record.signal, what, None) is None)
    if missing:
        raise InputError(
            f"`--strategies` must read what {path} holds, got {name}, which reads {', '.join(missing)}; give `--student` and "
            "`--teacher` to compute that"
        )


def _replay_gradients(
    found: Replay, record: StepRecord, strategies: Mapping[str, WeightingStrategy], models: ReplayModels
) -> dict[str, float]:
    """One file's weights and gradients, and its gaps; only the two references are held beside the one at hand."""
    again, uniform = models.replay(record, Uniform())
    _, exact = models.replay(record)
    references = dict(zip(REFERENCES, (uniform, exact), strict=True))
    for name, strategy in (*strategies.items(), (REFERENCES[1], None)):
        if strategy is None:
            gradient = exact
        else:
            step, gradient = models.replay(record, strategy)
            found.weights[name].add(step.weights, step.kept, step.signal.mask)
        sums = found.gradients.setdefault(name, GradientSums())
        sums.norms.append(dot(gradient, gradient) ** 0.5)
        for other, reference in references.items():
            sums.cosines[other].append(cosine(gradient, reference))
    return _gaps(record, again)


def _gaps(record: StepRecord, again: StepRecord) -> dict[str, float]:
    """How far the given models are from the stored log-probs, nats a token, where that is more than rounding."""
    found = {}
    for who in ("student", "teacher"):
        stored, new = (getattr(each.signal, f"{who}_logprobs") for each in (record, again))
        gap = float((stored - new).abs().sum() / record.signal.mask.sum().clamp(min=1))
        if gap > GAP_TOLERANCE:
            found[who] = gap
    return found


def _gap_notes(gaps: Mapping[Path, Mapping[str, float]]) -> list[str]:
    """One line a model, however many files."""
    notes = []
    for who in ("student", "teacher"):
        own = {path: found[who] for path, found in gaps.items() if who in found}
        if own:
            low, high = f"{min(own.values()):.2g}", f"{max(own.values()):.2g}"
            where = (
                str(next(iter(own))) if len(own) == 1 else f"{len(own)} of {len(gaps)} files, first {next(iter(own))}"
            )
            notes.append(
                f"{where}: the given {who} is not the one of the run, its log-probs differ by "
                f"{low if low == high else f'{low} to {high}'} nats a token; weights and gradients are those of the given "
                "models at these prefixes."
            )
    return notes


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
