"""Row filters: conditions on a row as data, parsed by a small grammar and never evaluated as code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from lit_opd.errors import InputError

MISSING = object()  # no such column in this row
_SHOWN = 80  # characters of a value in a message
_FILTER = re.compile(
    r"""\s*(?P<column>"(?:[^"\\]|\\.)*"|[^\s<>=!"]+)
        (?:\s*(?P<sign>>=|<=|==|!=|>|<)\s*|\s+(?P<word>not\s+in|in)\s+)
        (?P<literal>[^\s<>=!].*?)\s*""",
    re.VERBOSE | re.DOTALL,
)
_ITEM = re.compile(r'\s*"(?:[^"\\]|\\.)*"\s*|[^",\[\]]+', re.DOTALL)  # of a list with bare words
_ORDERINGS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": lambda left, right: left >= right,
    "<=": lambda left, right: left <= right,
    ">": lambda left, right: left > right,
    "<": lambda left, right: left < right,
}


@dataclass(frozen=True)
class RowFilter:
    """One condition on a row, data and not code: ``column op literal``.

    op is >=, <=, >, <, ==, !=, in, not in. The column may be quoted ("Problem Type") and have dots (extra_info.level). The
    literal is JSON (6, 1.5, "x", true, null, [1, 2]), bare words without quotes (algebra), or a list of both ([algebra,
    "Counting, Probability"]). A null in the data equals only null, and has no order: put ``column != null`` before an
    ordering. Several filters are and-ed in order, the first that fails decides.

    >>> RowFilter.parse("difficulty >= 6").keeps({"difficulty": 7}, "here", ["difficulty"])
    True
    """

    text: str
    column: str
    op: str
    literal: Any

    @classmethod
    def parse(cls, text: str) -> RowFilter:
        """Raises InputError when ``text`` is not of the grammar."""
        match = _FILTER.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise _bad_filter(text, "it must read `column op literal` with op >=, <=, >, <, ==, !=, in, not in")
        column = match["column"]
        op = match["sign"] or " ".join(match["word"].split())
        literal = _filter_literal(match["literal"], text)
        if ("in" in op) != isinstance(literal, list):
            raise _bad_filter(text, "`in` and `not in` take a list such as [a, b], the others a single value")
        if op in _ORDERINGS and not (_is_number(literal) or isinstance(literal, str)):
            raise _bad_filter(text, f"{op} needs a number or text, got {shown(literal)}")
        return cls(text.strip(), _json_or(column, column) if column[0] == '"' else column, op, literal)

    def keeps(self, values: dict[str, Any], where: str, columns: Sequence[str]) -> bool:
        """Whether a row stays. ``columns``: all that the data has, for the message when ours is not among them."""
        value = value_at(values, self.column)
        if value is MISSING:
            if self.column not in columns:
                raise _bad_filter(
                    self.text, f"no column {self.column!r} in {where}; columns found: {', '.join(columns)}"
                )
            value = None
        if self.op in _ORDERINGS:
            if not _same_kind(value, self.literal) or value is None:
                raise self._mismatch(value, self.literal, where)
            return _ORDERINGS[self.op](value, self.literal)
        options = self.literal if isinstance(self.literal, list) else [self.literal]
        for option in options:
            if None not in (value, option) and not _same_kind(value, option):
                raise self._mismatch(value, option, where)
        return (value in options) == (self.op in ("==", "in"))

    def _mismatch(self, value: Any, literal: Any, where: str) -> InputError:
        remedy = f"put `{self.column} != null` before it" if value is None else "compare values of one type"
        return _bad_filter(
            self.text, f"{where} has {shown(value)}, which does not compare with {shown(literal)}; {remedy}"
        )


def value_at(values: Any, name: str) -> Any:
    """The value of a column, or of a part of one.

    Args:
        values: a row; objects inside may be JSON text.
        name: a column, or with dots a key of the object in it, or a number of the list in it.
    Returns:
        ``MISSING`` where there is none.

    >>> value_at({"reward_model": {"ground_truth": "4"}}, "reward_model.ground_truth")
    '4'
    """
    if isinstance(values, str) and values.lstrip()[:1] in ("{", "["):
        values = _json_or(values, None)
    if isinstance(values, list):
        first, _, rest = name.partition(".")
        values, name = {str(at): value for at, value in enumerate(values)}, f"{first}.{rest}" if rest else first
    if not isinstance(values, dict):
        return MISSING
    if name in values:
        return values[name]
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):  # a key may have dots of its own
        if (key := ".".join(parts[:count])) in values:
            return value_at(values[key], ".".join(parts[count:]))
    return MISSING


def _bad_filter(text: object, reason: str) -> InputError:
    return InputError(f"`PromptDataModule.filter` {shown(text)}: {reason}")


def _filter_literal(literal: str, text: str) -> Any:
    """JSON, or bare words; ``text`` is the filter, for messages."""
    listed = literal[0] == "[" and literal[-1] == "]"
    if listed and _json_or(literal, None) is None:
        parts = _ITEM.findall(literal[1:-1])
        if ",".join(parts) != literal[1:-1] or not all(part.strip() for part in parts):
            raise _bad_filter(
                text, "a list needs a value between two commas, and text with a comma or bracket in quotes"
            )
        return [_value(part.strip(), text) for part in parts]
    return _value(literal, text)


def _value(literal: str, text: str) -> Any:
    value = _json_or(literal, literal)
    if value == literal and ('"' in literal or literal[0] == "'"):
        raise _bad_filter(
            text, f'{literal} is neither bare words nor JSON; put text in double quotes, \\" for one inside'
        )
    return value


def _json_or(text: str, default: Any) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return default


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)


def _same_kind(left: Any, right: Any) -> bool:
    return (_is_number(left) and _is_number(right)) or type(left) is type(right)


def shown(value: object) -> str:
    """Type and shortened repr of a value, for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}"
