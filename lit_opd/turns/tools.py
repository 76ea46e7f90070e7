"""An environment of tools: it runs what the student calls and ends where it calls nothing."""

from __future__ import annotations

import inspect
import json
from abc import ABC
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lit_opd.answers import NeedsMathematics, arithmetic, last_box, same, undecided
from lit_opd.answers.cleaning import MAX_CHARS
from lit_opd.errors import InputError, require
from lit_opd.turns.calls import Call, tool_calls
from lit_opd.turns.environment import Answer, Environment, Episode, Response
from lit_opd.types import DataRow

OnUnknown = Literal["tell", "end_row"]
MOST_CHARACTERS = 500  # of an expression


class ToolError(ValueError):
    """A call that the student made wrongly; it is told the message."""


class Tool(ABC):
    """What a student may call; a subclass in your own file is used by its class path.

    The first paragraph of the class's docstring and the annotations of ``call`` are what the student is shown.

    >>> class Double(Tool):
    ...     '''Twice a number.'''
    ...     name = "double"
    ...     def call(self, number: int) -> str:
    ...         return str(2 * number)
    >>> Double().schema["function"]["parameters"]["properties"]
    {'number': {'type': 'integer'}}
    """

    name: str

    # a subclass names its own parameters
    call: Any

    def check(self) -> None:  # noqa: B027
        """What can be checked before a run.

        Raises:
            InputError: it cannot be called here.
        """

    @property
    def schema(self) -> dict[str, Any]:
        """As chat templates read it."""
        parameters = _named(self.call)
        hints = _hints(self.call)
        properties = {part.name: _typed(hints.get(part.name, part.annotation)) for part in parameters}
        needed = [part.name for part in parameters if part.default is part.empty]
        described = " ".join((inspect.getdoc(type(self)) or self.name).partition("\n\n")[0].split())
        body = {"type": "object", "properties": properties, "required": needed}
        return {"type": "function", "function": {"name": self.name, "description": described, "parameters": body}}


_TYPES: dict[Any, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array", tuple: "array",
    Mapping: "object", Sequence: "array",
}  # fmt: skip
_TEXT = {"type": "string"}
_BY_NAME = {kind.__name__: name for kind, name in _TYPES.items()}


def _named(call: Any) -> list[inspect.Parameter]:
    """The parameters that have a name of their own: neither ``*args`` nor ``**kwargs``."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [part for part in inspect.signature(call).parameters.values() if part.kind not in variable]


def _hints(call: Any) -> dict[str, Any]:
    """Its annotations as types; none where a name in them cannot be found."""
    try:
        return get_type_hints(call)
    except (NameError, TypeError):
        return {}


def _typed(annotation: Any) -> dict[str, Any]:
    """A parameter's JSON schema: text where the annotation does not say, nothing where it says that all is allowed."""
    kinds = _kinds(annotation)
    kinds -= {"integer"} if "number" in kinds else set()
    if len(kinds) > 1:
        return {"type": sorted(kinds)}
    return {"type": kinds.pop()} if kinds else {}


def _kinds(annotation: Any) -> set[str]:
    """JSON's names of the types that an annotation allows, None aside."""
    if annotation is Any:
        return set()
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        parts = [_kinds(part) for part in get_args(annotation) if part is not NoneType]
        return set().union(*parts) if all(parts) else set()
    if origin is Literal:
        return {_TYPES.get(type(value), "string") for value in get_args(annotation)}
    kind = origin or annotation
    return {_BY_NAME.get(kind, "string") if isinstance(kind, str) else _TYPES.get(kind, "string")}


class Calculator(Tool):
    """The exact value of an arithmetic expression with + - * / ^ and brackets."""

    name = "calculator"

    def call(self, expression: str) -> str:
        """The value; no code is run."""
        value = arithmetic.value(expression.strip()) if len(expression) <= MOST_CHARACTERS else None
        if value is None:
            raise ToolError("not an arithmetic expression")
        try:
            return str(value)
        except ValueError as error:  # Python writes no more than 4,300 digits
            raise ToolError("the value has too many digits to be written") from error


class LookUp(Tool):
    """What a table says of a key.

    Args:
        entries: key -> value, or a JSON file of such an object.
    Raises:
        InputError: it is none.
    """

    name = "lookup"

    def __init__(self, entries: dict[str, str] | str) -> None:
        self.entries = _table(entries) if isinstance(entries, str) else dict(entries)

    def call(self, key: str) -> str:
        """The value."""
        if key not in self.entries:
            raise ToolError("no such key")
        return self.entries[key]


