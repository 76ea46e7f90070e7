"""A teacher with another tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lit_opd.errors import InputError, require
from lit_opd.models.sharding import Placement
from lit_opd.models.spelling import Spelling
from lit_opd.models.student import StudentSettings
from lit_opd.models.vocabulary import agree_vocabularies, configured_stops, num_used, unused_ids
from lit_opd.scoring.model import ScoringModel
from lit_opd.scoring.shared import SharedHead
from lit_opd.scoring.tiles import Head
from lit_opd.teacher.alignment import AlignedRow, Aligner
from lit_opd.teacher.base import Teacher
from lit_opd.teacher.end_of_turn import end_of_turn, roles
from lit_opd.teacher.local import LocalTeacher
from lit_opd.types import Chunks, Layout, Rollout, TokenScores

Scored = Literal["single", "sum"]


class AlignedTeacher(Teacher):
    """A teacher of another tokenizer family: it reads its own prompt and its own tokenisation of the response.

    Both tokenisations of a response are aligned by the bytes that their tokens spell, into minimal chunks. The teacher's prompt
    is rendered by its own chat template. Special tokens are mapped by role: what ends the student's answers is the teacher's end
    of turn. What is in no chunk (bytes that are no UTF-8, special tokens that only the student has, what lies beyond the
    teacher's context window) has no score and leaves every denominator.

        single : a chunk of one token each, q_t = log-prob of that token; other chunks have no score either
        sum    : any chunk c, q = sum of the teacher's log-probs in it, at the chunk's last token; the student's side is the sum
                 of its own over the chunk, and so A = sum_{j in c} q_j - sum_{t in c} s_t

    With "sum" everything that reads the signal sees a chunk as one token at the column of its last one: s, the sampler's and the
    reference's log-probs and the entropies are sums over the chunk, the importance ratio is the chunk's, positions count chunks,
    and the gradient goes through all of its tokens.

    Entropies are over each model's own vocabulary. ``Divergence`` reads the tokens that both vocabularies spell alike, and one
    bucket for all others, with "single" only.

    Args:
        teacher: a ``LocalTeacher`` or ``RemoteTeacher``; any that has a tokenizer of its own.
        chunks: "single" or "sum".
        min_aligned: least share of a batch's tokens that must have a score, in [0, 1].
        end_token: the teacher's end of turn, where its chat template and configuration do not say.
    Raises:
        InputError: a value outside its range, or a teacher that reads the student's tokens.
    """

    def __init__(
        self, teacher: Teacher, chunks: Scored = "single", min_aligned: float = 0.8, end_token: str | None = None
    ) -> None:
        super().__init__()
        require(chunks in get_args(Scored), "AlignedTeacher.chunks", "single or sum", chunks)
        number = isinstance(min_aligned, int | float) and not isinstance(min_aligned, bool)
        require(number and 0 <= min_aligned <= 1, "AlignedTeacher.min_aligned", "in [0, 1]", min_aligned)
        for part in teacher.modules():
            if isinstance(part, AlignedTeacher) or (isinstance(part, Teacher) and part.shares_student):
                raise InputError(
                    f"`AlignedTeacher.teacher` must have a tokenizer of its own, got {type(part).__name__}; take a LocalTeacher "
                    "or a RemoteTeacher"
                )
        self.teacher, self.chunks, self.min_aligned, self.end_token = teacher, chunks, min_aligned, end_token
        self._student_tokenizer: Any = None

    # -- what is known without weights -------------------------------------------------------------------------------

    @property
    def inner(self) -> Teacher:
        """The wrapped teacher, which errors call by its own setting."""
        self.teacher.field = f"{self.field}.teacher"
        return self.teacher

    @property
    def provides(self) -> frozenset[str]:
        """Its entropies, and with "single" what both vocabularies share of a model in this process."""
        found = self.inner.provides & {"teacher_entropy"}
        if self.chunks == "single" and isinstance(self.teacher, LocalTeacher):
            found |= {"teacher_distribution"}
        return found

    def tokenizers(self) -> list[Any]:
        """None that must be the student's."""
        return []

    def revision(self) -> str | None:
        """Of the wrapped teacher's files."""
        return self.inner.revision()

    @cached_property
    def prompt_tokenizer(self) -> Any:
        """The teacher's, which all models behind it share."""
        pairs = self.inner.tokenizers()
        first = pairs[0][0]
        for tokenizer, rows in pairs:
            agree_vocabularies(first, tokenizer, student_rows=rows, teacher_rows=rows, field=f"{self.inner.field}.path")
        return first

    def know_tokenizer(self, tokenizer: Any) -> None:
        """The student's, with which responses are spelled."""
        if tokenizer is not self._student_tokenizer:
            self._student_tokenizer = tokenizer
            self._forget()

    def know_stop_ids(self, ids: tuple[int, ...]) -> None:
        """The student's; the wrapped teacher is told its own at ``load``."""
        if ids != self.stop_ids:
            self.stop_ids = ids
            self._forget()

    def _forget(self) -> None:
        self.__dict__.pop("aligner", None)
        self.__dict__.pop("_pairs", None)

    def know_longest_row(self, tokens: int | None) -> None:
        """In the student's tokens; how many the teacher's are is not known before."""
        self.longest_row = tokens

    @cached_property
    def aligner(self) -> Aligner:
        """Of the two tokenizers."""
        if self._student_tokenizer is None or not self.stop_ids:
            raise RuntimeError("AlignedTeacher.know_tokenizer and know_stop_ids have not been called")
        theirs = self.prompt_tokenizer
        student = Spelling.of(self._student_tokenizer, "model.student.path")
        teacher = Spelling.of(theirs, f"{self.inner.field}.path")
        mapped = roles(
            student.special,
            teacher.special,
            stops=self.stop_ids,
            teacher_stops=configured_stops(theirs.name_or_path, theirs),
            end=end_of_turn(theirs, self.field, self.end_token),
        )

        def encode(text: str) -> list[int]:
            return list(theirs(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])

        return Aligner(student, teacher, encode, mapped)

    def aligned_fraction(self, texts: Sequence[Sequence[int]]) -> tuple[int, int]:
        """How many tokens of ``texts`` would have a score, and how many there are; those that spell nothing are in neither.

        Args:
            texts: token ids of the student.
        """
        scored = total = 0
        for ids in texts:
            text = [self.aligner.is_text(token) for token in ids]
            row = self._scored(self.aligner.row(ids))
            scored += sum(chunk.student_end - chunk.student for chunk in row.chunks if text[chunk.student])
            total += sum(text)
        return scored, total

    def require_aligned(self, aligned: int, tokens: int) -> None:
        """See ``Teacher.require_aligned``."""
        if tokens and aligned / tokens < self.min_aligned:
            more = "set `chunks: sum` to score chunks of several tokens too, " if self.chunks == "single" else ""
            raise InputError(
                f"`{self.field}.min_aligned` must be at most the share of tokens that the teacher scores, {aligned / tokens:.3f} "
                f"({aligned} of {tokens}), got {self.min_aligned}; {more}choose a teacher whose tokenizer is nearer to the "
                "student's, or lower it"
            )

    def check(self, *, temperature: float, tokens: int | None) -> None:
        """Check the wrapped teacher."""
        self.inner.check(temperature=temperature, tokens=tokens)

    def check_data(self, rows_by_teacher: dict[str | None, str]) -> None:
        """Ask the wrapped teacher."""
        self.inner.check_data(rows_by_teacher)

    def check_student(self, settings: StudentSettings) -> None:
        """Ask the wrapped teacher."""
        self.inner.check_student(settings)

    # -- weights -----------------------------------------------------------------------------------------------------

    def attach(self, student: ScoringModel) -> None:
        """Nothing of the student's numbering holds for the teacher."""

    def _tell(self) -> int:
        """What the wrapped teacher must know before it loads; its vocabulary."""
        tokenizer, ends = self.prompt_tokenizer, {self.aligner.roles[stop] for stop in self.stop_ids}
        self.inner.know_unused_ids(unused_ids(tokenizer))
        self.inner.know_stop_ids(tuple(sorted(ends)))
        return num_used(tokenizer)

    def load(self, *, vocabulary: int) -> None:
        """Load the wrapped teacher; its own vocabulary counts."""
        self.inner.load(vocabulary=self._tell())

    def shard(self, place: Placement) -> None:
        """Shard the wrapped teacher."""
        self.inner.shard(place)

    def load_sharded(self, place: Placement, *, vocabulary: int) -> None:
        """Load and shard the wrapped teacher; its own vocabulary counts."""
        self.inner.load_sharded(place, vocabulary=self._tell())

    def on_device(self, device: torch.device) -> AbstractContextManager[None]:
        """That of the wrapped teacher."""
        return self.inner.on_device(device)

    def head_on_device(self, device: torch.device) -> AbstractContextManager[None]:
        """That of the wrapped teacher."""
        return self.inner.head_on_device(device)

    def whole_head(self) -> AbstractContextManager[None]:
        """That of the wrapped teacher."""
        return self.inner.whole_head()

    # -- scores ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self, rollout: Rollout, *, temperature: float = 1.0, requires: frozenset[str] = frozenset()
    ) -> TokenScores:
        """Log-probs of chunks (entropies where required), [B, T] nats, and which chunks; see ``Teacher.score``."""
        read = self._read(rollout)
        theirs = self.inner.score(read.rollout, temperature=temperature, requires=requires)
        return TokenScores(
            logprobs=read.at_student(theirs.logprobs),
            entropy=None if theirs.entropy is None else read.at_student(theirs.entropy),
            states=theirs.states,
            chunks=read.chunks,
        )

    @torch.no_grad()
    def full_head(self, rollout: Rollout, *, states: Tensor | None = None) -> SharedHead:
        """What both vocabularies share at the N valid tokens of the student, from hidden states [N', H] of the teacher."""
        read = self._read(rollout)
        head = self.inner.full_head(read.rollout, states=states)
        assert isinstance(head, Head)  # a model in this process
        student, teacher = (torch.tensor(ids, device=head.hidden.device) for ids in self._pairs)
        empty = head.hidden.new_zeros((1, head.hidden.shape[-1]))  # for a batch of which the teacher reads nothing
        return SharedHead(
            replace(head, hidden=torch.cat([head.hidden, empty])),
            read.places,
            student,
            teacher,
            len(set(self._student_tokenizer.get_vocab().values())),
        )

    @cached_property
    def _pairs(self) -> tuple[list[int], list[int]]:
        """Ids of the student and of the teacher that mean the same, the student's in order; each id at most once."""
        ours, theirs = self.aligner.student, self.aligner.teacher
        mapped, end = self.aligner.roles, self._student_tokenizer.eos_token_id
        there = {spelled: number for number, spelled in _distinct(theirs)}
        found = {number: there[text] for number, text in _distinct(ours) if text in there and number not in mapped}
        taken = set(found.values())
        for number, other in sorted(mapped.items(), key=lambda pair: pair[0] != end):
            if other not in taken:
                found[number] = other
                taken.add(other)
        return sorted(found), [found[number] for number in sorted(found)]

    def _read(self, rollout: Rollout) -> _Read:
        """The responses as the teacher reads them."""
        prompts, layout = rollout.prompts, rollout.layout
        if prompts.teacher_ids is None or layout.teacher is None:
            raise InputError(
                "`PromptBatch.teacher_ids` must be the prompts in the teacher's tokens for an AlignedTeacher, got none; take "
                "PromptDataModule, or encode them with `prompt_tokenizer`"
            )
        ids = rollout.response_ids.cpu()
        rows = []
        for row, (valid, prompt) in enumerate(zip(layout.response, layout.teacher, strict=True)):
            found = self._scored(self.aligner.row(ids[row][torch.from_numpy(valid)].tolist()))
            rows.append(_cut(found, self._room(int(prompt.sum()))))
        return _Read.of(rollout, rows)

    def _scored(self, row: AlignedRow) -> AlignedRow:
        """Without the chunks that have no score."""
        if self.chunks == "sum":
            return row
        return AlignedRow(row.teacher_ids, [chunk for chunk in row.chunks if chunk.single])

    def _room(self, prompt: int) -> int | None:
        """Tokens of a response that the teacher reads after ``prompt`` tokens; None for all."""
        window = self.inner.window
        return None if window is None else max(window - prompt, 0)


