"""The scores of a rollout batch by the frozen models and by the student, micro-batch by micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from lit_opd.advantage import apply_transforms
from lit_opd.distributed import all_sum, largest, shared_failure
from lit_opd.errors import InputError
from lit_opd.models.sharding import holds_shards
from lit_opd.scoring.model import ScoringModel
from lit_opd.scoring.shared import SharedHead
from lit_opd.scoring.tiles import Head
from lit_opd.step.lists import asked_of, reads_head, states_of, whose_lists
from lit_opd.step.micro_batches import MicroBatches
from lit_opd.step.recipe import Recipe, with_implied
from lit_opd.step.skips import finite
from lit_opd.streams import stable_hash
from lit_opd.teacher.base import Teacher
from lit_opd.types import Chunks, Rollout, TokenScores, TokenSignal, TopK

Rows = list[int]  # row numbers of a batch
Listener = Callable[[str, int, int], None]  # name of a phase, parts done, parts in all

STUDENT_WANTS = {
    "student_entropy": "entropy",
    "student_topk": "topk",
    "token_kl": "token_kl",
}  # as its forward names them
CHUNKS = "chunks.lengths"  # in the buffer: where a teacher with another tokenizer has a score
CANDIDATES = "candidates.ids"  # in the buffer: the tokens that the teacher is asked about
LISTED = "student_at_teacher_topk"
SUMMED = ("student_logprobs", "sampler_logprobs", "reference_logprobs", "student_entropy")  # over the tokens of a chunk
SIGNAL_FIELDS = (
    "student_logprobs", "teacher_logprobs", "reference_logprobs", "student_entropy", "teacher_entropy", "token_kl"
)  # fmt: skip


class ScoreBuffer:
    """Results collected from micro-batches by ``TokenSignal`` field (or "weights", "loss", "clipped"), [B, T] or
    [B, T, K], in the batch's row order; a top-k list is two of them."""

    def __init__(self, mask: Tensor) -> None:
        self.shape = tuple(mask.shape)
        self.values: dict[str, Tensor] = {}
        self.longest_chunk = 1

    def put(self, name: str, rows: Rows, part: Tensor) -> None:
        """Store ``part`` [R, columns, ...], the values ``name`` of ``rows``, without its gradient."""
        part = part.detach()
        if name not in self.values:
            self.values[name] = part.new_zeros(self.shape + part.shape[2:])
        self.values[name][torch.tensor(rows, device=part.device), : part.shape[1]] = part

    def put_scores(self, who: str, rows: Rows, scores: TokenScores) -> None:
        """Store what ``who`` ("student", "teacher", "reference") says of ``rows``, [R, columns, ...] nats."""
        found = {f"{who}_logprobs": scores.logprobs, f"{who}_entropy": scores.entropy, "token_kl": scores.token_kl}
        for name, lists in (("topk", scores.topk), ("candidates", scores.candidates)):
            if lists is not None:
                found |= {f"{who}_{name}.ids": lists.ids, f"{who}_{name}.logprobs": lists.logprobs}
        if scores.listed is not None:
            found[LISTED] = scores.listed
        if scores.chunks is not None:
            found[CHUNKS] = scores.chunks.lengths
            self.longest_chunk = max(self.longest_chunk, scores.chunks.longest)
        for name, value in found.items():
            if value is not None:
                self.put(name, rows, value)

    def chunks(self, rows: Rows, columns: int) -> Chunks | None:
        """The chunks of ``rows`` in the leading columns, [R, columns]; None where every token has a score."""
        return Chunks(self.part(CHUNKS, rows, columns), self.longest_chunk) if CHUNKS in self.values else None

    def signal_fields(self, rows: Rows, columns: int) -> dict[str, Any]:
        """The fields of a ``TokenSignal`` that models gave, [R, columns] of ``rows`` and the leading columns; finite, but for
        log-probs of top-k lists, which may be -inf."""
        cut = {name: value[torch.tensor(rows, device=value.device), :columns] for name, value in self.values.items()}
        fields: dict[str, Any] = {name: finite(cut[name]) for name in SIGNAL_FIELDS if name in cut}
        for name in ("student_topk", "teacher_topk"):
            if f"{name}.ids" in cut:
                logprobs = cut[f"{name}.logprobs"].nan_to_num(neginf=-math.inf)  # no mass is a fair answer
                fields[name] = TopK(ids=cut[f"{name}.ids"], logprobs=logprobs)
        if LISTED in cut:
            fields[LISTED] = cut[LISTED].nan_to_num(neginf=-math.inf)
        return fields

    def part(self, name: str, rows: Rows, columns: int) -> Tensor:
        """The values ``name`` of ``rows`` in the leading columns, [R, columns, ...]."""
        value = self.values[name]
        return value[torch.tensor(rows, device=value.device), :columns]


