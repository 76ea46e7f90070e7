"""The records that cross rooms, and the one legend of tensor shapes.

    B   rows: one sampled response each (prompts x samples per prompt)
    P   prompt slots, left-padded
    T   response slots, right-padded; column t is response token t in every row
    V   vocabulary entries
    K   entries of a top-k list

Every per-position tensor is response-aligned, [B, T]. A mask is True where the student sampled a token (the end symbol
included) and False on padding and on what an environment answered between two turns. Records are frozen; floating fields rise
to at least float32 (float64 stays float64) and are detached; log-probabilities, entropies and divergences are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from functools import cached_property
from typing import Any, Self

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from lit_opd.errors import InputError
from lit_opd.masked import at_least_float32, segment_sums

LIST_LENGTH = 32  # K: entries of a top-k list, fewer where the vocabulary has fewer
LARGEST_REWARD = float(numpy.finfo(numpy.float32).max)  # of a turn and of a row: ``Rollout.reward`` is float32


def is_reward(value: Any) -> bool:
    """Whether a number, of any type, is finite as float32."""
    try:
        return math.isfinite(value) and abs(float(value)) <= LARGEST_REWARD
    except (TypeError, ValueError, OverflowError, RuntimeError):  # whatever arrays, tensors and long integers raise
        return False


class FinishReason(IntEnum):
    """Why a response ended; the values of ``Rollout.finish_reason``."""

    STOP = 0  # the student emitted a stop id
    LENGTH = 1  # max_new_tokens, the context window, or in a conversation max_turn_tokens was reached
    BUDGET = 2  # a length budget cut the row
    DRIFT = 3  # the teacher-to-student ratio of the response collapsed, and a ``RatioStop`` cut the row there
    TURNS = 4  # the turns allowed were over, and the environment would have gone on
    ENVIRONMENT = 5  # the environment failed or took too long


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, (Tensor, _Record)):
        return value.to(device)
    return value


def _taken(value: Any, rows: Sequence[int], index: Tensor) -> Any:
    """The rows of one field, given as numbers and as an index."""
    if isinstance(value, Tensor) and value.ndim:
        return value[index.to(value.device)]
    if isinstance(value, _Record):
        return value._chosen(rows, index)
    if isinstance(value, tuple):
        return tuple(value[row] for row in rows)
    return value


@dataclass(frozen=True, eq=False)
class _Record:
    """What the records share: moving to a device and taking rows."""

    def to(self, device: Any) -> Self:
        """The same record with every tensor on ``device``."""
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self) if f.init})

    def rows(self, index: Tensor) -> Self:
        """The record restricted to the rows ``index`` (int64 [N]), in that order."""
        return self._chosen(index.tolist() if self._has_tuples else (), index)

    def _chosen(self, rows: Sequence[int], index: Tensor) -> Self:
        return replace(self, **{f.name: _taken(getattr(self, f.name), rows, index) for f in fields(self) if f.init})

    @property
    def _has_tuples(self) -> bool:
        """Whether a field, or one of a record inside, is kept on the host."""
        values = [getattr(self, f.name) for f in fields(self)]
        return any(isinstance(value, tuple) or (isinstance(value, _Record) and value._has_tuples) for value in values)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _require_shape(self, name: str, shape: tuple[int, ...], *, like: str) -> None:
        value = getattr(self, name)
        if value is not None and tuple(value.shape) != shape:
            raise InputError(
                f"`{type(self).__name__}.{name}` must have shape {shape} like {like}, got {tuple(value.shape)}"
            )

    def _require_dtype(self, name: str, dtype: torch.dtype) -> None:
        value = getattr(self, name)
        if value is not None and value.dtype != dtype:
            raise InputError(f"`{type(self).__name__}.{name}` must be {dtype}, got {value.dtype}")

    def _require_count(self, name: str, count: int) -> None:
        value = getattr(self, name)
        if value is not None and len(value) != count:
            raise InputError(f"`{type(self).__name__}.{name}` must have one entry a row ({count}), got {len(value)}")


class DataRow(dict[str, Any]):
    """The columns of a data row by name, with what the data module made of them.

    Args:
        columns: as they were read; not to be changed.
        row_id: unique name.
        prompt: chat messages, a plain text as those of one user turn.
        answer: reference answer, None where the data has none.
        tools: JSON schemas of the tools that the row names, None where it names none.
    """

    def __init__(
        self,
        columns: Mapping[str, Any] | None = None,
        *,
        row_id: str = "",
        prompt: Sequence[Mapping[str, Any]] = (),
        answer: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(columns or {})
        self.row_id, self.prompt, self.answer, self.tools = row_id, list(prompt), answer, tools


@dataclass(frozen=True, eq=False)
class PromptBatch(_Record):
    """Tokenised prompts, left-padded.

    Args:
        ids: int64 [B, P]; padding holds any valid token id.
        mask: bool [B, P], True on prompt tokens.
        row_keys: int64 [B]; names the random stream of the row, made from row id and sample index.
        row_ids: B strings; the data row each prompt came from (samples of one prompt share it).
        answers: B reference answers, None where the data has none.
        teachers: B names of the teacher that scores the row, None for the only one.
        teacher_ids: int64 [B, P'] where the teacher renders its own template, else None (it reads ``ids``).
        teacher_mask: bool [B, P'], given together with ``teacher_ids``.
        counted: bool [B], False on rows that only fill a batch (evaluation on several ranks); default all True.
        data: B data rows, for an environment that answers the student; None where nothing reads them.
    """

    ids: Tensor
    mask: Tensor
    row_keys: Tensor
    row_ids: tuple[str, ...]
    answers: tuple[str | None, ...] | None = None
    teachers: tuple[str | None, ...] | None = None
    teacher_ids: Tensor | None = None
    teacher_mask: Tensor | None = None
    counted: Tensor | None = None
    data: tuple[DataRow, ...] | None = None

    def __post_init__(self) -> None:
        rows = len(self.row_ids)
        if self.ids.ndim != 2 or self.ids.shape[0] != rows:
            raise InputError(f"`PromptBatch.ids` must be [B = {rows}, P], got {tuple(self.ids.shape)}")
        for name in ("answers", "teachers"):
            self._set(name, (None,) * rows if getattr(self, name) is None else tuple(getattr(self, name)))
            self._require_count(name, rows)
        if self.counted is None:
            self._set("counted", torch.ones(rows, dtype=torch.bool, device=self.ids.device))
        self._require_shape("mask", tuple(self.ids.shape), like="`ids`")
        self._require_shape("row_keys", (rows,), like="the rows")
        self._require_shape("counted", (rows,), like="the rows")
        self._require_count("data", rows)
        if (self.teacher_ids is None) != (self.teacher_mask is None):
            raise InputError("`PromptBatch.teacher_ids` and `teacher_mask` must be given together")
        if self.teacher_ids is not None:
            self._require_shape("teacher_mask", tuple(self.teacher_ids.shape), like="`teacher_ids`")
        for name, dtype in (("ids", torch.int64), ("mask", torch.bool), ("row_keys", torch.int64)):
            self._require_dtype(name, dtype)

    def __len__(self) -> int:
        return len(self.row_ids)

    @staticmethod
    def joined(parts: Sequence[PromptBatch]) -> PromptBatch:
        """The rows of several batches, in order, padded on the left to the longest.

        Raises:
            InputError: no batch, or an optional field that only some of them have.
        """
        if not parts:
            raise InputError("`PromptBatch.joined` must get at least one batch, got none")
        batch: PromptBatch = _joined(parts)
        return batch


def _accept_same_value(record: type[_Record]) -> None:
    """Let a field be "set" to what it already is.

    Lightning's precision plugins (64-true, bf16-true) rebuild a batch field by field and fail on a frozen one, although a
    prompt batch holds nothing they would convert.
    """
    refuse = record.__setattr__

    def set_same(self: _Record, name: str, value: Any) -> None:
        current = self.__dict__.get(name)
        if current is not value and not (isinstance(value, tuple) and value == current):
            refuse(self, name, value)

    record.__setattr__ = set_same  # type: ignore[assignment, method-assign]


_accept_same_value(PromptBatch)


@dataclass(frozen=True)
class Provenance:
    """How a rollout was sampled. Rollouts of unlike provenance do not mix in one batch, see ``Rollout.joined``.

    Args:
        engine: "transformers", "vllm", ...
        temperature: the sampling temperature; 0 stands for greedy decoding.
        top_p: nucleus mass in (0, 1].
        top_k: number of candidates, 0 for all.
        weights_version: optimizer steps the sampled weights had seen.
    """

    engine: str
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    weights_version: int = 0


@dataclass(frozen=True, eq=False)
class Layout:
    """Which slots of a rollout hold tokens, as the host knows it: cutting and packing rows by it waits for no device.

    Args:
        prompt: bool array [B, P].
        response: bool array [B, T], sampled tokens.
        finish_reason: int8 array [B].
        teacher: bool array [B, P'] where the teacher renders its own template, else None.
        observed: bool array [B, T], tokens that an environment answered, else None.
    """

    prompt: NDArray[numpy.bool_]
    response: NDArray[numpy.bool_]
    finish_reason: NDArray[numpy.int8]
    teacher: NDArray[numpy.bool_] | None = None
    observed: NDArray[numpy.bool_] | None = None

    @property
    def read(self) -> NDArray[numpy.bool_]:
        """bool array [B, T], slots that a model reads: sampled and observed tokens."""
        return self.response if self.observed is None else self.response | self.observed

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of prompt and response of each row, observations included; the longer of the two prompts where templates
        differ."""
        prompt = self.prompt.sum(-1)
        if self.teacher is not None:
            prompt = numpy.maximum(prompt, self.teacher.sum(-1))
        return (prompt + self.read.sum(-1)).tolist()  # type: ignore[no-any-return]

    def rows(self, index: Sequence[int]) -> Layout:
        """The layout of the rows ``index``."""
        kept = list(index)
        teacher, observed = (None if part is None else part[kept] for part in (self.teacher, self.observed))
        return Layout(self.prompt[kept], self.response[kept], self.finish_reason[kept], teacher, observed)


_ROLLOUT_DTYPES = {
    "response_ids": torch.int64, "mask": torch.bool, "finish_reason": torch.int8, "drawn": torch.int64,
    "observed": torch.bool, "turn": torch.int64, "reward": torch.float32, "version": torch.int64,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Replayed(_Record):
    """Which rows of a rollout were not sampled now, see ``ReplaySampler``.

    Args:
        old: bool [B], True on those.
        known: bool [B], False where nobody knows the sampler's log-probs: they are 0, and the student's stand for them in the
            signal.
        weights_version: int64 [B], optimizer steps the weights had seen that sampled the row, -1 where that is not known.
    """

    old: Tensor
    known: Tensor
    weights_version: Tensor

    def __post_init__(self) -> None:
        for name, dtype in (("old", torch.bool), ("known", torch.bool), ("weights_version", torch.int64)):
            self._require_dtype(name, dtype)
            self._require_shape(name, tuple(self.old.shape[:1]), like="`old`")


@dataclass(frozen=True, eq=False)
class Rollout(_Record):
    """Responses the student sampled.

    Args:
        prompts: the ``PromptBatch`` they answer.
        response_ids: int64 [B, T]; padding holds any valid token id.
        mask: bool [B, T], True on sampled tokens, the end symbol included; made from lengths, never from ``ids != pad``.
        sampler_logprobs: [B, T] nats under the distribution that was really sampled from, 0 where masked.
        finish_reason: int8 [B] of ``FinishReason``.
        provenance: engine, temperature, top-p, top-k and weights version.
        teacher_logprobs: [B, T] nats, 0 where masked, where the teacher scored the tokens while they were sampled, else None.
        drawn: int64 [B], tokens that were sampled for the row, where some of them were cut off again or none was sampled now;
            None where these are the response's.
        replayed: which rows were not sampled now; None where all were. The provenance is that of the others.
        observed: bool [B, T], True on what an environment answered between two turns: every model reads these tokens, nothing
            scores or trains them. None for responses of one turn; then holes of the mask are read by nobody.
        turn: int64 [B, T], 0-based turn of each sampled token, and of an observed one that of the turn it opens; 0 on padding.
            Given together with ``observed``.
        reward: float32 [B], what the environment gave the row, summed over its turns; NaN where it gave none. None without one.
        version: int64 [B, T], optimizer steps that the weights had seen which sampled each token, 0 on padding; None where all
            were sampled by those of the provenance. See ``PartialSampler``.
    """

    prompts: PromptBatch
    response_ids: Tensor
    mask: Tensor
    sampler_logprobs: Tensor
    finish_reason: Tensor
    provenance: Provenance
    teacher_logprobs: Tensor | None = None
    drawn: Tensor | None = None
    replayed: Replayed | None = None
    observed: Tensor | None = None
    turn: Tensor | None = None
    reward: Tensor | None = None
    version: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.response_ids.shape)
        if len(shape) != 2 or shape[0] != len(self.prompts):
            raise InputError(f"`Rollout.response_ids` must be [B = {len(self.prompts)}, T], got {shape}")
        self._require_shape("mask", shape, like="`response_ids`")
        self._require_shape("sampler_logprobs", shape, like="`response_ids`")
        self._require_shape("teacher_logprobs", shape, like="`response_ids`")
        self._require_shape("finish_reason", shape[:1], like="the rows")
        for name in ("drawn", "reward"):
            self._require_shape(name, shape[:1], like="the rows")
        for name in ("observed", "turn", "version"):
            self._require_shape(name, shape, like="`response_ids`")
        for name, dtype in _ROLLOUT_DTYPES.items():
            self._require_dtype(name, dtype)
        if self.replayed is not None and len(self.replayed.old) != shape[0]:
            raise InputError(f"`Rollout.replayed` must have one entry a row ({shape[0]}), got {len(self.replayed.old)}")
        if (self.observed is None) != (self.turn is None):
            raise InputError("`Rollout.observed` and `turn` must be given together")
        for name in ("sampler_logprobs", "teacher_logprobs"):
            if getattr(self, name) is not None:
                values = at_least_float32(getattr(self, name).detach())
                self._set(name, torch.where(self.mask, values, values.new_zeros(())))

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Tensor:
        """int64 [B], sampled tokens of each response."""
        return self.mask.sum(-1)

    @property
    def read(self) -> Tensor:
        """bool [B, T], tokens that a model reads: sampled and observed ones."""
        return self.mask if self.observed is None else self.mask | self.observed

    @property
    def num_turns(self) -> Tensor:
        """int64 [B], turns in which a token was sampled; 1 or 0 where ``turn`` is None."""
        if self.turn is None:
            return self.mask.any(-1).long()
        return torch.where(self.mask, self.turn + 1, 0).amax(-1)

    @property
    def turn_lengths(self) -> Tensor:
        """int64 [B, turns], sampled tokens of each turn; as many columns as the row with the most turns, at least one."""
        turn = torch.zeros_like(self.response_ids) if self.turn is None else self.turn
        most = max(1, int(self.num_turns.max())) if len(self) else 1
        counts = self.response_ids.new_zeros(len(self), most)
        return counts.scatter_add_(1, torch.where(self.mask, turn, 0), self.mask.long())

    @property
    def num_drawn(self) -> Tensor:
        """int64 [B], tokens that were sampled for each response, what was cut off included."""
        return self.lengths if self.drawn is None else self.drawn

    @property
    def sampled_now(self) -> Tensor:
        """bool [B], False on the saved responses of a ``ReplaySampler``: what an average over the student's own samples is of."""
        if self.replayed is None:
            return torch.ones(len(self.mask), dtype=torch.bool, device=self.mask.device)
        return ~self.replayed.old

    @property
    def older(self) -> Tensor:
        """bool [B, T], sampled tokens that come from other weights than those of the provenance."""
        if self.version is None:
            return torch.zeros_like(self.mask)
        return self.mask & (self.version != self.provenance.weights_version)

    @property
    def finished(self) -> Tensor:
        """bool [B], True where the student ended the response itself."""
        return self.finish_reason == int(FinishReason.STOP)

    @staticmethod
    def joined(parts: Sequence[Rollout]) -> Rollout:
        """The rows of several rollouts in one batch, in order; padding grows to the longest prompt and response.

        Raises:
            InputError: no rollout, unlike provenances, or an optional field that only some of them have.
        """
        if not parts:
            raise InputError("`Rollout.joined` must get at least one rollout, got none")
        for part in parts:
            if part.provenance != parts[0].provenance:
                raise InputError(
                    f"`Rollout.joined` must get rollouts of one provenance, got {parts[0].provenance} and {part.provenance}; "
                    "train on them in batches of their own"
                )
        rollout: Rollout = _joined(parts)
        return rollout

    @cached_property
    def layout(self) -> Layout:
        """Read from the device once a rollout, in one transfer; rows and trimmed copies inherit it."""
        prompts = self.prompts
        parts = {"prompt": prompts.mask, "response": self.mask, "finish_reason": self.finish_reason.unsqueeze(-1)}
        optional = {"teacher": prompts.teacher_mask, "observed": self.observed}
        parts |= {name: part for name, part in optional.items() if part is not None}
        found = torch.cat([part.to(torch.int8) for part in parts.values()], -1).cpu().numpy()
        ends = numpy.cumsum([part.shape[-1] for part in parts.values()])
        columns = dict(zip(parts, numpy.split(found, ends[:-1], axis=-1), strict=True))
        finish = columns.pop("finish_reason")[:, 0]
        return Layout(finish_reason=finish, **{name: part.astype(bool) for name, part in columns.items()})

    def with_layout(self, layout: Layout) -> Rollout:
        """The same record, which knows its layout without reading a device."""
        self.__dict__["layout"] = layout
        return self

    def take(self, index: Sequence[int]) -> Rollout:
        """As ``rows``, of row numbers on the host; the layout goes with them."""
        taken = self._chosen(list(index), torch.tensor(list(index), dtype=torch.int64))
        return taken.with_layout(self.layout.rows(index))

    def silenced(self, kept: NDArray[numpy.bool_]) -> Rollout:
        """The same rows; those that ``kept`` (bool array [B]) leaves out have no valid token, so they leave every denominator.
        What was drawn for them stays counted."""
        layout, stays = self.layout, torch.from_numpy(kept).to(self.mask.device).unsqueeze(-1)
        observed = None if self.observed is None else self.observed & stays
        quiet = replace(self, mask=self.mask & stays, observed=observed, drawn=self.num_drawn)
        seen = None if layout.observed is None else layout.observed & kept[:, None]
        return quiet.with_layout(replace(layout, response=layout.response & kept[:, None], observed=seen))

    def without_teacher_prompts(self) -> Rollout:
        """The same rows with the student's prompts alone, as the student and a reference model read them."""
        if self.prompts.teacher_ids is None:
            return self
        prompts = replace(self.prompts, teacher_ids=None, teacher_mask=None)
        return replace(self, prompts=prompts).with_layout(replace(self.layout, teacher=None))

    def trimmed(self) -> Rollout:
        """The same rows without columns that are padding in all of them (prompt left, response right)."""
        layout = self.layout
        columns = max(_width(layout.read), 1)
        starts = _start(layout.prompt), 0 if layout.teacher is None else _start(layout.teacher)
        cut = {
            name: getattr(self, name)[:, :columns]
            for name in ("response_ids", "mask", "sampler_logprobs", "teacher_logprobs", "observed", "turn", "version")
            if getattr(self, name) is not None
        }
        kept = Layout(
            layout.prompt[:, starts[0] :],
            layout.response[:, :columns],
            layout.finish_reason,
            None if layout.teacher is None else layout.teacher[:, starts[1] :],
            None if layout.observed is None else layout.observed[:, :columns],
        )
        return replace(self, prompts=_trim_prompts(self.prompts, *starts), **cut).with_layout(kept)


def _joined(parts: Sequence[Any]) -> Any:
    """One record of the rows of ``parts``; matrices of prompts grow on the left, all others on the right."""
    first, found = parts[0], {}
    for field_ in (f for f in fields(first) if f.init):
        name, values = field_.name, [getattr(part, field_.name) for part in parts]
        if any((value is None) != (values[0] is None) for value in values):
            raise InputError(
                f"`{type(first).__name__}.{name}` must be given for all rollouts that are joined, or for none"
            )
        if isinstance(values[0], _Record):
            found[name] = _joined(values)
        elif isinstance(values[0], tuple):
            found[name] = tuple(entry for value in values for entry in value)
        elif isinstance(values[0], Tensor):
            width = max(value.shape[-1] for value in values)
            if values[0].ndim > 1:
                left = isinstance(first, PromptBatch)
                short = [(width - value.shape[-1], 0) if left else (0, width - value.shape[-1]) for value in values]
                values = [pad(value, room) for value, room in zip(values, short, strict=True)]
            found[name] = torch.cat(values)
        else:
            found[name] = values[0]
    return type(first)(**found)


def _width(mask: NDArray[numpy.bool_]) -> int:
    """Columns up to the last that is used, as many as the longest row has tokens where rows have no holes."""
    used = numpy.flatnonzero(mask.any(0))
    return int(used[-1]) + 1 if len(used) else 0


def _start(mask: NDArray[numpy.bool_]) -> int:
    """The first column that is used."""
    used = numpy.flatnonzero(mask.any(0))
    return int(used[0]) if len(used) else 0


def _trim_prompts(prompts: PromptBatch, start: int, teacher_start: int) -> PromptBatch:
    changes = {name: getattr(prompts, name)[:, start:] for name in ("ids", "mask")}
    if prompts.teacher_mask is not None:
        changes |= {name: getattr(prompts, name)[:, teacher_start:] for name in ("teacher_ids", "teacher_mask")}
    return replace(prompts, **changes)


@dataclass(frozen=True, eq=False)
class Waiting(_Record):
    """What a step sampled and what it left unfinished, see ``PartialSampler``; int64 scalars of one rank.

    Args:
        sampled: tokens of this step.
        responses: that go on in the next step.
        tokens: that they have so far.
        steps: optimizer steps since each of them was begun, summed over the rows, those of this step not counted.
    """

    sampled: Tensor
    responses: Tensor
    tokens: Tensor
    steps: Tensor


@dataclass(frozen=True, eq=False)
class TopK(_Record):
    """The K likeliest tokens at each position.

    Args:
        ids: int64 [B, T, K].
        logprobs: [B, T, K] nats, likeliest first; -inf where a server listed a token that the student does not have.
    """

    ids: Tensor
    logprobs: Tensor

    def first(self, k: int) -> TopK:
        """The ``k`` likeliest of them, [B, T, k]."""
        return TopK(self.ids[..., :k], self.logprobs[..., :k])


@dataclass(frozen=True, eq=False)
class Chunks(_Record):
    """Neighbouring tokens that a teacher with another tokenizer scores together; its log-prob stands at the last of them.

    Args:
        lengths: int64 [B, T], tokens of the chunk that ends here, 1 for a token that is scored alone; 0 where none ends.
        longest: at least the largest of them.
    """

    lengths: Tensor
    longest: int = 1

    @property
    def ends(self) -> Tensor:
        """bool [B, T], True where a chunk ends: what of the teacher's scores is one."""
        return self.lengths > 0

    def sums(self, values: Tensor) -> Tensor:
        """Sums of [B, T] over each chunk where it ends, 0 elsewhere; differentiable."""
        return segment_sums(values, self.lengths, longest=self.longest)

    def columns(self, count: int) -> Chunks:
        """The chunks of the leading ``count`` columns, [B, count]."""
        return replace(self, lengths=self.lengths[:, :count])


@dataclass(frozen=True, eq=False)
class TokenScores(_Record):
    """What a policy says of given tokens; optional fields are None unless they were asked for.

    Args:
        logprobs: [B, T] nats, 0 where masked.
        entropy: [B, T] nats, full vocabulary, 0 where masked.
        topk: the K likeliest tokens.
        listed: [B, T, K] nats, log-probs of tokens that were listed by another model.
        token_kl: [B, T] nats, KL(this || teacher) over the full vocabulary, 0 where masked.
        divergence: [B, T] nats, what a ``Divergence`` objective minimises, with gradient, 0 where masked.
        states: [N, H] hidden states of the N valid tokens, row by row, from which a frozen model makes its head again.
        candidates: log-probs of tokens that were asked for by id.
        chunks: where a teacher with another tokenizer has a score, which is 0 elsewhere; None where every token has one.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    topk: TopK | None = None
    listed: Tensor | None = None
    token_kl: Tensor | None = None
    divergence: Tensor | None = None
    states: Tensor | None = None
    candidates: TopK | None = None
    chunks: Chunks | None = None


_LOGPROB_FIELDS = ("student_logprobs", "teacher_logprobs", "sampler_logprobs", "reference_logprobs")
_OTHER_FIELDS = ("advantage", "student_entropy", "teacher_entropy", "token_kl")


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenSignal(_Record):
    """What is known of each sampled token: all that a weighting strategy may read.

    Args:
        student_logprobs: [B, T] nats, s_t.
        teacher_logprobs: [B, T] nats, q_t.
        mask: bool [B, T], may have holes; content where it is False may be anything and is stored as 0.
        advantage: [B, T] nats, the transformed advantage, read by the loss only; default the log ratio.
        row_keys: int64 [B], names the random stream of the row; default 0..B-1.
        step: optimizer step, for random strategies.
        sampler_logprobs: [B, T] nats, b_t.
        reference_logprobs: [B, T] nats of a third model, which reads the student's prompt.
        student_entropy: [B, T] nats.
        teacher_entropy: [B, T] nats.
        token_kl: [B, T] nats, KL(student || teacher) over the full vocabulary.
        student_topk: the student's likeliest tokens.
        teacher_topk: the teacher's likeliest tokens.
        student_at_teacher_topk: [B, T, K] nats, the student's log-probs of ``teacher_topk.ids``.
        token_ids: int64 [B, T], the sampled tokens.
        turn: int64 [B, T], 0-based turn of each token; None where a response is one turn.
        reward: float32 [B], of the row, NaN where it has none; None without rewards.
        group: int64 [B], the same for all samples of one prompt; None where nobody says.
        validate: check that valid tokens have finite values (one host synchronisation).

    Raises:
        InputError: for shapes that do not align, or a non-finite value on a valid token (the row is named).
    """

    student_logprobs: Tensor
    teacher_logprobs: Tensor
    mask: Tensor
    advantage: Tensor | None = None
    row_keys: Tensor | None = None
    step: int = 0
    sampler_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    token_kl: Tensor | None = None
    student_topk: TopK | None = None
    teacher_topk: TopK | None = None
    student_at_teacher_topk: Tensor | None = None
    token_ids: Tensor | None = None
    turn: Tensor | None = None
    reward: Tensor | None = None
    group: Tensor | None = None
    validate: bool = field(default=True, repr=False)

    def __post_init__(self) -> None:
        if self.mask.ndim != 2:
            raise InputError(f"`TokenSignal.mask` must be [B, T], got {tuple(self.mask.shape)}")
        self._require_dtype("mask", torch.bool)
        for name in _LOGPROB_FIELDS + _OTHER_FIELDS:
            value = getattr(self, name)
            if value is not None:
                self._require_shape(name, tuple(self.mask.shape), like="`mask`")
                value = at_least_float32(value.detach())
                self._set(name, torch.where(self.mask, value, value.new_zeros(())))
        if self.row_keys is None:
            self._set("row_keys", torch.arange(len(self.mask), device=self.mask.device))
        for name in ("row_keys", "reward", "group"):
            self._require_shape(name, tuple(self.mask.shape[:1]), like="the rows")
        for name in ("token_ids", "turn"):
            self._require_shape(name, tuple(self.mask.shape), like="`mask`")
        if self.validate:
            self._require_finite()

    def _require_finite(self) -> None:
        for name in _LOGPROB_FIELDS + _OTHER_FIELDS:
            value = getattr(self, name)
            if value is not None and not bool(torch.isfinite(value).all()):
                row, column = (~torch.isfinite(value)).nonzero()[0].tolist()
                key = int(self.row_keys[row])  # type: ignore[index]
                raise InputError(
                    f"`TokenSignal.{name}` must be finite on valid tokens, got {float(value[row, column])} in row {row} "
                    f"(row key {key}), column {column}; look at this row's text and at the model that scored it"
                )

    def __len__(self) -> int:
        return len(self.mask)

    @cached_property
    def log_ratio(self) -> Tensor:
        """[B, T] nats, teacher - student, 0 where masked: the raw signal that strategies read."""
        return self.teacher_logprobs - self.student_logprobs

    @cached_property
    def disagreement(self) -> Tensor:
        """[B, T] nats, |log ratio|, 0 where masked."""
        return self.log_ratio.abs()

    @property
    def effective_advantage(self) -> Tensor:
        """[B, T] nats, the transformed advantage, or the log ratio where none was set; read by the loss."""
        return self.log_ratio if self.advantage is None else self.advantage


@dataclass(frozen=True, eq=False, kw_only=True)
class StepRecord(_Record):
    """What is known of one rollout batch after its steps: ``outputs["step"]`` of ``training_step``. All that observing callbacks
    may read.

    Args:
        rollout: the B rows that were trained on.
        signal: their signal, before the batch's first update.
        weights: [B, T] without unit, 0 where a token does not count.
        kept: bool [B, T], tokens in the denominator.
        loss: [B, T] nats, weighted token losses of the last pass, before the denominator; 0 where masked.
        clipped: bool [B, T], tokens with a weight above 0 whose gradient the policy clip cut in the last pass.
        finish_reason: int8 [rows sampled], before truncated rows were dropped.
        reward: float32 [rows sampled], NaN where a row has none; None where there are no rewards.
        sampled_tokens: int64 scalar, tokens sampled on this rank in this step, before truncated rows were dropped; those that a
            ``RatioStop`` cut off included.
        grad_norm: scalar, global 2-norm of the gradient before clipping at the batch's last update.
        progress: training progress in [0, 1] that the strategy saw.
        step: optimizer steps done, this batch's included.
        seconds: wall seconds of each phase: sampling, scoring, updating.
        skipped: True where a value was not finite and the batch's steps, or the rest of them, were not made: no token is in
            ``kept``, and what was not finite is 0 in the signal.
        response_tokens: int64 scalar, tokens of the responses in ``finish_reason``; None where they are ``sampled_tokens``.
        chunks: of a teacher with another tokenizer: the signal is that of chunks, each at its last token; None: of tokens.
        waiting: rows that were begun and not trained on; their tokens of this step are in ``sampled_tokens``. None where every
            row ends in its step.
    """

    rollout: Rollout
    signal: TokenSignal
    weights: Tensor
    kept: Tensor
    loss: Tensor
    clipped: Tensor
    finish_reason: Tensor
    sampled_tokens: Tensor
    grad_norm: Tensor
    progress: float
    step: int
    seconds: dict[str, float]
    skipped: bool = False
    response_tokens: Tensor | None = None
    chunks: Chunks | None = None
    waiting: Waiting | None = None
    reward: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Prediction(_Record):
    """What ``predict_step`` returns: responses, and what training would have made of their tokens.

    Args:
        rollout: B rows.
        signal: their signal under student and teacher.
        weights: [B, T], the run's strategy at the end of training (progress 1), 0 where masked.
    """

    rollout: Rollout
    signal: TokenSignal
    weights: Tensor
