"""Conversations of the student with an environment, sampled turn by turn by any engine.

A row is one sequence of tokens: those the student sampled, and between its turns those that the chat template makes of the
environment's answer. What was sampled is never decoded and tokenised again, so sampler, student and teacher read the same ids.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lit_opd.distributed import largest, shared_failure
from lit_opd.errors import InputError, require
from lit_opd.prompts.encoding import PromptEncoder
from lit_opd.prompts.following import Following
from lit_opd.rollout.around import SamplerAround
from lit_opd.rollout.base import Conversation, Sampler, SamplingSettings, Spoken, cached_casts
from lit_opd.rollout.retold import Retold
from lit_opd.turns.environment import (
    PROMPT_ROLES,
    Answer,
    Environment,
    Episode,
    Refused,
    Response,
    checked_answer,
    checked_messages,
)
from lit_opd.turns.stage import Failure, failure, run_all
from lit_opd.types import DataRow, FinishReason, PromptBatch, Provenance, Rollout, is_reward

OnFailure = Literal["end_row", "raise"]


@dataclass
class _Row:
    """One conversation as tokens, on the host."""

    state: Episode
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    reward: float | None = None
    reason: FinishReason = FinishReason.ENVIRONMENT
    said: Response = Response("", ())
    dtype: torch.dtype | None = None  # of the log-probs

    def add(self, ids: Sequence[int], logprobs: Sequence[float], *, sampled: bool, turn: int) -> None:
        self.ids += ids
        self.logprobs += logprobs
        self.sampled += [sampled] * len(ids)
        self.turns += [turn] * len(ids)


class TurnsSampler(SamplerAround):
    """Lets the student talk with an environment; ``sampler`` draws the tokens.

    A turn that the student ends itself is answered, until the environment is done, ``max_turns`` are over, or the row's tokens
    are: ``sampler.max_new_tokens`` bounds all that stands after the prompt, answers included. A turn without an end, and an
    answer that no longer fits, end their row as ``FinishReason.LENGTH``; as ``FinishReason.BUDGET`` where they would have had
    room without a length budget.

    Args:
        sampler: the engine. ``DecodeSampler`` goes on from its keys and values; others are sent the conversation so far, which a
            server with a prefix cache does not read again.
        environment: answers.
        max_turns: of the student, >= 1.
        max_turn_tokens: sampled tokens a turn may have; None for no bound but the row's.
        timeout: seconds a call of the environment may take.
        workers: rows that are answered at once.
        on_failure: what an environment that fails, takes too long or returns what cannot be used does: end_row (its row ends as
            ``FinishReason.ENVIRONMENT``, is counted and trained on as far as it came) or raise (the run stops).
    Raises:
        InputError: a value outside its range.
    """

    reads_rows = True

    def __init__(
        self,
        sampler: Sampler,
        environment: Environment,
        max_turns: int = 8,
        max_turn_tokens: int | None = None,
        timeout: float = 60.0,
        workers: int = 32,
        on_failure: OnFailure = "end_row",
    ) -> None:
        name = type(self).__name__
        require(isinstance(sampler, Sampler), f"{name}.sampler", "a Sampler", sampler)
        inside = type(sampler).__name__
        require(sampler.engine is sampler, f"{name}.sampler", "an engine that samples single turns", inside)
        require(not sampler.ahead, f"{name}.sampler.ahead", "0: conversations are not sampled ahead", sampler.ahead)
        require(isinstance(environment, Environment), f"{name}.environment", "an Environment", environment)
        require(max_turns >= 1, f"{name}.max_turns", ">= 1", max_turns)
        require(
            max_turn_tokens is None or max_turn_tokens >= 1, f"{name}.max_turn_tokens", ">= 1 or null", max_turn_tokens
        )
        require(timeout > 0, f"{name}.timeout", "> 0 seconds", timeout)
        require(workers >= 1, f"{name}.workers", ">= 1", workers)
        require(on_failure in get_args(OnFailure), f"{name}.on_failure", "end_row or raise", on_failure)
        super().__init__(sampler)
        self.sampler, self.environment, self.max_turns = sampler, environment, max_turns
        self.max_turn_tokens, self.timeout, self.workers, self.on_failure = (
            max_turn_tokens,
            timeout,
            workers,
            on_failure,
        )
        self.tools = environment.tools
        self._following: Following | None = None
        self._longest: int | None = None  # tokens of a prompt and response, where the run knows
        self._told: set[str] = set()

    # -- what the engine is asked ------------------------------------------------------------------------------------

    def check(self, *, tokens: int | None, vocabulary: int) -> None:
        """As the engine."""
        self._longest = tokens
        super().check(tokens=tokens, vocabulary=vocabulary)

    def attach(self, tokenizer: Any, encoder: Any | None) -> None:
        """The chat template can render what the environment answers, and the environment works.

        Raises:
            InputError: it cannot.
        """
        self._following = Following(encoder or PromptEncoder(tokenizer))
        self._following.check(self.environment.role)
        self.environment.check()

    # -- the conversation --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, model: Any, prompts: PromptBatch, settings: SamplingSettings) -> Rollout:
        """One conversation a row, [B, T <= max_new_tokens]; see ``Sampler.sample``.

        Raises:
            InputError: the run was not told how prompts are rendered, or the batch has no data rows.
            InputError: the environment failed, where ``on_failure`` is raise; on every rank.
        """
        self._refuse_stop(settings)
        if self._following is None or prompts.data is None:
            raise InputError(
                "`TurnsSampler` must know the data rows and their chat template, got a batch without; train from a "
                "PromptDataModule (`keep_rows: true` where it has no trainer), and call `attach` first"
            )
        rows = [_Row(Episode(row)) for row in prompts.data]
        with shared_failure():
            prompts, living = self._begin(rows, prompts, settings)
        with cached_casts(prompts.ids.device), self.sampler.kept_awake():
            provenance = self._play(model, rows, living, prompts, settings)
        return _rollout(rows, prompts, settings, provenance)

    def _play(
        self, model: Any, rows: list[_Row], living: list[int], prompts: PromptBatch, settings: SamplingSettings
    ) -> Provenance:
        """Every row to its end; ranks go on together until the last has none left."""
        device = prompts.ids.device
        index = torch.tensor(living or [0], dtype=torch.int64, device=device)
        first = replace(prompts, data=None).rows(index)
        own = self.sampler.converse(model, first, settings)
        talk: Conversation = Retold(self.sampler, model, first, settings) if own is None else own
        if not living:
            talk.forget()
        for turn in range(self.max_turns):
            if not largest(len(living), device):
                break
            spoken = talk.speak([self._room(rows[row], settings) for row in living])
            for place, row in enumerate(living):
                self._take(rows[row], spoken, place, turn, settings)
            ended = [row for place, row in enumerate(living) if spoken.stopped[place]]
            with shared_failure():
                heard = self._answered(rows, ended, turn, settings)
            talk.hear([place for place, row in enumerate(living) if row in heard], list(heard.values()))
            living = list(heard)
        return talk.provenance

    def _room(self, row: _Row, settings: SamplingSettings) -> int:
        """Tokens that the next turn may have."""
        left = settings.max_new_tokens - len(row.ids)
        return left if self.max_turn_tokens is None else min(left, self.max_turn_tokens)

    def _take(self, row: _Row, spoken: Spoken, place: int, turn: int, settings: SamplingSettings) -> None:
        """One turn into its row."""
        left = settings.max_new_tokens - len(row.ids)
        length = spoken.lengths[place]
        ids = spoken.ids[place, :length].tolist()
        row.add(ids, spoken.logprobs[place, :length].tolist(), sampled=True, turn=turn)
        row.dtype = spoken.logprobs.dtype
        row.reason = _cut(settings, by_budget=self.max_turn_tokens is None or left < self.max_turn_tokens)
        if spoken.stopped[place]:
            text = self._tokenizer.decode(ids[:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            row.said = Response(text, tuple(ids))

    @property
    def _tokenizer(self) -> Any:
        assert self._following is not None
        return self._following.encoder.tokenizer

    # -- the environment ---------------------------------------------------------------------------------------------

    def _begin(
        self, rows: list[_Row], prompts: PromptBatch, settings: SamplingSettings
    ) -> tuple[PromptBatch, list[int]]:
        """What each row is asked, and the rows that were begun."""
        calls = [(row.state.row,) for row in rows]
        found = run_all(self.environment.reset, calls, timeout=self.timeout, workers=self.workers)
        living, changed = [], {}
        for number, (row, messages) in enumerate(zip(rows, found, strict=True)):
            try:
                ids = self._asked(row, messages, settings)
            except (Refused, InputError) as error:
                self._failed(row, Failure(f"reset {error}"))
                continue
            living.append(number)
            if ids is not None:
                changed[number] = ids
        data = tuple(_read_row(row.state) if number in changed else row.state.row for number, row in enumerate(rows))
        return _with_prompts(replace(prompts, data=data), changed, settings), living

    def _asked(self, row: _Row, messages: Any, settings: SamplingSettings) -> list[int] | None:
        """Ids of the prompt that ``reset`` gave; None where it is the data row's."""
        assert self._following is not None
        if isinstance(messages, Failure):
            raise Refused(messages.why)
        row.state.messages = checked_messages(messages, PROMPT_ROLES)
        given = row.state.row
        if row.state.messages == given.prompt:
            return None
        encoder = self._following.encoder
        ids = encoder.encode(row.state.messages, f"row {given.row_id!r}", tools=given.tools)
        if self._longest is not None and len(ids) > self._longest - settings.max_new_tokens:
            raise Refused(
                f"gives a prompt of {len(ids)} tokens, more than the longest row of {self._longest} leaves beside "
                f"`max_new_tokens` {settings.max_new_tokens}; shorten it or raise `data.max_prompt_tokens`"
            )
        return ids

    def _answered(
        self, rows: list[_Row], ended: Sequence[int], turn: int, settings: SamplingSettings
    ) -> dict[int, list[int]]:
        """The rows that go on, with what they read next."""
        for number in ended:
            state = rows[number].state
            state.messages.append({"role": "assistant", "content": rows[number].said.text})
            state.turn += 1
        heard = {}
        for number, answer in zip(ended, self._answers([rows[number] for number in ended]), strict=True):
            ids = self._heard(rows[number], answer, turn, settings)
            if ids is not None:
                heard[number] = ids
        return heard

    def _answers(self, rows: Sequence[_Row]) -> list[Any]:
        """What the environment returned for each row, or a ``Failure``."""
        calls = [(row.state, row.said) for row in rows]
        together = getattr(self.environment, "step_all", None)
        if together is None or not calls:
            return run_all(self.environment.step, calls, timeout=self.timeout, workers=self.workers)
        states, responses = zip(*calls, strict=True)
        (found,) = run_all(together, [(list(states), list(responses))], timeout=self.timeout, workers=1)
        if not isinstance(found, Failure) and (not isinstance(found, list | tuple) or len(found) != len(rows)):
            found = Failure(f"step_all must return a list of {len(rows)} answers, got {type(found).__name__}")
        if isinstance(found, Failure):
            return [found] * len(rows)
        return [failure(answer) if isinstance(answer, BaseException) else answer for answer in found]

    def _heard(self, row: _Row, answer: Any, turn: int, settings: SamplingSettings) -> list[int] | None:
        """Ids that the row reads next, which are added to it; None where it ends."""
        if isinstance(answer, Failure):
            self._failed(row, answer)
            return None
        try:
            answer = checked_answer(answer, self.environment.role)
            reward = _total(row.reward, answer.reward)
            ids = [] if answer.done else self._observed(row, answer, settings)
        except (Refused, InputError) as error:
            self._failed(row, Failure(str(error)))
            return None
        row.reward = reward
        if answer.done:
            row.reason = FinishReason.STOP
            return None
        row.state.messages += answer.observation
        if turn + 1 == self.max_turns:
            row.reason = FinishReason.TURNS
            return None
        length = len(row.ids) + len(ids)
        if length >= settings.max_new_tokens:
            row.reason = _cut(settings, by_budget=length < self.max_new_tokens)
            return None
        row.add(ids, [0.0] * len(ids), sampled=False, turn=turn + 1)
        return ids

    def _observed(self, row: _Row, answer: Answer, settings: SamplingSettings) -> list[int]:
        """Ids of what the template makes of an answer."""
        assert self._following is not None
        roles = [message["role"] for message in row.state.messages[:-1]]
        ids = self._following.ids(roles, answer.observation, closing=row.ids[-1])  # type: ignore[arg-type]
        if beyond := [token for token in ids if token >= settings.vocabulary]:
            raise Refused(
                f"has token ids outside [0, {settings.vocabulary}), which student and teacher share: {beyond[:5]}"
            )
        return ids

    def _failed(self, row: _Row, why: Failure) -> None:
        """The row ends here, or the run does."""
        row.reason = FinishReason.ENVIRONMENT
        name, kind = type(self.environment).__name__, "took too long" if why.timed_out else "failed"
        said = f"the environment {name} {kind} in row {row.state.row.row_id!r}, turn {row.state.turn}: {why.why}"
        if self.on_failure == "raise":
            raise InputError(f"{said}; correct it, or set `on_failure: end_row`")
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(
                f"{said}; the row ends there, and all such rows are counted as train/environment_failed_fraction",
                stacklevel=2,
            )