def leading_columns(signal: TokenSignal, columns: int) -> TokenSignal:
    """A signal [B, T] cut to its leading ``columns``, [B, columns]."""
    changes: dict[str, Any] = {}
    for field in fields(signal):
        value = getattr(signal, field.name)
        if isinstance(value, TopK):
            changes[field.name] = TopK(ids=value.ids[:, :columns], logprobs=value.logprobs[:, :columns])
        elif isinstance(value, Tensor) and value.ndim > 1:
            changes[field.name] = value[:, :columns]
    return replace(signal, **(changes | {"validate": False}))


class Scores:
    """What the models say of one rollout batch. Owns the teacher's hidden states, by micro-batch, from scoring to their last use.

    Args:
        student: scores with gradient where one is wanted.
        scorers: the frozen models by role: "teacher", maybe "reference".
        recipe: what reads the scores.
        rollout: B rows.
        temperature: of sampling and scoring.
        step: optimizer steps made before this batch.
    """

    def __init__(
        self,
        student: ScoringModel,
        scorers: Mapping[str, Teacher],
        recipe: Recipe,
        rollout: Rollout,
        *,
        temperature: float,
        step: int,
    ) -> None:
        self._student, self.scorers, self.recipe = student, scorers, recipe
        self.rollout, self.temperature, self.step = rollout, temperature, step
        self.buffer = ScoreBuffer(rollout.mask)
        self.full: TokenSignal | None = None  # the whole batch's signal, where one scoring pass came first
        self._states: dict[tuple[int, ...], Tensor] = {}  # the teacher's [N, H], by the rows of the micro-batch
        self._gives_states = False  # so its body need not run in the update
        self._lists = whose_lists(
            recipe, self.teacher
        )  # where the objective reads lists in place of the teacher's head

    @property
    def teacher(self) -> Teacher:
        """Whose signal is learned from."""
        return self.scorers["teacher"]

    @property
    def student_model(self) -> ScoringModel:
        """Who scores with gradient."""
        return self._student

    # -- the frozen models -------------------------------------------------------------------------------------------

    def score_frozen(self, batches: MicroBatches, listener: Listener) -> None:
        """Scores of the whole batch by the frozen models, [B, T] into the buffer.

        Raises:
            InputError: a row is over the token budget, memory ran out, or a teacher with another tokenizer scores too few tokens.
            ServerError: a teacher's server failed for good.
        """
        rows, device = list(range(len(self.rollout))), self.rollout.mask.device
        if self._lists == "student":
            self._choose_candidates(batches)
        with shared_failure():  # a row over the budget is every rank's error
            groups = batches.groups(rows)
        most = largest(len(groups), device)  # a collective, which the block below must not hold

        def score(groups: list[Rows]) -> None:
            total = max(most, len(groups))
            for index in range(total):
                self._score_frozen(batches, groups[index] if index < len(groups) else groups[0])
                listener("scoring", index + 1, total)

        with ExitStack() as stack:
            for model in self.scorers.values():
                stack.enter_context(model.on_device(device))
            if not any(holds_shards(model) for model in self.scorers.values()):
                stack.enter_context(shared_failure())  # sharded models talk to each other while they score
            batches.attempt(rows, score, step=self.step + 1, undo=self.forget)
        self.buffer.values.pop(CANDIDATES, None)  # which the teacher's answer has too
        self._require_aligned()

    def _require_aligned(self) -> None:
        """Enough of the batch's tokens, over all ranks, have a score of a teacher with another tokenizer."""
        chunks = self.chunks
        if chunks is None:
            return
        aligned, tokens = all_sum(torch.stack([chunks.lengths.sum(), self.rollout.mask.sum()])).tolist()
        try:
            self.teacher.require_aligned(aligned, tokens)
        except InputError as error:
            error.on_every_rank = True
            raise

    @property
    def chunks(self) -> Chunks | None:
        """The chunks of the whole batch, [B, T]; None where every token has a score."""
        return self.buffer.chunks(list(range(len(self.rollout))), self.rollout.mask.shape[1])

    @property
    def counted(self) -> Tensor:
        """bool [B, T], where the signal has a value: the valid tokens, of a teacher with another tokenizer those that end a
        chunk."""
        chunks = self.chunks
        return self.rollout.mask if chunks is None else self.rollout.mask & chunks.ends

    def _score_frozen(self, batches: MicroBatches, rows: Rows) -> None:
        part = batches.take(rows)
        for who, model in self.scorers.items():
            requires = asked_of(self.recipe, model) if who == "teacher" else frozenset()
            told = who == "teacher" and part.teacher_logprobs is not None and not model.sums_stops
            if told and not requires:
                assert part.teacher_logprobs is not None  # told
                scores = TokenScores(part.teacher_logprobs)  # of the same tokens and weights, from sampling
            elif who == "teacher" and self._lists == "student":
                ids = self.buffer.part(CANDIDATES, rows, part.mask.shape[1])
                scores = model.score_candidates(part, ids, temperature=self.temperature, requires=requires)
            else:
                read = part if who == "teacher" else part.without_teacher_prompts()
                wanted = states_of(self.recipe, requires)
                scores = model.score(read, temperature=self.temperature, requires=wanted)
            self.buffer.put_scores(who, rows, scores)
            if scores.states is not None:
                self._states[tuple(rows)], self._gives_states = scores.states, True

    def _choose_candidates(self, batches: MicroBatches) -> None:
        """The student's likeliest tokens at each position, about which the teacher is asked."""
        k = self.recipe.objective.list_size
        assert k is not None  # what reads no lists asks about none

        def choose(part: Rollout, rows: Rows) -> None:
            scores = self._student(part, temperature=self.temperature, wants=frozenset({"topk"}), top_k=k)
            assert scores.topk is not None
            self.buffer.put(CANDIDATES, rows, scores.topk.ids)

        with torch.no_grad():
            self._each(batches, choose)

    def forget(self, rows: Rows | None = None) -> None:
        """Drop the hidden states of the micro-batch ``rows``, which nothing reads again; of all, where others are cut from now
        on."""
        if rows is None:
            self._states.clear()
        else:
            self._states.pop(tuple(rows), None)

    @property
    def _reads_head(self) -> bool:
        """Whether ``student`` asks for the teacher's output head."""
        scored, trains = self.full is not None, torch.is_grad_enabled()
        return reads_head(self.recipe, self.teacher, scored=scored, trains=trains)

    def teacher_head(self) -> AbstractContextManager[None]:
        """The teacher's weights on the device while the block runs, where its head is read beside the student's: of an offloaded
        one with its hidden states at hand the head alone."""
        if not self._reads_head:
            return nullcontext()
        device = self.rollout.mask.device
        return self.teacher.head_on_device(device) if self._states else self.teacher.on_device(device)

    def whole_head(self) -> AbstractContextManager[None]:
        """Keeps the teacher's head usable for the backward pass of what ``student`` returned."""
        return self.teacher.whole_head()

    # -- the student -------------------------------------------------------------------------------------------------

    def score_student(self, batches: MicroBatches) -> TokenSignal:
        """The student's scores of the whole batch without gradient; returns the signal [B, T] that they complete."""

        def score(part: Rollout, rows: Rows) -> None:
            with self.whole_head():
                self.buffer.put_scores("student", rows, self.student(part, rows))

        with torch.no_grad():
            self._each(batches, score)
        self.full = self.signal(self.rollout, list(range(len(self.rollout))))
        if self.recipe.mini_batches > 1 or not self._reads_head:
            self.forget()  # the update cuts its micro-batches otherwise, or reads no head
        return self.full

    def _each(self, batches: MicroBatches, score: Callable[[Rollout, Rows], None]) -> None:
        """``score`` every micro-batch of the batch by the student, as often on every rank."""

        def all_of(groups: list[Rows]) -> None:
            with self.teacher_head():
                for index in range(largest(len(groups), self.rollout.mask.device)):
                    rows = groups[index] if index < len(groups) else groups[0]
                    score(batches.take(rows), rows)

        batches.attempt(list(range(len(self.rollout))), all_of, step=self.step + 1, undo=self.forget)

    def student(self, part: Rollout, rows: Rows) -> TokenScores:
        """One forward of the student: what the signal still lacks, and the divergence where a gradient is wanted.

        Args:
            part: the micro-batch, R rows.
            rows: its rows in the batch.
        Returns:
            [R, columns] nats by field; log-probs and divergence carry gradient where it is enabled.
        """
        lacking = self.recipe.required if self.full is None else frozenset()
        wants = frozenset(want for name, want in STUDENT_WANTS.items() if name in lacking)
        on_distribution = torch.is_grad_enabled() and "teacher_distribution" in self.recipe.objective.requires
        against: Head | SharedHead | TopK | None = None
        if on_distribution and self._lists is not None:
            against = self._teacher_lists(rows, part.mask.shape[1])
        elif self._reads_head:
            against = self.teacher.full_head(part, states=self._states.get(tuple(rows)))
        scores: TokenScores = self._student(
            part,
            temperature=self.temperature,
            wants=wants,
            against=against,
            divergence=self.recipe.objective.token_divergence if on_distribution else None,
            listed=self._teacher_list(rows, part.mask.shape[1]) if LISTED in lacking else None,
        )
        return scores

    def _teacher_lists(self, rows: Rows, columns: int) -> TopK:
        """What the objective reads in place of the teacher's head."""
        name = "teacher_candidates" if self._lists == "student" else "teacher_topk"
        k = self.recipe.objective.list_size
        assert k is not None  # what reads no lists needs the head
        ids, logprobs = (self.buffer.part(f"{name}.{field}", rows, columns) for field in ("ids", "logprobs"))
        return TopK(ids, logprobs).first(k)

    def _teacher_list(self, rows: Rows, columns: int) -> Tensor:
        """int64 [R, columns, K], the teacher's likeliest tokens of the batch's ``rows``."""
        return self.buffer.part("teacher_topk.ids", rows, columns)

    def nothing(self) -> Tensor:
        """A scalar 0 with a gradient of exactly 0, through the same models as a micro-batch: their collectives must match."""
        part = self.rollout.take([0]).trimmed()
        if self._gives_states:  # such a teacher has no collectives, and no states for this part
            scores: TokenScores = self._student(part, temperature=self.temperature)
        else:
            scores = self.student(part, [0])
        return scores.logprobs.sum() * 0.0

    # -- the signal --------------------------------------------------------------------------------------------------

    def signal(self, part: Rollout, rows: Rows) -> TokenSignal:
        """The signal [R, columns] of ``part``, the batch's ``rows``; 0 in place of what is not finite."""
        columns = part.mask.shape[1]
        values = self.buffer.signal_fields(rows, columns)
        values["sampler_logprobs"] = _sampler_logprobs(part, values["student_logprobs"])
        values = by_chunk(values, part.mask, self.buffer.chunks(rows, columns))
        signal = TokenSignal(**values, **_known(part), step=self.step, validate=False)
        return apply_transforms(list(self.recipe.advantage), signal)

    def student_sums(self, logprobs: Tensor, rows: Rows) -> Tensor:
        """The student's log-probs [R, columns] of the batch's ``rows`` as the signal has them, with their gradient."""
        chunks = self.buffer.chunks(rows, logprobs.shape[1])
        return logprobs if chunks is None else chunks.sums(logprobs)

    def values(self) -> dict[str, Tensor]:
        """Everything that must be finite, and more, as it came from the models: [B, T, ...] by field."""
        return {"sampler_logprobs": self.rollout.sampler_logprobs, **self.buffer.values}


