"""One evaluation of one set: samples still missing -> answers -> rows in a file -> metrics, over all ranks."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_opd.distributed import gather_objects, is_rank_zero, rank, shared_failure, world_size
from lit_opd.errors import InputError, memory_for
from lit_opd.evaluation.answering import Answering
from lit_opd.evaluation.grading import Grade, Grader, Outcome
from lit_opd.evaluation.rows import UNKNOWN_WEIGHTS, AnswerRow, EvaluationFile
from lit_opd.evaluation.sets import EvaluationSet
from lit_opd.evaluation.statistics import AnswerStatistics
from lit_opd.evaluation.validation import decoder
from lit_opd.prompts.encoding import collate
from lit_opd.streams import stable_hash
from lit_opd.types import FinishReason, PromptBatch, Rollout

EVALUATION_DOMAIN = 1 << 20  # random streams of evaluation; training uses 0, validation 1, 2, ...
Pair = tuple[int, int]  # (number of the problem in the set's order, sample)
_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a weight


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How answers are sampled.

    Args:
        samples: a problem, >= 1.
        temperature: > 0.
        top_p: nucleus mass in (0, 1].
        top_k: candidates, 0 for all.
        max_new_tokens: response slots, >= 1.
        seed: of the random streams; the same (problem, sample) uses the same stream at every step.
        rows: rows a call of ``generate`` on each rank.
    """

    samples: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    seed: int
    rows: int

    def fingerprint(self, problems: EvaluationSet) -> str:
        """Eight hex digits that change with anything that changes the samples of equal weights, but not with a budget."""
        values = asdict(self) | {"rows": 0}
        prompts = sorted((p.problem_id, p.reference, p.prompt.ids.tolist()) for p in problems.problems)
        return f"{stable_hash(repr((values, prompts))) & 0xFFFFFFFF:08x}"


