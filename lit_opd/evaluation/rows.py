"""``evaluation.jsonl``: one graded sample a line, appended as it comes, read back after a kill."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lit_opd.errors import InputError
from lit_opd.evaluation.grading import Outcome, vote
from lit_opd.evaluation.statistics import NO_VOTE, RIGHT_VOTE
from lit_opd.files import append_whole, whole_file
from lit_opd.streams import stable_hash

UNKNOWN_WEIGHTS = ""  # in files of older runs
_VOTES = 1 << 62


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """One graded sample; the fields are the keys of a line.

    Args:
        set: name of the evaluation set.
        step: optimizer steps the student had seen.
        problem_id: row id in the set.
        sample: 0..samples-1.
        reference: the right answer.
        answer: the answer cut out of the text, None where there is none.
        correct: it equals the reference.
        category: correct, wrong, truncated (unclosed box), timeout (no verdict) or no_answer.
        length: response tokens, the end symbol included.
        finish_reason: a ``FinishReason`` in small letters.
        text: the response.
        problems: problems in this evaluation of the set, after a budget.
        samples: samples a problem; the evaluation is complete with problems x samples lines.
        tokens: tokens the run had sampled for training.
        settings: fingerprint of sampling settings, seed and rendered prompts.
        group: problem_id of the first row with the same problem; "" (files of older runs) is its own.
        weights: mark of the weights that answered; ``UNKNOWN_WEIGHTS`` in files of older runs.
    """

    set: str
    step: int
    problem_id: str
    sample: int
    reference: str
    answer: str | None
    correct: bool
    category: str
    length: int
    finish_reason: str
    text: str
    problems: int
    samples: int
    tokens: int
    settings: str
    group: str = ""
    weights: str = UNKNOWN_WEIGHTS

    @property
    def truncated(self) -> bool:
        """The response did not end with a stop id, or its last box is not closed."""
        return self.finish_reason != "stop" or self.category == Outcome.TRUNCATED

    @property
    def vote(self) -> int:
        """What this sample counts for in a majority vote."""
        if self.answer is None:
            return NO_VOTE
        return RIGHT_VOTE if self.correct else RIGHT_VOTE + 1 + stable_hash(vote(self.answer)) % _VOTES


_FIELDS = [field.name for field in fields(AnswerRow)]
_KEYS = set(_FIELDS) - {"group", "weights"}


class EvaluationFile:
    """The lines of one run. Those of steps that it went back before are in a second file, ``aside``, until it makes such a step
    again with the same weights.

    Args:
        path: created with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.aside = path, path.with_name(f"{path.name}.aside")

    def repair(self) -> None:
        """Cut a last line that a kill left without its end."""
        for path in (self.path, self.aside):
            if path.is_file():
                with path.open("r+b") as file:
                    whole = sum(len(line) for line in file if line.endswith(b"\n"))
                    file.truncate(whole)

    def append(self, rows: Iterable[AnswerRow]) -> None:
        """Add a line a row, written and flushed before this returns.

        Raises:
            OSError: the file cannot be written.
        """
        text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def rows(self, *, aside: bool = False) -> Iterator[AnswerRow]:
        """The lines, one at a time.

        Args:
            aside: after them those that were set aside.
        Raises:
            InputError: a line is broken; file and line are named.
        """
        for path in (self.path, self.aside)[: 1 + aside]:
            yield from (row for _, row in _read(path))

    def set_aside(self, stays: Callable[[AnswerRow], bool]) -> list[int]:
        """Move the lines that are not to stay into ``aside``; the steps they are of, rising.

        Raises:
            InputError: a line is broken, or the disk does not take them; no line is lost.
        """
        return _move(self.path, self.aside, lambda row: not stays(row))

    def take_back(self, wanted: Callable[[AnswerRow], bool]) -> None:
        """Move lines from ``aside`` to the end of the file; raises as ``set_aside`` does."""
        _move(self.aside, self.path, wanted)


def _read(path: Path) -> Iterator[tuple[bytes, AnswerRow]]:
    """Whole lines as they are and as rows; none where there is no file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield line, _row(line, f"{path}:{number}")


def _move(source: Path, target: Path, moves: Callable[[AnswerRow], bool]) -> list[int]:
    """Move lines from the one file to the end of the other, which has them first: a kill in between leaves them in both."""
    steps = {row.step for _, row in _read(source) if moves(row)}
    if steps:
        try:
            append_whole(target, b"".join(line for line, row in _read(source) if moves(row)))
            with whole_file(source) as draft, draft.open("wb") as file:
                file.writelines(line for line, row in _read(source) if not moves(row))
            if not source.stat().st_size:
                source.unlink()
        except OSError as error:
            raise InputError(
                f"`--run_dir` must be a writable folder on a disk with room, but lines of {source} could not be moved to "
                f"{target}: {error}; free some space and give the same command again"
            ) from error
    return sorted(steps)


def _row(line: bytes, where: str) -> AnswerRow:
    try:
        values: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: must be a JSON object ({error}); delete the line or the file") from error
    if not isinstance(values, dict) or not _KEYS <= values.keys():
        missing = sorted(_KEYS - set(values)) if isinstance(values, dict) else sorted(_KEYS)
        raise InputError(f"{where}: not a line of an evaluation.jsonl, it lacks {', '.join(missing[:5])}")
    return AnswerRow(**{name: values[name] for name in _FIELDS if name in values})


@dataclass(frozen=True)
class PastEvaluation:
    """A complete evaluation that a file holds.

    Args:
        set: name of the set.
        step: optimizer steps.
        settings: fingerprint.
        tokens: tokens sampled for training up to then.
        accuracy: avg@k by problem; of repeated problems by the id of the first.
    """

    set: str
    step: int
    settings: str
    tokens: int
    accuracy: dict[str, float]

    @property
    def mean(self) -> float:
        """avg@k of the set, in [0, 1]."""
        return sum(self.accuracy.values()) / len(self.accuracy)


def past_evaluations(rows: Iterable[AnswerRow]) -> list[PastEvaluation]:
    """The complete evaluations, in the order of their first lines; doubled lines count once."""
    correct: dict[tuple[str, int, str], dict[tuple[str, int], tuple[str, bool]]] = defaultdict(dict)
    expected: dict[tuple[str, int, str], tuple[int, int]] = {}
    for row in rows:
        key = (row.set, row.step, row.settings)
        correct[key].setdefault((row.problem_id, row.sample), (row.group or row.problem_id, row.correct))
        expected[key] = (row.problems * row.samples, row.tokens)
    found = []
    for key, samples in correct.items():
        count, tokens = expected[key]
        if len(samples) >= count:
            found.append(PastEvaluation(*key, tokens=tokens, accuracy=_by_problem(samples.values())))
    return found


def _by_problem(samples: Iterable[tuple[str, bool]]) -> dict[str, float]:
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for problem, correct in samples:
        verdicts[problem].append(correct)
    return {problem: sum(values) / len(values) for problem, values in verdicts.items()}