def _sampler_logprobs(part: Rollout, student: Tensor) -> Tensor:
    """[B, T] nats, finite; the student's where the sampler's are not known, so that the importance weight is 1."""
    own = finite(part.sampler_logprobs)
    if part.replayed is None:
        return own
    return torch.where(part.replayed.known.unsqueeze(-1), own, student)


@torch.no_grad()
def student_signal(
    student: ScoringModel, teacher: Teacher, rollout: Rollout, *, temperature: float, reads: frozenset[str], step: int
) -> TokenSignal:
    """The signal of a rollout that is not trained on.

    Args:
        student: scores it.
        teacher: scores it; gives full-vocabulary KL(student || teacher) where it can.
        rollout: B rows.
        temperature: of sampling and scoring.
        reads: optional signal fields that are wanted, of those the teacher provides.
        step: optimizer steps the student has seen.
    Returns:
        [B, T], detached; the advantage is the log ratio, without transforms.
    Raises:
        InputError: a score of a valid token is not finite; the row is named.
    """
    device, full, reads = rollout.mask.device, "token_kl" in teacher.provides, with_implied(reads)
    with teacher.on_device(device):
        theirs = teacher.score(rollout, temperature=temperature, requires=reads & teacher.provides)
    with teacher.on_device(device), teacher.whole_head():
        against = teacher.full_head(rollout, states=theirs.states) if full else None
        wants = frozenset({"token_kl"} if full else ()) | {
            want for name, want in STUDENT_WANTS.items() if name in reads and name != "token_kl"
        }
        listed = theirs.topk.ids if theirs.topk is not None and LISTED in reads else None
        ours = student(rollout, temperature=temperature, wants=wants, against=against, listed=listed)
    values = {
        "student_logprobs": ours.logprobs,
        "teacher_logprobs": theirs.logprobs,
        "sampler_logprobs": rollout.sampler_logprobs,
        "token_kl": ours.token_kl,
        "student_entropy": ours.entropy,
        "teacher_entropy": theirs.entropy,
        "student_topk": ours.topk,
        "teacher_topk": theirs.topk,
        "student_at_teacher_topk": ours.listed,
    }
    return TokenSignal(**by_chunk(values, rollout.mask, theirs.chunks), **_known(rollout), step=step)