class SetEvaluation:
    """Evaluates one set.

    Args:
        problems: the set.
        settings: how answers are sampled.
        grader: its worker processes serve all sets.
        file: where rows go.
    """

    def __init__(self, problems: EvaluationSet, settings: AnswerSettings, grader: Grader, file: EvaluationFile) -> None:
        self.problems, self.settings, self.grader, self.file = problems, settings, grader, file
        self.fingerprint = settings.fingerprint(problems)
        number = {problem.problem_id: index for index, problem in enumerate(problems.problems)}
        self._groups = [number[problem.group] for problem in problems.problems]

    def run(self, module: Answering, *, step: int, weights: str, tokens: int, num_problems: int) -> dict[str, float]:
        """Sample and grade what the file does not hold yet; the metrics of the whole evaluation, equal on all ranks.

        Args:
            module: the student's module.
            step: optimizer steps it has seen.
            weights: their mark, see ``weights_mark``; answers of other weights are sampled anew.
            tokens: tokens sampled for training up to now.
            num_problems: the first so many problems are evaluated.
        Returns:
            values by name, see ``AnswerStatistics.compute``.
        Raises:
            InputError: memory ran out, the sampler failed, or a line of the file is broken.
        """
        mine = self._done(step, weights, num_problems) if is_rank_zero() else {}
        done: dict[Pair, AnswerRow] = module.trainer.strategy.broadcast(mine)
        statistics = AnswerStatistics(seed=self.settings.seed).to(module.device)
        statistics.update(**self._columns(done if is_rank_zero() else {}, module.device))
        every = [(problem, sample) for problem in range(num_problems) for sample in range(self.settings.samples)]
        missing = [pair for pair in every if pair not in done]
        batches = list(self._shares(missing))
        for index, share in enumerate(batches):
            grades, rollout, texts = self._answers(module, share)
            shared = {"step": step, "weights": weights, "tokens": tokens, "num_problems": num_problems}
            rows = self._rows(share, grades, rollout, texts, **shared)
            statistics.update(**self._columns(dict(zip(share, rows, strict=True)), module.device))
            everyones = gather_objects(rows)
            if is_rank_zero():
                self.file.append(everyones)
            module.phase(f"evaluating {self.problems.name}", index + 1, len(batches))
        return statistics.compute()

    def seconds_per_row(self, module: Answering) -> float:
        """Wall seconds of one batch over its rows on all ranks; the samples are thrown away."""
        every = [
            (problem, sample)
            for problem in range(len(self.problems.problems))
            for sample in range(self.settings.samples)
        ]
        share = next(self._shares(every))
        start = time.perf_counter()
        self._answers(module, share)
        return (time.perf_counter() - start) / (len(share) * world_size())

    def _done(self, step: int, weights: str, num_problems: int) -> dict[Pair, AnswerRow]:
        """Samples that the file holds, after those that were set aside and are of these weights are back in it."""
        number = {problem.problem_id: n for n, problem in enumerate(self.problems.problems[:num_problems])}
        wanted = (self.problems.name, step, self.fingerprint)

        def of_this(row: AnswerRow) -> bool:
            """A sample that this evaluation would draw, whatever weights gave it."""
            return (
                (row.set, row.step, row.settings) == wanted
                and row.problem_id in number
                and row.sample < self.settings.samples
            )

        self.file.take_back(lambda row: row.weights == weights and of_this(row))
        found = [row for row in self.file.rows() if row.weights in (weights, UNKNOWN_WEIGHTS) and of_this(row)]
        return {(number[row.problem_id], row.sample): replace(row, text="") for row in found}

    def _shares(self, pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
        """This rank's part of every global batch; equally many batches on every rank."""
        world = world_size()
        per_call = self.settings.rows * world
        for batch in range(math.ceil(len(pairs) / per_call)):
            yield list(pairs[batch * per_call : (batch + 1) * per_call][rank() :: world])

    def _answers(self, module: Answering, share: list[Pair]) -> tuple[list[Grade], Rollout, list[str]]:
        """Grades, responses and texts of the pairs; without any, one row is sampled for the other ranks' sake."""
        prompts = self._prompts(module, share or [(0, 0)])
        settings = self.settings
        with memory_for("evaluating", "lower `EarlyAIMEEvaluation.batch` or `EarlyAIMEEvaluation.max_new_tokens`"):
            rollout = module.generate(
                prompts,
                module.sampling_settings(
                    max_new_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    top_k=settings.top_k,
                    seed=settings.seed,
                    step=0,
                    domain=EVALUATION_DOMAIN,
                ),
            )
        texts = decoder(module.tokenizer)(rollout)[: len(share)]
        references = [self.problems.problems[problem].reference for problem, _ in share]
        with shared_failure():
            return self.grader.grade(texts, references, integers=self.problems.integers), rollout, texts

    def _prompts(self, module: Answering, pairs: list[Pair]) -> PromptBatch:
        prompts = [self.problems.problems[problem].prompt for problem, _ in pairs]
        batch = collate(prompts, module.tokenizer.pad_token_id, samples=[sample for _, sample in pairs])
        return batch.to(module.device)

    def _rows(
        self, share: list[Pair], grades: list[Grade], rollout: Rollout, texts: list[str], **shared: Any
    ) -> list[AnswerRow]:
        rows = []
        lengths, reasons = rollout.lengths.tolist(), rollout.finish_reason.tolist()
        for place, ((number, sample), grade) in enumerate(zip(share, grades, strict=True)):
            problem = self.problems.problems[number]
            rows.append(
                AnswerRow(
                    set=self.problems.name,
                    step=shared["step"],
                    problem_id=problem.problem_id,
                    sample=sample,
                    reference=problem.reference,
                    answer=grade.answer,
                    correct=grade.correct,
                    category=str(grade.outcome),
                    length=lengths[place],
                    finish_reason=FinishReason(reasons[place]).name.lower(),
                    text=texts[place],
                    problems=shared["num_problems"],
                    samples=self.settings.samples,
                    tokens=shared["tokens"],
                    settings=self.fingerprint,
                    group=problem.group,
                    weights=shared["weights"],
                )
            )
        return rows

    def _columns(self, rows: dict[Pair, AnswerRow], device: Any) -> dict[str, Tensor]:
        values = {
            "problem": [problem for problem, _ in rows],
            "sample": [sample for _, sample in rows],
            "group": [self._groups[problem] for problem, _ in rows],
            "correct": [row.correct for row in rows.values()],
            "truncated": [row.truncated for row in rows.values()],
            "timeout": [row.category == Outcome.TIMEOUT for row in rows.values()],
            "no_answer": [row.category == Outcome.NO_ANSWER for row in rows.values()],
            "length": [row.length for row in rows.values()],
            "vote": [row.vote for row in rows.values()],
        }
        return {name: torch.tensor(column, dtype=torch.int64, device=device) for name, column in values.items()}


def weights_mark(module: Answering) -> str:
    """Sixteen hex digits of the weights that train, equal on all ranks; other bits give other digits. A collective.

    Every weight is read once where it lies, and its bits are added as whole numbers. Shards are marked as they are cut, so on
    another number of ranks equal weights may have another mark.
    """
    trained = [value.detach() for value in module.parameters() if value.requires_grad]
    local = [value.to_local() if isinstance(value, DTensor) else value for value in trained]
    sums = [value.view(_WHOLE_NUMBERS[value.element_size()]).sum(dtype=torch.int64) for value in local]
    marks = sorted(set(gather_objects([repr([int(value) for value in sums])])))
    return f"{stable_hash(repr(marks)):016x}"


@contextmanager
def undisturbed(module: Answering) -> Iterator[None]:
    """Keep what training relies on: global random states, and the mode of every submodule, even after a failure.

    Lightning's ``isolate_rng`` does not restore after an exception.
    """
    modes = {part: part.training for part in module.modules()}
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
        for part, training in modes.items():
            part.training = training


def require_room(sets: Sequence[EvaluationSet], max_new_tokens: int, window: int | None) -> None:
    """Check that the longest prompt of each set and its response fit the context window.

    Args:
        sets: what is evaluated.
        max_new_tokens: response slots.
        window: tokens, None where it is not known.
    Raises:
        InputError: they do not.
    """
    for loaded in sets:
        if window is not None and loaded.longest_prompt + max_new_tokens > window:
            raise InputError(
                f"`EarlyAIMEEvaluation.max_new_tokens` must leave room in the context window of {window} tokens, got "
                f"{max_new_tokens} after a prompt of {loaded.longest_prompt} in {loaded.name!r}; lower it"
            )
