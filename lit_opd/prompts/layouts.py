"""How people lay a row out: nested columns, chats under other names or as JSON text, instruction and input apart."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from lit_opd.errors import InputError
from lit_opd.prompts.filters import MISSING, shown, value_at
from lit_opd.prompts.tools import COLUMN, row_tools

Message = dict[str, Any]  # role, content, and of an assistant maybe tool_calls
JOINED = {"instruction": ("input", "context")}  # prompt column -> the column that belongs after it (Alpaca, Dolly)
SYSTEM_COLUMNS = ("system", "system_prompt")
HISTORY_COLUMN = "history"  # pairs of question and answer
CHATS = ("messages", "conversations", "conversation", "prompt")
# columns that often hold a part of the question
_PARTS = (
    "instruction", "input", "context", "passage", "choices", "options", *SYSTEM_COLUMNS, HISTORY_COLUMN, COLUMN, "image",
    "images",
)  # fmt: skip
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "assistant"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool"), "tool"),
}
_SPEAKERS, _TEXTS = ("role", "from"), ("content", "value")
_LIKE_MESSAGES = re.compile(r"""\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")
_DEEPEST = 3  # levels of nested columns that messages list


def column_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Every column of the rows in order, those of objects inside objects with dots."""
    return list(dict.fromkeys(name for row in rows for name in _names(row, _DEEPEST)))


def _names(values: dict[str, Any], depth: int) -> Iterator[str]:
    for name, value in values.items():
        yield name
        if isinstance(value, dict) and depth > 1:
            yield from (f"{name}.{inner}" for inner in _names(value, depth - 1))


def holds(value: Any) -> bool:
    """There is something: not missing, null, NaN, empty or white space."""
    return (
        value is not MISSING
        and value is not None
        and value == value
        and value != []
        and not (isinstance(value, str) and not value.strip())
    )


def prompt_of(values: dict[str, Any], column: str, where: str, *, joins: bool) -> Any:
    """Text or messages of a row, from all columns that are parts of the prompt.

    Args:
        values: the row.
        column: of the prompt.
        where: "FILE:LINE" for messages.
        joins: read the columns that belong to it in a usual layout; False where the column was named by the user.
    """
    prompt = as_messages(value_at(values, column), where, column)
    if not joins:
        return prompt
    other = _joined(values, column)
    if other is not None and isinstance(prompt, str):
        if not isinstance(values[other], str):
            raise InputError(f"{where}: {other!r} must hold text beside {column!r}, got {shown(values[other])}")
        prompt = f"{prompt}\n\n{values[other]}"
    return _with_context(values, prompt)


def _joined(values: dict[str, Any], column: str) -> str | None:
    return next((name for name in JOINED.get(column, ()) if holds(values.get(name))), None)


def _with_context(values: dict[str, Any], prompt: Any) -> Any:
    """``prompt`` after the row's system message and earlier turns, where it has some."""
    system = next((values[name] for name in SYSTEM_COLUMNS if _is_text(values.get(name))), None)
    turns = _history(values.get(HISTORY_COLUMN)) if isinstance(prompt, str) else []
    if system is None and not turns:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is not None and not _has_system(messages):
        turns = [{"role": "system", "content": system}, *turns]
    return [*turns, *messages]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and holds(value)


def _has_system(messages: Sequence[Any]) -> bool:
    return bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"


def _history(value: Any) -> list[Message]:
    """Earlier turns from pairs of texts; none for anything else."""
    pairs = value if isinstance(value, list) else []
    if not all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_text, pair)) for pair in pairs):
        return []
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def left_out(values: dict[str, Any], column: str, *, joins: bool) -> list[str]:
    """Columns that hold what may belong to the prompt and are not in it."""
    read = {column, column.partition(".")[0]}
    read |= {COLUMN} if row_tools(values) is not None else set()
    if joins:
        read |= {_joined(values, column) or column}
        read |= {name for name in SYSTEM_COLUMNS if _is_text(values.get(name))}
        read |= {HISTORY_COLUMN} if _history(values.get(HISTORY_COLUMN)) else set()
    return [name for name in _PARTS if name not in read and holds(values.get(name))]


def as_messages(value: Any, where: str, column: str) -> Any:
    """Chat messages under their usual names and forms with ``role`` and ``content``; anything else as it is.

    Read are ShareGPT's from / value, a column of lists in place of a list of objects, and any of these as JSON text.

    Raises:
        InputError: text that begins as messages do and cannot be read, or a chat one level deeper.
    """
    if isinstance(value, str):
        value = _from_text(value, where, column)
    if isinstance(value, dict):
        return _from_object(value, where, column)
    return [_renamed(message) for message in value] if isinstance(value, list) else value


def _from_text(text: str, where: str, column: str) -> Any:
    """The messages that ``text`` spells, or ``text``."""
    stripped = text.strip()
    if stripped[:1] not in ("[", "{"):
        return text
    parsed = _parsed(stripped)
    if _are_messages(parsed) or (isinstance(parsed, dict) and _chat_inside(parsed)):
        return parsed
    if parsed is None and _LIKE_MESSAGES.match(stripped):
        raise InputError(
            f"{where}: {column!r} looks like chat messages as text, and is neither JSON nor a Python list; store a list of "
            "objects with `role` and `content`, or name another `prompt_column`"
        )
    return text


def _parsed(text: str) -> Any:
    """JSON, or what Python prints of lists and dictionaries; None for neither."""
    for read in (json.loads, ast.literal_eval) if _LIKE_MESSAGES.match(text) else (json.loads,):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return None


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_message(message) for message in value)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(map(value.__contains__, _SPEAKERS)) and any(map(value.__contains__, _TEXTS))


def _chat_inside(value: dict[str, Any]) -> str | None:
    return next((name for name in CHATS if _are_messages(value.get(name))), None)


def _from_object(value: dict[str, Any], where: str, column: str) -> Any:
    """Columns of lists (as some readers give lists of objects), one message, or an error that names a chat inside."""
    if inside := _chat_inside(value):
        raise InputError(
            f"{where}: {column!r} is an object that holds a chat in {inside!r}; set `prompt_column: {column}.{inside}`"
        )
    if _is_message(value):
        lists = [part for part in value.values() if isinstance(part, list)]
        if len(lists) == len(value) and len({len(part) for part in lists}) == 1:
            return [_renamed(dict(zip(value, parts, strict=True))) for parts in zip(*lists, strict=True)]
        return [_renamed(value)]
    return value


def _renamed(message: Any) -> Any:
    if not isinstance(message, dict) or not _is_message(message):
        return message
    speaker = next(message[name] for name in _SPEAKERS if name in message)
    content = next(message[name] for name in _TEXTS if name in message)
    rest = {name: value for name, value in message.items() if name not in (*_SPEAKERS, *_TEXTS)}
    return {**rest, "role": _ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker, "content": content}