def _distinct(spelling: Spelling) -> Iterator[tuple[int, bytes]]:
    """(id, bytes) of every token that spells something, one for each spelling: byte tokens stand back, then later ids."""
    found: dict[bytes, int] = {}
    order = sorted(range(len(spelling.spelled)), key=lambda number: (number in spelling.byte_tokens, number))
    for number in order:
        spelled = spelling.spelled[number]
        if spelled:
            found.setdefault(spelled, number)
    return ((number, spelled) for spelled, number in found.items())


def _cut(row: AlignedRow, room: int | None) -> AlignedRow:
    """The first ``room`` tokens of the teacher, and the chunks within."""
    if room is None or len(row.teacher_ids) <= room:
        return row
    return AlignedRow(row.teacher_ids[:room], [chunk for chunk in row.chunks if chunk.teacher_end <= room])


@dataclass(frozen=True, eq=False)
class _Read:
    """A rollout in the teacher's tokens, and where its scores belong.

    Args:
        rollout: B rows of T' tokens of the teacher.
        chunks: those of the student's tokens, [B, T].
        teacher_chunks: the same, of the teacher's, [B, T'].
        columns: int64 [B, T], where a chunk ends the column of the teacher's last token in it, else 0.
        places: int64 [N], for each valid token of the student the place among the teacher's valid tokens of the one that ends its
            chunk; after them all where no chunk ends.
    """

    rollout: Rollout
    chunks: Chunks
    teacher_chunks: Chunks
    columns: Tensor
    places: Tensor

    @staticmethod
    def of(rollout: Rollout, rows: list[AlignedRow]) -> _Read:
        """On the rollout's device; worked out on the host."""
        response, device = torch.from_numpy(rollout.layout.response), rollout.mask.device
        counts = torch.tensor([len(row.teacher_ids) for row in rows], dtype=torch.int64)
        shape = (len(rows), max(1, int(counts.max())))
        valid = torch.arange(shape[1]) < counts.unsqueeze(-1)
        ids, theirs = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        ids[valid] = torch.tensor([token for row in rows for token in row.teacher_ids], dtype=torch.int64)
        ours, columns = torch.zeros(response.shape, dtype=torch.int64), torch.zeros(response.shape, dtype=torch.int64)
        for number, row in enumerate(rows):
            if row.chunks:
                column = response[number].nonzero().squeeze(-1)
                start, end, first, last = torch.tensor(row.chunks).unbind(-1)
                ends = column[end - 1]
                ours[number, ends] = ends + 1 - column[start]
                columns[number, ends] = last - 1
                theirs[number, last - 1] = last - first
        before = counts.cumsum(0) - counts
        places = torch.where(ours > 0, columns + before.unsqueeze(-1), counts.sum())[response]
        return _Read(
            _inner(rollout, ids, valid),
            _chunks(ours, device),
            _chunks(theirs, device),
            columns.to(device),
            places.to(device),
        )

    def at_student(self, values: Tensor) -> Tensor:
        """Sums of the teacher's [B, T'] over its chunks, where those of the student end: [B, T], 0 elsewhere."""
        sums = self.teacher_chunks.sums(values).gather(1, self.columns)
        return torch.where(self.chunks.ends, sums, 0.0)


def _chunks(lengths: Tensor, device: torch.device) -> Chunks:
    return Chunks(lengths.to(device), max(1, int(lengths.max())))


def _inner(rollout: Rollout, ids: Tensor, valid: Tensor) -> Rollout:
    """The teacher's own prompts and tokens, on the rollout's device."""
    prompts, layout, device = rollout.prompts, rollout.layout, rollout.mask.device
    assert prompts.teacher_ids is not None and prompts.teacher_mask is not None and layout.teacher is not None
    own = replace(prompts, ids=prompts.teacher_ids, mask=prompts.teacher_mask, teacher_ids=None, teacher_mask=None)
    nothing = torch.zeros(valid.shape, device=device)
    sampled = (own, ids.to(device), valid.to(device), nothing)
    found = Rollout(*sampled, rollout.finish_reason, rollout.provenance, replayed=rollout.replayed)
    return found.with_layout(Layout(layout.teacher, valid.numpy(), layout.finish_reason))
