"""Evaluations against each other: paired differences, problems that flipped, the way to a target accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_opd.errors import InputError
from lit_opd.evaluation.rows import EvaluationFile, PastEvaluation, past_evaluations
from lit_opd.evaluation.statistics import paired_difference

FILE_NAME = "evaluation.jsonl"


@dataclass(frozen=True)
class Comparison:
    """The complete evaluations of one run; of several with one set and step the last counts.

    Args:
        evaluations: by (set, step).
    """

    evaluations: dict[tuple[str, int], PastEvaluation]

    @classmethod
    def of(cls, evaluations: Sequence[PastEvaluation]) -> Comparison:
        """From what ``past_evaluations`` gives."""
        return cls({(past.set, past.step): past for past in evaluations})

    def at(self, name: str, step: int) -> PastEvaluation | None:
        """The evaluation of a set at a step, None where there is none."""
        return self.evaluations.get((name, step))

    def history(self, name: str) -> list[PastEvaluation]:
        """The evaluations of a set by step."""
        return [past for (found, _), past in sorted(self.evaluations.items()) if found == name]


def read_comparison(path: str, names: Sequence[str]) -> Comparison:
    """Another run's evaluations.

    Args:
        path: its ``evaluation.jsonl`` or its run folder.
        names: sets that will be compared.
    Raises:
        InputError: no such file, a broken line, or none of the sets is in it.
    """
    file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f"`EarlyAIMEEvaluation.compare_to` must be an evaluation.jsonl or a run folder, got {path!r}")
    comparison = Comparison.of(past_evaluations(EvaluationFile(file).rows()))
    found = sorted({name for name, _ in comparison.evaluations})
    if not set(found) & set(names):
        raise InputError(
            f"`EarlyAIMEEvaluation.compare_to` must hold a complete evaluation of one of {', '.join(names)}, got {file} "
            f"with {', '.join(found) or 'none'}"
        )
    return comparison


def difference(name: str, ours: PastEvaluation, theirs: PastEvaluation | None, *, seed: int) -> dict[str, float]:
    """``name``, ``name_low`` and ``name_high``: mean of ours - theirs over the problems of both, avg@k in [-1, 1], and its 95 %
    bootstrap interval; empty where there is nothing to pair.
    """
    found = paired_difference(ours.accuracy, theirs.accuracy, seed=seed) if theirs is not None else None
    return {} if found is None else dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))


def reached(history: Sequence[PastEvaluation], target: float) -> PastEvaluation | None:
    """The first evaluation, by step, whose avg@k is at least ``target``."""
    return next((past for past in sorted(history, key=lambda past: past.step) if past.mean >= target), None)


@dataclass(frozen=True)
class Flip:
    """A problem whose avg@k changed.

    Args:
        problem_id: its id.
        start: avg@k at the first evaluation.
        now: avg@k now.
    """

    problem_id: str
    start: float
    now: float

    @property
    def change(self) -> float:
        """now - start, in [-1, 1]."""
        return self.now - self.start


def flips(start: PastEvaluation, now: PastEvaluation, *, most: int = 10) -> list[Flip]:
    """The up to ``most`` problems whose avg@k changed most, either way; of equal changes the lower start comes first."""
    common = start.accuracy.keys() & now.accuracy.keys()
    changed = [Flip(name, start.accuracy[name], now.accuracy[name]) for name in common]
    changed = [flip for flip in changed if flip.change != 0]
    return sorted(changed, key=lambda flip: (-abs(flip.change), flip.start, flip.problem_id))[:most]