def _total(so_far: float | None, reward: float | None) -> float | None:
    """A row's reward with that of a further turn."""
    if so_far is None or reward is None:
        return so_far if reward is None else reward
    if not is_reward(so_far + reward):
        raise Refused(f"must return rewards whose sum is a finite number (of float32), got {so_far:g} and {reward:g}")
    return so_far + reward


def _read_row(state: Episode) -> DataRow:
    """The data row with the messages that ``reset`` gave, which a teacher's prompt of the samples is made of."""
    row = state.row
    return DataRow(row, row_id=row.row_id, prompt=state.messages, answer=row.answer, tools=row.tools)


def _with_prompts(prompts: PromptBatch, changed: dict[int, list[int]], settings: SamplingSettings) -> PromptBatch:
    """``prompts`` with other ids in some rows."""
    if not changed:
        return prompts
    if prompts.teacher_ids is not None:
        raise InputError(
            "`Environment.reset` must return the row's own messages where the teacher reads a prompt of its own, got others; "
            "leave `data.teacher_prompt` and the other teacher settings out, or put the prompt into the data"
        )
    own = zip(prompts.ids.cpu(), prompts.mask.cpu(), strict=True)
    texts = [changed.get(number, row[valid].tolist()) for number, (row, valid) in enumerate(own)]
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), settings.pad_id, dtype=torch.int64)
    mask = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :], mask[row, width - len(text) :] = torch.tensor(text), True
    return replace(prompts, ids=ids.to(prompts.ids.device), mask=mask.to(prompts.ids.device))


