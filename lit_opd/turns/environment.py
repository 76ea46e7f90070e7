"""What answers the student between its turns."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_opd.prompts.filters import shown
from lit_opd.prompts.tools import checked_calls
from lit_opd.types import DataRow, is_reward

ANSWERING_ROLES = ("user", "tool")  # of messages between two turns of the student
PROMPT_ROLES = ("system", "developer", "user", "assistant", "tool")

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Response:
    """What the student said in one turn.

    Args:
        text: special tokens included, without the one that ended it.
        ids: the sampled tokens, the end symbol included.
    """

    text: str
    ids: tuple[int, ...]


@dataclass
class Episode:
    """One row's conversation, from ``reset`` to its end; nothing of it is shared with other rows.

    Args:
        row: the data row.
        messages: all so far: those of ``reset``, then by turns what the student said and what it was answered.
        turn: turns that the student has had.
        memory: the environment's own.
    """

    row: DataRow
    messages: Messages = field(default_factory=list)
    turn: int = 0
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What an environment makes of a turn.

    Args:
        observation: text, or messages of the roles user and tool; not read where ``done``.
        done: the conversation is over.
        reward: of this turn, finite; a row's reward is the sum over its turns. None for none.
    """

    observation: str | Sequence[Mapping[str, Any]] | None = None
    done: bool = False
    reward: float | None = None


class Environment(ABC):
    """Answers the student; a subclass in your own file is used by its class path.

    Rows are answered at the same time: ``step`` in threads, or as coroutines where it is ``async``. A class that answers many
    rows in one call defines ``step_all(states, responses)``, which returns as many answers, an exception for a row that failed.

    >>> class Echo(Environment):
    ...     def step(self, state, response):
    ...         return f"you said {response.text}", state.turn == 2, 1.0
    >>> Echo().step(Episode(DataRow(), turn=1), Response("4", (4, 1)))
    ('you said 4', False, 1.0)
    """

    role = "user"  # of an observation that is text
    tools: Sequence[Mapping[str, Any]] | None = (
        None  # JSON schemas that prompts are rendered with, where a row names none
    )

    def check(self) -> None:  # noqa: B027
        """What can be checked before a run.

        Raises:
            InputError: it cannot be played here.
        """

    def reset(self, row: DataRow) -> Messages:
        """The messages that a conversation begins with.

        Args:
            row: its columns by name, and ``row.prompt``, ``row.answer``, ``row.row_id``; not to be changed.
        """
        return [dict(message) for message in row.prompt]

    @abstractmethod
    def step(self, state: Episode, response: Response) -> Any:
        """What follows a turn that the student ended itself.

        Args:
            state: of the row; ``response`` is its last message.
            response: text and ids.
        Returns:
            an ``Answer``, or (observation, done, reward).
        """


class Refused(ValueError):
    """What an environment returned cannot be used; the message says what it must be."""


def checked_answer(value: Any, role: str) -> Answer:
    """An ``Answer`` whose observation is a list of messages.

    Raises:
        Refused: it is none.
    """
    if isinstance(value, tuple) and len(value) == len(Answer.__dataclass_fields__):
        value = Answer(*value)
    if not isinstance(value, Answer):
        raise Refused(f"must return an Answer, or (observation, done, reward), got {shown(value)}")
    if not isinstance(value.done, bool):
        raise Refused(f"must return `done` as True or False, got {shown(value.done)}")
    reward = value.reward
    if reward is not None and (isinstance(reward, bool) or not is_reward(reward)):
        raise Refused(f"must return a reward that is a finite number (of float32) or None, got {shown(reward)}")
    reward = None if reward is None else float(reward)
    if value.done:
        return Answer(None, True, reward)
    said = value.observation
    messages = [{"role": role, "content": said}] if isinstance(said, str) else said
    return Answer(checked_messages(messages, ANSWERING_ROLES), False, reward)


def checked_messages(value: Any, roles: Sequence[str]) -> Messages:
    """Messages of the given roles, calls of an assistant's in the one form that templates read.

    Raises:
        Refused: they are none.
        InputError: a call is none.
    """
    if not isinstance(value, list | tuple) or not value:
        raise Refused(f"must give text or a list of messages, got {shown(value)}")
    return [_checked_message(message, roles) for message in value]


def _checked_message(message: Any, roles: Sequence[str]) -> dict[str, Any]:
    if not isinstance(message, Mapping) or message.get("role") not in roles:
        raise Refused(f"must give messages with a role of {', '.join(roles)}, got {shown(message)}")
    found = dict(message)
    if found.get("tool_calls"):
        if found["role"] != "assistant":
            raise Refused(f"must give tool calls in messages of the assistant alone, got {shown(message)}")
        found["tool_calls"] = checked_calls(found["tool_calls"], "message")
        found["content"] = found.get("content") or ""
    if not isinstance(found.get("content"), str):
        raise Refused(f"must give messages whose content is text, got {shown(message)}")
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:  # half a character is a ValueError
        raise Refused(
            f"must give messages of JSON values in whole characters, got {shown(message)} ({error})"
        ) from error
    return found
