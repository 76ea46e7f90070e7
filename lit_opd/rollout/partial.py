"""Long responses in pieces: a step samples so many tokens of a row, and what has not ended goes on in the next step.

A row goes on from its token ids, which the weights of now read again. Keys and values of older weights would be faster, and what
they sample is of no policy: neither the old one's nor the new one's, so its log-probs would correct nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lit_opd.distributed import gather_objects, is_rank_zero, largest, rank, world_size
from lit_opd.errors import require
from lit_opd.rollout.around import SamplerAround
from lit_opd.rollout.base import Sampler, SamplingSettings
from lit_opd.types import DataRow, FinishReason, PromptBatch, Provenance, Rollout, Waiting

_LISTS = {"ids": torch.int64, "versions": torch.int64}  # of a row, as tensors in a checkpoint
NOT_ENDED = -1


@dataclass
class _Row:
    """One response on the host, as far as it is.

    Args:
        prompt: one row without padding.
        begun: optimizer step of its first token.
        group: rows of the same number are trained on in one batch.
        ids: tokens so far.
        logprobs: nats, the sampler's.
        versions: optimizer steps the weights had seen that sampled each of them.
        reason: why it ended, None for one that has not.
        dtype: of the log-probs.
    """

    prompt: PromptBatch
    begun: int
    group: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    dtype: torch.dtype = torch.float32

    @property
    def text(self) -> list[int]:
        """Ids of prompt and response."""
        prompt: list[int] = self.prompt.ids[0].tolist()
        return prompt + self.ids


@dataclass(frozen=True)
class _Coming:
    """What stands once the step has been made."""

    rows: list[_Row]
    sampled: int
    step: int
    device: torch.device


class PartialSampler(SamplerAround):
    """Samples at most ``budget`` tokens of every training row a step. Rows that have not ended by then wait, and go on first in
    the next step, beside its new prompts: one long row does not hold the batch.

    A step trains on whole responses only, those that ended in it: by themselves, or at ``sampler.max_new_tokens``. It takes
    all prompts of its batch, so the data are read in order, once, and as many rows are trained on as come in. At most the
    share ``waiting`` of the batch's rows waits after a step; where more would, all unfinished rows get another ``budget``
    tokens at once. A step therefore trains on (1 - waiting) to (1 + waiting) times the rows of the batch.

    Each token keeps the log-prob and the version (``Rollout.version``) of the weights that sampled it, so importance weights
    are those of that policy. Prefixes stay those of older weights, which biases the gradient as with ``ReplaySampler``.
    Validation, evaluation and prediction sample whole responses.

    Args:
        sampler: the engine; its settings are those of the run.
        budget: tokens, from 1 to below ``sampler.max_new_tokens``. One that divides it saves calls of the engine.
        waiting: in (0, 1), the largest share of a batch's rows that waits.
    Raises:
        InputError: a value outside its range.
    """

    def __init__(self, sampler: Sampler, budget: int, waiting: float = 0.5) -> None:
        name = type(self).__name__
        require(isinstance(sampler, Sampler), f"{name}.sampler", "a Sampler", sampler)
        inside = "neither replays, environments nor partial rollouts stand inside one another"
        own = type(sampler).__name__
        require(sampler.engine is sampler, f"{name}.sampler", "one that draws tokens itself", own, inside)
        remedy = "its random numbers must go on where a row stopped: draw from `SamplingSettings.uniforms`"
        require(sampler.continues, f"{name}.sampler", "one that heeds `SamplingSettings.begun`", own, remedy)
        require(
            not sampler.ahead, f"{name}.sampler.ahead", "0: what waits goes on by the weights of now", sampler.ahead
        )
        require(type(budget) is int and budget >= 1, f"{name}.budget", ">= 1 token, a whole number", budget)
        slots = sampler.max_new_tokens
        remedy = f"lower it, or take {own} without {name}: every row ends in its step"
        require(budget < slots, f"{name}.budget", f"below `sampler.max_new_tokens` {slots}", budget, remedy)
        require(0 < waiting < 1, f"{name}.waiting", "between 0 and 1, a share of the batch's rows", waiting)
        super().__init__(sampler)
        self.sampler, self.budget, self.waiting = sampler, budget, waiting
        self._waiting: list[_Row] = []  # of this rank
        self._coming: _Coming | None = None

    # -- a step ------------------------------------------------------------------------------------------------------

    def trained_rows(self, batch: int) -> tuple[int, int]:
        """See ``Sampler.trained_rows``."""
        most = self._most_waiting(batch)
        return batch - most, batch + most

    def _most_waiting(self, batch: int) -> int:
        return math.floor(self.waiting * batch)

    @torch.no_grad()
    def sample(self, model: Any, prompts: PromptBatch, settings: SamplingSettings) -> Rollout:
        """The responses that ended in this step, those begun earlier first; see ``Sampler.sample``. Called on every rank.

        The rows that wait change with ``take_unfinished`` only: a step that fails is made again from where it began.
        """
        if settings.replay == "none":
            return self.sampler.sample(model, prompts, settings)
        self._refuse_stop(settings)
        device, sampled = prompts.ids.device, 0
        rows = [
            replace(row, ids=[*row.ids], logprobs=[*row.logprobs], versions=[*row.versions]) for row in self._waiting
        ]
        rows += self._begun(prompts, settings)
        more = True
        with self.sampler.kept_awake():
            while more:
                tokens, provenance = self._round(model, rows, settings, device)
                sampled += tokens
                ended, waiting = _parted(rows)
                more = bool(largest(int(len(waiting) > self._most_waiting(len(prompts))), device))
        self._coming = _Coming(waiting, sampled, settings.step, device)
        return _rollout(ended, settings, provenance, device)

    def _begun(self, prompts: PromptBatch, settings: SamplingSettings) -> list[_Row]:
        """A row for each prompt. Neighbours of one prompt are a group where they are compared with each other."""
        group = max((row.group for row in self._waiting), default=-1)
        found: list[_Row] = []
        for one in _split(prompts):
            if not (settings.together and found and found[-1].prompt.row_ids == one.row_ids):
                group += 1
            found.append(_Row(one, settings.step, group))
        return found

    def _round(
        self, model: Any, rows: Sequence[_Row], settings: SamplingSettings, device: torch.device
    ) -> tuple[int, Provenance]:
        """``budget`` more tokens of every row that has not ended, or what it has left; how many were sampled.

        Engines of several ranks may talk to each other, so all make as many calls.
        """
        own, sampled = list(self._calls(rows, settings.max_new_tokens, device)), 0
        for number in range(largest(len(own), device)):
            room, asked = own[number] if number < len(own) else (1, [])
            rollout = self._drawn(
                model, asked or [replace(rows[0], ids=[])], replace(settings, max_new_tokens=room), device
            )
            provenance = rollout.provenance
            sampled += _extend(asked, rollout, most=settings.max_new_tokens)
        return sampled, provenance

    def _calls(self, rows: Sequence[_Row], most: int, device: torch.device) -> Iterator[tuple[int, list[_Row]]]:
        """Room and rows of each call of the engine. In this process a short row pays for the columns of the longest: on a CPU
        that is more than another call, on a GPU, where each decode step reads all weights, less."""
        apart = self.in_process and device.type == "cpu"
        calls: dict[tuple[int, bool], list[_Row]] = {}
        for row in rows:
            if row.reason is None:
                room = min(self.budget, most - len(row.ids))
                calls.setdefault((room, apart and bool(row.ids)), []).append(row)
        yield from ((room, asked) for (room, _), asked in calls.items())

    def _drawn(self, model: Any, rows: Sequence[_Row], settings: SamplingSettings, device: torch.device) -> Rollout:
        """What the engine says after prompt and response of each row."""
        texts = [row.text for row in rows]
        width = max(map(len, texts))
        ids = torch.full((len(texts), width), settings.pad_id, dtype=torch.int64)
        mask = torch.zeros(len(texts), width, dtype=torch.bool)
        for place, text in enumerate(texts):
            ids[place, width - len(text) :], mask[place, width - len(text) :] = torch.tensor(text), True
        keys = torch.cat([row.prompt.row_keys for row in rows])
        names = tuple(row.prompt.row_ids[0] for row in rows)
        begun = tuple((row.begun, len(row.ids)) for row in rows)
        prompts = PromptBatch(ids.to(device), mask.to(device), keys.to(device), names)
        return self.sampler.sample(model, prompts, replace(settings, replay="none", begun=begun, together=False))

    # -- what waits --------------------------------------------------------------------------------------------------

    def take_unfinished(self) -> Waiting | None:
        """See ``Sampler.take_unfinished``."""
        if self._coming is None:
            return None
        done, self._coming = self._coming, None
        self._waiting = done.rows
        tokens, steps = (sum(len(row.ids) for row in done.rows), sum(done.step - row.begun for row in done.rows))
        numbers = (done.sampled, len(done.rows), tokens, steps)
        return Waiting(*(torch.tensor(number, device=done.device) for number in numbers))

    def forget_unfinished(self) -> None:
        """See ``Sampler.forget_unfinished``."""
        self._waiting, self._coming = [], None

    def say_unfinished(self) -> None:
        """See ``Sampler.say_unfinished``."""
        counts = gather_objects([(len(self._waiting), sum(len(row.ids) for row in self._waiting))])
        rows, tokens = (sum(numbers) for numbers in zip(*counts, strict=True))
        if rows and is_rank_zero():
            warnings.warn(
                f"{rows} responses with {tokens} tokens were not finished when training ended, and are not trained on; a run "
                "that goes on from the last checkpoint continues them",
                stacklevel=2,
            )

    def unfinished_state(self) -> list[dict[str, Any]] | None:
        """See ``Sampler.unfinished_state``."""
        return gather_objects([_to_state(row, owner=(rank(), world_size())) for row in self._waiting])

    def restore_unfinished(self, state: Sequence[Mapping[str, Any]]) -> None:
        """See ``Sampler.restore_unfinished``. Each rank gets its own rows again; another number of ranks deals out the groups."""
        groups: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
        for row in state:
            groups.setdefault((row["rank"], row["group"]), []).append(row)
        same = all(row["world"] == world_size() for row in state)
        mine = [
            (number, rows)
            for number, ((owner, _), rows) in enumerate(groups.items())
            if (owner if same else number % world_size()) == rank()
        ]
        self._waiting = [replace(_from_state(row), group=number) for number, rows in mine for row in rows]
        self._cut()

    def _cut(self) -> None:
        """Rows that a smaller ``max_new_tokens`` ends end there, those too that had ended after it and wait for their group."""
        most = self.max_new_tokens
        long = [row for row in self._waiting if len(row.ids) > most or (row.reason is None and len(row.ids) == most)]
        for row in long:
            row.reason = FinishReason.LENGTH
            for values in (row.ids, row.logprobs, row.versions):
                del values[most:]  # type: ignore[attr-defined]
        if long:
            warnings.warn(
                f"{len(long)} responses that wait in the checkpoint have `model.sampler.max_new_tokens` "
                f"{self.max_new_tokens} tokens or more: they are cut there",
                stacklevel=2,
            )


def _split(prompts: PromptBatch) -> list[PromptBatch]:
    """Every row by itself, on the host and without padding."""
    whole = prompts.to("cpu")
    return [_unpadded(whole.rows(torch.tensor([row]))) for row in range(len(whole))]


def _unpadded(one: PromptBatch) -> PromptBatch:
    changes: dict[str, Any] = {"ids": one.ids[one.mask][None], "mask": one.mask[one.mask][None]}
    if one.teacher_ids is not None and one.teacher_mask is not None:
        kept = one.teacher_mask
        changes |= {"teacher_ids": one.teacher_ids[kept][None], "teacher_mask": kept[kept][None]}
    return replace(one, **changes)


def _extend(rows: Sequence[_Row], rollout: Rollout, *, most: int) -> int:
    """What was drawn goes to its rows, which end by a stop id or at ``most`` tokens; how many tokens there were."""
    if not rows:
        return 0
    ids, logprobs, version = (
        rollout.response_ids.cpu(),
        rollout.sampler_logprobs.cpu(),
        rollout.provenance.weights_version,
    )
    lengths, reasons = rollout.lengths.tolist(), rollout.finish_reason.tolist()
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        row.ids += ids[place, :length].tolist()
        row.logprobs += logprobs[place, :length].tolist()
        row.versions += [version] * length
        row.dtype = logprobs.dtype
        if reasons[place] == int(FinishReason.STOP):
            row.reason = FinishReason.STOP
        elif len(row.ids) >= most:
            row.reason = FinishReason.LENGTH
    return sum(lengths)


def _parted(rows: Iterable[_Row]) -> tuple[list[_Row], list[_Row]]:
    """Rows whose group has ended, and the others."""
    rows = list(rows)
    unfinished = {row.group for row in rows if row.reason is None}
    ended = [row for row in rows if row.group not in unfinished]
    return ended, [row for row in rows if row.group in unfinished]


def _rollout(rows: Sequence[_Row], settings: SamplingSettings, provenance: Provenance, device: torch.device) -> Rollout:
    """The record of responses that have ended."""
    lengths = torch.tensor([len(row.ids) for row in rows])
    columns = int(lengths.max())

    def filled(name: str, fill: float, dtype: torch.dtype) -> Tensor:
        parts = [[*getattr(row, name), *[fill] * (columns - len(row.ids))] for row in rows]
        return torch.tensor(parts, dtype=dtype)

    return Rollout(
        prompts=PromptBatch.joined([row.prompt for row in rows]),
        response_ids=filled("ids", settings.pad_id, torch.int64),
        mask=torch.arange(columns) < lengths.unsqueeze(-1),
        sampler_logprobs=filled("logprobs", 0.0, rows[-1].dtype),
        finish_reason=torch.tensor([int(row.reason) for row in rows if row.reason is not None], dtype=torch.int8),
        provenance=provenance,
        version=filled("versions", 0, torch.int64),
    ).to(device)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def _to_state(row: _Row, *, owner: tuple[int, int]) -> dict[str, Any]:
    """Tensors, numbers and texts of one row; ``owner`` is its rank and the number of ranks."""
    prompt = row.prompt
    (own_rank, world), data = owner, None if prompt.data is None else prompt.data[0]
    found: dict[str, Any] = {name: torch.tensor(getattr(row, name), dtype=dtype) for name, dtype in _LISTS.items()}
    return found | {
        "logprobs": torch.tensor(row.logprobs, dtype=row.dtype),
        "begun": row.begun,
        "group": row.group,
        "reason": NOT_ENDED if row.reason is None else int(row.reason),
        "rank": own_rank,
        "world": world,
        "prompt": prompt.ids[0],
        "teacher_prompt": None if prompt.teacher_ids is None else prompt.teacher_ids[0],
        "row_key": int(prompt.row_keys[0]),
        "row_id": prompt.row_ids[0],
        "answer": None if prompt.answers is None else prompt.answers[0],
        "teacher": None if prompt.teachers is None else prompt.teachers[0],
        "data": None if data is None else {"columns": dict(data), **vars(data)},
    }


def _from_state(state: Mapping[str, Any]) -> _Row:
    """What ``_to_state`` kept."""
    teacher, data = state["teacher_prompt"], state["data"]
    prompt = PromptBatch(
        ids=state["prompt"][None],
        mask=torch.ones_like(state["prompt"], dtype=torch.bool)[None],
        row_keys=torch.tensor([state["row_key"]], dtype=torch.int64),
        row_ids=(state["row_id"],),
        answers=(state["answer"],),
        teachers=(state["teacher"],),
        teacher_ids=None if teacher is None else teacher[None],
        teacher_mask=None if teacher is None else torch.ones_like(teacher, dtype=torch.bool)[None],
        data=None if data is None else (DataRow(**data),),
    )
    reason = None if state["reason"] == NOT_ENDED else FinishReason(state["reason"])
    lists = {name: state[name].tolist() for name in (*_LISTS, "logprobs")}
    return _Row(prompt, state["begun"], state["group"], reason=reason, dtype=state["logprobs"].dtype, **lists)