def _known(rollout: Rollout) -> dict[str, Any]:
    """Fields of a signal that no model says."""
    return {
        "row_keys": rollout.prompts.row_keys,
        "token_ids": rollout.response_ids,
        "turn": rollout.turn,
        "reward": rollout.reward,
        "group": None if rollout.reward is None else _groups(rollout),
    }


def _groups(rollout: Rollout) -> Tensor:
    """int64 [B], a name of the prompt that is the same on all ranks."""
    names = [stable_hash(row_id) for row_id in rollout.prompts.row_ids]
    return torch.tensor(names, dtype=torch.int64, device=rollout.mask.device)


def by_chunk(values: dict[str, Any], mask: Tensor, chunks: Chunks | None) -> dict[str, Any]:
    """Fields of a signal, its mask among them, with a chunk in place of its tokens.

    Args:
        values: [B, T] nats by field of ``TokenSignal``, the teacher's at the ends of chunks already.
        mask: bool [B, T], valid tokens.
        chunks: None where every token has a score.
    Returns:
        the same fields; with chunks the ``SUMMED`` ones are sums over each chunk, at its last token.
    """
    if chunks is None:
        return values | {"mask": mask}
    sums = {name: chunks.sums(values[name]) for name in SUMMED if values.get(name) is not None}
    return values | sums | {"mask": mask & chunks.ends}
