"""What only the teacher reads: its own prompt, made of a row's columns.

A template's braces are read once, when it is made; what stands in the data is put in as it is and never read again.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeVar, cast

from lit_opd.errors import InputError
from lit_opd.prompts.filters import MISSING, shown, value_at
from lit_opd.prompts.layouts import Message

FIELD = "PromptDataModule.teacher_prompt"
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class TeacherPrompt(ABC):
    """The teacher's prompt of a row; a subclass in your own file is used by its class path.

    >>> class Solved(TeacherPrompt):
    ...     def render(self, row, prompt):
    ...         return f"{row['problem']} The answer is {row['answer']}."
    >>> Solved().render({"problem": "1 + 1?", "answer": 2}, "1 + 1?")
    '1 + 1? The answer is 2.'
    """

    @abstractmethod
    def render(self, row: Mapping[str, Any], prompt: str | list[Message]) -> str | list[Message]:
        """Text or chat messages.

        Args:
            row: its columns; not to be changed.
            prompt: what the student reads, before its chat template.
        """

    @property
    def columns(self) -> frozenset[str]:
        """Columns that are known to be read; a hint among them is not taken for the answer by its name."""
        return frozenset()


class Template(TeacherPrompt):
    """Text with columns in braces, or chat messages of such texts.

    ``{solution}`` is the row's column, with dots a part of one (``{extra_info.solution}``); ``{{`` and ``}}`` are braces. A text
    or a number is put in as it is.

    Args:
        template: text, or messages with ``role`` and ``content``.
    Raises:
        InputError: no column, an empty one, a brace that stands alone, or a message of another form.

    >>> Template("{problem} {{hint: {hint}}}").render({"problem": "1 + 1?", "hint": "{2}"}, "")
    '1 + 1? {hint: {2}}'
    """

    def __init__(self, template: str | Sequence[Message]) -> None:
        self.template = template
        self._messages = parsed(template)
        if not self.columns:
            raise InputError(
                f"`{FIELD}` must name a column in braces, such as {{solution}}, got {shown(template)}; for a text that is the "
                "same in all rows set `data.teacher_system_prompt`"
            )

    @property
    def columns(self) -> frozenset[str]:
        """All that stand in braces."""
        return columns_of(self._messages)

    def render(self, row: Mapping[str, Any], prompt: str | list[Message]) -> str | list[Message]:
        """The template with the row's values.

        Raises:
            InputError: a column is missing, null or no text; the place of the row is put before it by who calls.
        """
        return filled(self._messages, row)


Parsed = list[
    tuple[str | None, list[tuple[str, bool]]]
]  # role, None for a text, and pieces: text, or a column's name (True)


def parsed(template: str | Sequence[Message]) -> Parsed:
    """A template's messages, cut into pieces.

    Raises:
        InputError: a brace that stands alone, an empty pair, or a message of another form.
    """
    if isinstance(template, str):
        return [(None, _pieces(template))]
    return [_message(message, number) for number, message in enumerate(template)]


def columns_of(messages: Parsed) -> frozenset[str]:
    """All names that stand in braces."""
    return frozenset(text for _, pieces in messages for text, is_column in pieces if is_column)


def filled(messages: Parsed, row: Mapping[str, Any]) -> str | list[Message]:
    """Text or chat messages with the row's values.

    Raises:
        InputError: a column is missing, null or no text.
    """
    texts = [(role, "".join(_texts(pieces, row))) for role, pieces in messages]
    if texts[0][0] is None:
        return texts[0][1]
    return [{"role": str(role), "content": text} for role, text in texts]


def _texts(pieces: Sequence[tuple[str, bool]], row: Mapping[str, Any]) -> Iterator[str]:
    for text, is_column in pieces:
        yield _value(row, text) if is_column else text


def _message(message: Any, number: int) -> tuple[str, list[tuple[str, bool]]]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise InputError(f"`{FIELD}`: message {number} must have `role` and `content` alone, got {shown(message)}")
    if not all(isinstance(value, str) for value in message.values()):
        raise InputError(f"`{FIELD}`: role and content of message {number} must be text, got {shown(message)}")
    return message["role"], _pieces(message["content"])


def _pieces(template: str) -> list[tuple[str, bool]]:
    """Texts, and names of columns (True)."""
    found, end = [], 0
    for match in _PIECE.finditer(template):
        found.append((template[end : match.start()], False))
        end = match.end()
        if match[0] in ("{{", "}}"):
            found.append((match[0][0], False))
        elif match[1]:
            found.append((match[1], True))
        else:
            what = "an empty pair of braces" if match[0] == "{}" else f"a single {match[0]!r}"
            raise InputError(
                f"`{FIELD}` must have column names in its braces, got {what} at character {match.start()} of "
                f"{shown(template)}; double braces that are meant as text"
            )
    return [*found, (template[end:], False)]


def _value(row: Mapping[str, Any], column: str) -> str:
    value = value_at(dict(row), column)
    if value is MISSING:
        raise InputError(
            f"`{FIELD}` reads column {column!r}, which is missing; columns found: {', '.join(row) or 'none'}. Correct the name, "
            "or leave such rows out"
        )
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise InputError(
            f"`{FIELD}` reads column {column!r}, which must hold text or a number, got {shown(value)}; name a part of it with a "
            f"dot, leave such rows out (`filter: {column} != null`), or give a class of your own"
        )
    return str(value)


Made = TypeVar("Made")


def teacher_prompt(value: str | Sequence[Message] | Made | None) -> TeacherPrompt | Made | None:
    """The setting as an object; None where the teacher reads the student's prompt."""
    return Template(value) if isinstance(value, str | list | tuple) else cast("Made | None", value)


def rendered(
    own: TeacherPrompt, row: Mapping[str, Any], prompt: str | list[Message], where: str
) -> str | list[Message]:
    """What ``own`` makes of a row, unchecked.

    Raises:
        InputError: it cannot, naming the row.
    """
    try:
        found = own.render(row, prompt)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except Exception as error:  # a class of the user's may raise anything
        name = type(own).__name__
        raise InputError(
            f"{where}: `{FIELD}` {name} failed ({type(error).__name__}: {error}); columns found: {', '.join(row) or 'none'}"
        ) from error
    require_user_last(found, where)
    return found


def require_user_last(prompt: Any, where: str) -> None:
    """Refuse messages that end with an assistant's turn.

    Raises:
        InputError: they do, naming the row.
    """
    last = prompt[-1] if isinstance(prompt, list) and prompt else None
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        raise InputError(
            f"{where}: `{FIELD}` must end with a user's turn, which the response answers, got an assistant's; put the hint into "
            "an earlier turn"
        )
