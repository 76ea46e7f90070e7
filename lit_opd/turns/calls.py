"""Tool calls in what a student wrote.

Hermes, Qwen 2.5, Qwen 3    <tool_call> {"name": "add", "arguments": {"a": 1}} </tool_call>
Qwen 3 Coder                <tool_call> <function=add> <parameter=a> 1 </parameter> </function> </tool_call>
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

_BLOCK = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|\Z)", re.S)
_FUNCTION = re.compile(r"<function=([^>\s]+)\s*>(.*?)</function>", re.S)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)\s*>\n?(.*?)\n?</parameter>", re.S)


@dataclass(frozen=True)
class Call:
    """One call.

    Args:
        name: of the tool; empty where it could not be read.
        arguments: by name; those of the form of Qwen 3 Coder are text unless they are JSON.
        wrong: why it cannot be called; None where it can be.
        written: by name, in the form of Qwen 3 Coder alone: what stood there, for a parameter that is text.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    wrong: str | None = None
    written: dict[str, str] = field(default_factory=dict, repr=False, compare=False)


def tool_calls(text: str) -> list[Call]:
    """The calls in a text, in order; what begins as a call and is none is told as one that cannot be called.

    >>> tool_calls('I add. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    [Call(name='add', arguments={'a': 1}, wrong=None)]
    >>> tool_calls("<tool_call><function=add><parameter=a>1</parameter></function></tool_call>")
    [Call(name='add', arguments={'a': 1}, wrong=None)]
    >>> tool_calls("<tool_call>{")[0].wrong
    'the call is not closed by </tool_call>'
    """
    return [_call(match[1].strip(), closed=bool(match[2])) for match in _BLOCK.finditer(text)]


def _call(body: str, *, closed: bool) -> Call:
    if not closed:
        return Call("", wrong="the call is not closed by </tool_call>")
    if (function := _FUNCTION.fullmatch(body)) is not None:
        pairs = _PARAMETER.findall(function[2])
        if _PARAMETER.sub("", function[2]).strip():
            return Call(function[1], wrong="something stands between the parameters")
        return Call(function[1], {name: _value(value) for name, value in pairs}, written=dict(pairs))
    return _json_call(body)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _json_call(body: str) -> Call:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        return Call("", wrong=f"the call is no JSON ({error})")
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return Call("", wrong="the call must be an object with `name` and `arguments`")
    arguments = found.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _value(arguments)
    if not isinstance(arguments, dict):
        return Call(found["name"], wrong="`arguments` must be an object")
    return Call(found["name"], arguments)