def _table(path: str) -> dict[str, str]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"`LookUp.entries` must be a JSON file, got {path!r} ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InputError(f"`LookUp.entries` must hold an object of texts, got {path!r} with something else")
    return found


class ToolEnvironment(Environment):
    """Runs the tools that the student calls, in the forms of ``lit_opd.turns.calls``, and answers with a message of role tool
    for each call. A turn without a call is the student's answer: the conversation is over.

    The reward is 1 or 0, whether the last box of that answer equals the row's answer as far as numbers and text say so; none
    for a row without an answer, and for one that mathematics would have to decide.

    What the student does wrongly (no JSON, missing arguments, ``ToolError``) it is told, as "error: ...". Any other exception of
    a tool is the environment's failure.

    Args:
        tools: at least one; names differ.
        show: let the chat template show the tools' schemas. False for a student that knows them.
        unknown: what a call of a tool that is not here does: tell (the student is told) or end_row (it counts as a failure).
        calls: most calls a turn that are run, >= 1; the student is told of the others.
    Raises:
        InputError: no tool, two of one name, or a value outside its range.
    """

    role = "tool"

    def __init__(self, tools: list[Tool], show: bool = True, unknown: OnUnknown = "tell", calls: int = 8) -> None:
        own = type(self).__name__
        require(bool(tools) and all(isinstance(tool, Tool) for tool in tools), f"{own}.tools", "a list of tools", tools)
        self.by_name = {tool.name: tool for tool in tools}
        require(len(self.by_name) == len(tools), f"{own}.tools", "of different names", [tool.name for tool in tools])
        require(unknown in get_args(OnUnknown), f"{own}.unknown", "tell or end_row", unknown)
        require(calls >= 1, f"{own}.calls", ">= 1", calls)
        self.unknown, self.calls = unknown, calls
        self.tools: Sequence[Mapping[str, Any]] | None = [tool.schema for tool in tools] if show else None

    def check(self) -> None:
        """Every tool works here."""
        for tool in self.by_name.values():
            tool.check()

    def step(self, state: Episode, response: Response) -> Answer:
        """Tool messages, or the end with its reward."""
        calls = tool_calls(response.text)
        if not calls:
            return Answer(done=True, reward=answer_reward(response.text, state.row))
        found = [self._run(call) if place < self.calls else "error: too many calls" for place, call in enumerate(calls)]
        return Answer([{"role": self.role, "content": _whole_characters(text)} for text in found])

    def _run(self, call: Call) -> str:
        if call.wrong is not None:
            return f"error: {call.wrong}"
        tool = self.by_name.get(call.name)
        if tool is None:
            if self.unknown == "end_row":
                raise LookupError(f"the student called {call.name!r}, there is {', '.join(self.by_name)}")
            return f"error: no tool {call.name}"
        wanted = tool.schema["function"]["parameters"]["properties"]
        texts = {name: text for name, text in call.written.items() if wanted.get(name) == _TEXT}
        arguments = call.arguments | texts
        try:
            inspect.signature(tool.call).bind(**arguments)
        except TypeError as error:
            return f"error: {error}"
        if wrong := _wrong_type(tool, wanted, arguments):
            return f"error: {wrong}"
        try:
            return str(tool.call(**arguments))
        except ToolError as error:
            return f"error: {error}"


def _whole_characters(text: str) -> str:
    """``text`` with ? for half a character, which JSON can spell in a call (as in "\\ud800") and no tokenizer reads."""
    return text.encode("utf-8", "replace").decode()


def _wrong_type(tool: Tool, wanted: Mapping[str, Any], arguments: Mapping[str, Any]) -> str | None:
    """Which text argument is no text; others a tool checks itself."""
    empty = {part.name for part in _named(tool.call) if part.default is None}  # may be given as null
    for name, value in arguments.items():
        if wanted.get(name) == _TEXT and not isinstance(value, str) and not (value is None and name in empty):
            return f"{name} must be text"
    return None


def answer_reward(text: str, row: DataRow) -> float | None:
    """1 or 0: the last box of a text equals the row's answer; None where that cannot be said. A box that is too long for an
    answer is wrong, as in validation."""
    if row.answer is None:
        return None
    answer, unclosed = last_box(text)
    if answer is None or unclosed or len(answer) > MAX_CHARS:
        return 0.0
    try:
        return float(same(answer.strip(), row.answer, undecided))
    except (NeedsMathematics, RecursionError):
        return None
