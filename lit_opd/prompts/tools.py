"""Tools and their calls as data sets write them, in the one form that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lit_opd.errors import InputError
from lit_opd.prompts.filters import MISSING, shown

COLUMN = "tools"
CALLS = "tool_calls"
KEPT_WITH_MESSAGE = ("name", "tool_call_id", "id", "reasoning_content")

Schema = dict[str, Any]


def row_tools(values: Mapping[str, Any], where: str = "row") -> list[Schema] | None:
    """The JSON schemas in a row's column ``tools``; None where it names none, or holds something else than objects.

    Read are {"type": "function", "function": {"name", ...}}, the inner object alone, and a list of either as JSON text.

    Raises:
        InputError: a schema has no name.
    """
    value = values.get(COLUMN, MISSING)
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not value or not all(isinstance(tool, Mapping) for tool in value):
        return None
    return [_schema(tool, f"{where}: tool {number}") for number, tool in enumerate(value)]


def without_padding(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row that was read from Arrow, without the nulls that Arrow wrote into its tools and calls.

    In Arrow all objects of a column have the same keys. A key that only another tool has stands here as null, and a template
    would show it. A null that was written into such an object cannot be told from these, and goes too; nulls in lists, in
    JSON text and in other columns stay.

    >>> without_padding({"tools": [{"name": "calc", "city": None}], "level": None})
    {'tools': [{'name': 'calc'}], 'level': None}
    """
    return {name: _without_padding(value, padded=name == COLUMN) for name, value in values.items()}


def _without_padding(value: Any, *, padded: bool) -> Any:
    if isinstance(value, Mapping):
        kept = {name: inner for name, inner in value.items() if inner is not None or not padded}
        return {name: _without_padding(inner, padded=padded or name == CALLS) for name, inner in kept.items()}
    return [_without_padding(inner, padded=padded) for inner in value] if isinstance(value, list) else value


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} must hold JSON, got {shown(text)} ({error})") from error


def _schema(tool: Any, where: str) -> Schema:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise InputError(f"{where} must be a JSON schema with a `name`, got {shown(tool)}")
    return {"type": "function", "function": dict(function)}


def checked_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of an assistant's message, arguments as objects.

    Read are {"type": "function", "function": {"name", "arguments"}} and the inner object alone; arguments may be JSON text.

    Raises:
        InputError: they are something else.
    """
    if not isinstance(value, list):
        raise InputError(f"{where}: `tool_calls` must be a list, got {shown(value)}")
    return [_call(call, f"{where}: call {number}") for number, call in enumerate(value)]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{where} must be an object with `name` and `arguments`, got {shown(call)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _from_json(arguments, f"{where}: `arguments`") if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise InputError(f"{where}: `arguments` must be an object, got {shown(arguments)}")
    kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**kept, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def first_called(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The name of the first tool that is called, None where none is."""
    calls = (call for message in messages for call in message.get("tool_calls") or ())
    return next((str(call["function"]["name"]) for call in calls), None)


def texts_beside(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> Iterator[str]:
    """Every text of tools and calls, and of what stands in a message beside its content."""
    yield from _texts(list(tools or ()))
    for message in messages:
        yield from _texts([value for name, value in message.items() if name not in ("role", "content")])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from (str(name), *_texts(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