def _cut(settings: SamplingSettings, *, by_budget: bool) -> FinishReason:
    """Why a row ended that had no room left: by its length budget, or by what bounds it without one."""
    return FinishReason.BUDGET if settings.budgeted and by_budget else FinishReason.LENGTH


def _rollout(rows: Sequence[_Row], prompts: PromptBatch, settings: SamplingSettings, provenance: Provenance) -> Rollout:
    """The record of conversations."""
    columns, device = max(1, *(len(row.ids) for row in rows)), prompts.ids.device
    dtype = next((row.dtype for row in rows if row.dtype is not None), torch.float32)

    def filled(name: str, fill: Any, kind: torch.dtype) -> Tensor:
        parts = [[*getattr(row, name), *[fill] * (columns - len(row.ids))] for row in rows]
        return torch.tensor(parts, dtype=kind).to(device)

    sampled = filled("sampled", False, torch.bool)
    rewards = [math.nan if row.reward is None else row.reward for row in rows]
    lengths = torch.tensor([len(row.ids) for row in rows], device=device)
    read = torch.arange(columns, device=device) < lengths.unsqueeze(-1)
    return Rollout(
        prompts=prompts,
        response_ids=filled("ids", settings.pad_id, torch.int64),
        mask=sampled,
        sampler_logprobs=filled("logprobs", 0.0, dtype),
        finish_reason=torch.tensor([int(row.reason) for row in rows], dtype=torch.int8, device=device),
        provenance=provenance,
        observed=read & ~sampled,
        turn=filled("turns", 0, torch.int64),
        reward=torch.tensor(rewards, dtype=torch.float32).to(device),
    )
