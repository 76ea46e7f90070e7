r"""The shape of an answer: a list, a tuple or interval, a set, a region of the line, a matrix, an equation, a time, a ratio."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from lit_opd.answers.arithmetic import value
from lit_opd.answers.cleaning import compact, enclosed
from lit_opd.answers.tables import BASES

INFINITY = "\\infty"
MAX_SIGNS = 4  # of \pm in one answer; 2 to this power values

_SEPARATOR = re.compile(r",|;|\\text\{(?:and|or|And|Or|AND|OR)\}|\\\\")
_RELATION = re.compile(r"\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z])|<|>|=|\\in(?![a-zA-Z])|\\equiv(?![a-zA-Z])")
_UNION = re.compile(r"\\cup(?![a-zA-Z])|\bU\b")
_WITHOUT = re.compile(r"\\setminus(?![a-zA-Z])|-(?=\s*\\\{)")
_MATRIX = re.compile(r"\\begin\{([pbBv]?(?:small)?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}")
_OUTSIDE_REVERSED = re.compile(r"\](?P<inner>[^\[\]]*)\[")
_NAME = re.compile(
    r"\\?[a-zA-Z]+(?:_(?:\w|\{[^{}]*\}))?'*(?:\s*\([^()]*\))?|(?:\\angle|\\triangle)\s*[A-Z]+|\\text\{.*\}|\([a-zA-Z](?:\s*,\s*[a-zA-Z])*\)"
    r"|[A-Z]+(?:_(?:\w|\{[^{}]*\}))?|\|[A-Za-z]+\||\\(?:overline|vec|hat)\{\w+\}|[A-Za-z]+_\{?\\text\{\w+\}\}?"
)
_VARIABLE = re.compile(r"\\?[a-zA-Z]+(?:_(?:\w|\{[^{}]*\}))?(?:\([a-zA-Z]\))?")
_CLOCK = re.compile(r"(?P<hour>[0-9]{1,2})(?:\s*:\s*(?P<minute>[0-9]{2}))?\s*\\text\{(?P<half>am|pm)\}")
_CLOCK_PLAIN = re.compile(r"(?P<hour>[0-9]{1,2})\s*:\s*(?P<minute>[0-9]{2})")
_MODULUS = re.compile(
    r"(?P<residue>.*?)\s*(?:\(\s*)?(?:\\p?mod(?![a-zA-Z])|\\bmod(?![a-zA-Z])|\\text\{mod(?:ulo)?\})\s*(?P<modulus>[^()]*?)\s*\)?"
)
_BASE = re.compile(
    r"\(?(?P<sign>-?)(?P<digits>[0-9][0-9A-F]*|[A-F]+[0-9][0-9A-F]*|[A-F]+)\)?\s*_\s*\{?\s*\(?\s*(?:\\text\{base\}\s*)?"
    r"(?P<base>[0-9]{1,2}|\\text\{[a-zA-Z]+\})\s*\)?\s*\}?|(?P<sign2>-?)(?P<digits2>[0-9][0-9A-F]*)\s*\(?\s*(?:\\text\{in\}\s*)?"
    r"\\text\{base\}\s*(?P<base2>[0-9]{1,2}|\\text\{[a-zA-Z]+\})\s*\)?"
)
_CHOICE = re.compile(r"\\choice\{(?P<letter>[A-J])\}\s*(?P<content>.*)")


@dataclass(frozen=True)
class Expression:
    """Anything without a shape of its own."""

    text: str


@dataclass(frozen=True)
class Listing:
    """Several answers.

    Args:
        items: cleaned texts.
        opening: "(", "[", "{", or "" for a list without brackets.
        closing: likewise.
    """

    items: tuple[str, ...]
    opening: str = ""
    closing: str = ""


@dataclass(frozen=True)
class Interval:
    """Ends as texts; an end at infinity is open."""

    low: str
    high: str
    closed_low: bool = False
    closed_high: bool = False


@dataclass(frozen=True)
class Region:
    """A union of intervals, and of single points as closed intervals of equal ends; ``name`` of the variable, if given."""

    intervals: tuple[Interval, ...]
    name: str = ""


@dataclass(frozen=True)
class Grid:
    """A matrix."""

    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Equation:
    """A chain of equal signs: its first and last side. ``named`` where the first is a name for the last."""

    left: str
    value: str
    named: bool


@dataclass(frozen=True)
class Clock:
    """A time of day in minutes after midnight."""

    minutes: int


@dataclass(frozen=True)
class Ratio:
    """a : b : c."""

    parts: tuple[str, ...]


@dataclass(frozen=True)
class Residue:
    """A number modulo another."""

    residue: str
    modulus: str


@dataclass(frozen=True)
class Based:
    """Digits in a base that is named."""

    digits: str
    base: int

    @property
    def value(self) -> int:
        """The number."""
        return int(self.digits, self.base)


@dataclass(frozen=True)
class Choice:
    """A letter of a multiple choice with its content."""

    letter: str
    content: str


Shape = Expression | Listing | Region | Grid | Equation | Clock | Ratio | Residue | Based | Choice


def read(text: str) -> Shape:
    """The shape of a cleaned answer."""
    text = _bare(text)
    for reader in _READERS:
        shape = reader(text)
        if shape is not None:
            return shape
    return Expression(text)


def region(shape: Shape) -> Region | None:
    """The part of the line that a shape can stand for; None where it is none."""
    if isinstance(shape, Region):
        return shape
    if isinstance(shape, Listing):
        if shape.opening in ("(", "[") and len(shape.items) == 2:
            return Region((_interval(shape.items[0], shape.items[1], shape.opening == "[", shape.closing == "]"),))
        if shape.opening in ("{", ""):
            return Region(tuple(_point(item) for item in shape.items))
    if isinstance(shape, Expression):
        if shape.text == "\\mathbb{R}":
            return Region((Interval("-" + INFINITY, INFINITY),))
        if shape.text == "\\emptyset":
            return Region(())
    return None


def split(text: str, pattern: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """Parts and the separators between them, outside of all brackets."""
    parts, marks, start, depth, place = [], [], 0, 0, 0
    while place < len(text):
        found = pattern.match(text, place) if depth == 0 else None
        if found and found.end() > place:
            parts.append(text[start:place].strip())
            marks.append(found[0].strip())
            start = place = found.end()
            continue
        if text[place] == "\\":
            depth += {"{": 1, "}": -1}.get(text[place + 1 : place + 2], 0)
            place += 2
            continue
        depth += (text[place] in "([{") - (text[place] in ")]}")
        place += 1
    return [*parts, text[start:].strip()], marks


def _bare(text: str) -> str:
    """Without braces, or round brackets with one thing in them, around the whole."""
    text = text.strip()
    while text:
        if text[0] == "{" and enclosed(text, 0) == len(text) - 1:
            text = text[1:-1].strip()
        elif (
            text[0] == "("
            and enclosed(text, 0, "(", ")") == len(text) - 1
            and len(split(text[1:-1], _SEPARATOR)[0]) == 1
        ):
            text = text[1:-1].strip()
        else:
            break
    return text


# -- readers, in the order in which they are asked ---------------------------------------------------------------------


def _grid(text: str) -> Shape | None:
    found = _MATRIX.fullmatch(text)
    if found is None or found[1].startswith("v"):
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", found[2].replace("\\hline", "")) if row.strip()]
    cells = tuple(tuple(cell.strip() for cell in row.split("&")) for row in rows)
    return read(cells[0][0]) if [len(row) for row in cells] == [1] else Grid(cells)


def _choice(text: str) -> Choice | None:
    found = _CHOICE.fullmatch(text)
    return Choice(found["letter"], found["content"]) if found else None


def _listing(text: str) -> Shape | None:
    parts, marks = split(text, _SEPARATOR)
    if len(parts) == 1:
        return None
    kept = [(part, mark) for part, mark in zip(parts, ["", *marks], strict=True) if part]
    texts = [part for part, _ in kept]
    joined = [_inequality(part) for part in texts]
    if len(texts) > 1 and all(joined):
        names = {part.name for part in joined if part}
        if len(names) == 1:
            return _combined([part for part in joined if part], [mark for _, mark in kept[1:]])
    return Listing(tuple(texts)) if len(texts) > 1 else read(texts[0]) if texts else None


def _combined(parts: list[Region], marks: list[str]) -> Region | None:
    """Inequalities of one variable: "or" joins, "and" cuts; a comma cuts where that leaves something."""
    total = parts[0]
    for mark, part in zip(marks, parts[1:], strict=True):
        cut = None if "or" in mark.lower() else _cut(total, part)
        if cut is None and "and" in mark.lower():
            return None
        total = cut or Region(total.intervals + part.intervals, total.name)
    return total


def _cut(one: Region, two: Region) -> Region | None:
    """The common part of a lower and an upper bound; None where there is none, or it cannot be seen."""
    if len(one.intervals) != 1 or len(two.intervals) != 1:
        return None
    first, second = one.intervals[0], two.intervals[0]
    if first.low == "-" + INFINITY:
        first, second = second, first
    if first.high != INFINITY or second.low != "-" + INFINITY:
        return None
    low, high = value(first.low), value(second.high)
    if low is not None and high is not None and low >= high:
        return None
    return Region((Interval(first.low, second.high, first.closed_low, second.closed_high),), one.name)


def _bracketed(text: str) -> Shape | None:
    reverse = _OUTSIDE_REVERSED.fullmatch(text)
    if reverse and len(ends := split(reverse["inner"], _SEPARATOR)[0]) == 2:
        return Listing(tuple(ends), "(", ")")
    if text.startswith("\\{") and text.endswith("\\}") and _closes(text[2:-2]):
        inner = text[2:-2].strip()
        condition = re.fullmatch(r"\(?\s*(?P<name>[a-zA-Z])\s*(?:\\in\s*\\mathbb\{R\})?\s*[|:]\s*(?P<rest>.*)", inner)
        if condition:
            return read(condition["rest"])
        return Listing(tuple(split(inner, _SEPARATOR)[0]), "{", "}")
    if len(text) > 1 and text[0] in "([" and text[-1] in ")]" and _closes(text[1:-1]):
        items = split(text[1:-1], _SEPARATOR)[0]
        opening, closing = text[0], text[-1]
        if len(items) == 2:  # no interval is closed at infinity
            opening, closing = "(" if INFINITY in items[0] else opening, ")" if INFINITY in items[1] else closing
        return Listing(tuple(items), opening, closing) if len(items) > 1 else None
    return None


def _closes(inner: str) -> bool:
    """No bracket inside closes one outside."""
    depth, place = 0, 0
    while place < len(inner):
        step = 2 if inner[place] == "\\" else 1
        sign = inner[place : place + step][-1:]
        depth += (sign in "([{") - (sign in ")]}")
        if depth < 0:
            return False
        place += step
    return depth == 0


def _union(text: str) -> Region | None:
    parts, _ = split(text, _UNION)
    if len(parts) == 1:
        return None
    shapes = [region(read(part)) for part in parts]
    if any(shape is None for shape in shapes):
        return None
    return Region(tuple(interval for shape in shapes if shape for interval in shape.intervals))


def _difference(text: str) -> Region | None:
    parts, _ = split(text, _WITHOUT)
    if len(parts) != 2 or parts[0] != "\\mathbb{R}":
        return None
    hole = read(parts[1])
    if not isinstance(hole, Listing) or hole.opening != "{":
        return None
    return _line_without(list(hole.items))


def _line_without(points: list[str], name: str = "") -> Region | None:
    exact = [value(point) for point in points]
    if len(points) > 1:
        if any(point is None for point in exact):
            return None
        points = [
            point for _, point in sorted(zip(exact, points, strict=True), key=lambda pair: pair[0] or Fraction(0))
        ]
    ends = ["-" + INFINITY, *points, INFINITY]
    return Region(tuple(Interval(low, high) for low, high in zip(ends, ends[1:], strict=False)), name)


def _inequality(text: str) -> Region | None:
    r"""``1 < x \le 2``, ``x > 2``, ``2 > x``, ``x \ne 2``, ``x \in (1, 2)``."""
    sides, signs = split(text, _RELATION)
    signs = [re.sub(r"\s", "", sign) for sign in signs]
    if len(sides) == 2 and signs == ["\\in"] and _VARIABLE.fullmatch(sides[0]):
        inner = region(read(sides[1]))
        return Region(inner.intervals, sides[0]) if inner else None
    if len(sides) == 2 and signs == ["\\ne"] and _VARIABLE.fullmatch(sides[0]):
        return _line_without([sides[1]], sides[0])
    if not signs or not set(signs) <= {"<", "\\le"} and not set(signs) <= {">", "\\ge"}:
        return None
    if signs[0] in (">", "\\ge"):
        sides, signs = sides[::-1], signs[::-1]
    closed = [sign in ("\\le", "\\ge") for sign in signs]
    if len(sides) == 3 and _VARIABLE.fullmatch(sides[1]) and not _has_variable(sides[0], sides[1]):
        return Region((_interval(sides[0], sides[2], closed[0], closed[1]),), sides[1])
    if len(sides) == 2 and _VARIABLE.fullmatch(sides[0]) and not _VARIABLE.fullmatch(sides[1]):
        return Region((_interval("-" + INFINITY, sides[1], False, closed[0]),), sides[0])
    if len(sides) == 2 and _VARIABLE.fullmatch(sides[1]) and not _VARIABLE.fullmatch(sides[0]):
        return Region((_interval(sides[0], INFINITY, closed[0], False),), sides[1])
    return None


def _has_variable(side: str, name: str) -> bool:
    return re.search(rf"(?<![\\a-zA-Z]){re.escape(name)}(?![a-zA-Z])", side) is not None


def _interval(low: str, high: str, closed_low: bool, closed_high: bool) -> Interval:
    low, high = (re.sub(r"^\+\s*", "", compact(end)) if INFINITY in end else end for end in (low, high))
    return Interval(low, high, closed_low and low != "-" + INFINITY, closed_high and high != INFINITY)


def _point(item: str) -> Interval:
    return Interval(item, item, True, True)


def _equation(text: str) -> Equation | None:
    sides, signs = split(text, re.compile(r"="))
    if len(sides) < 2 or any(not side for side in sides) or _RELATION.search(" ".join(sides).replace("\\in ", "")):
        return None
    left, right = sides[0], sides[-1]
    if _NAME.fullmatch(right) and value(left) is not None:  # 5 = x
        left, right = right, left
    return Equation(left, right, _NAME.fullmatch(left) is not None)


def _residue(text: str) -> Residue | None:
    sides, signs = split(text, re.compile(r"\\equiv(?![a-zA-Z])"))
    found = _MODULUS.fullmatch(sides[-1])
    if found is None or not found["residue"].strip() or "=" in text:
        return None
    return Residue(found["residue"], _bare(found["modulus"]))


def _clock(text: str) -> Clock | None:
    found = _CLOCK.fullmatch(text)
    if found is None or not 1 <= int(found["hour"]) <= 12:
        return None
    hour = int(found["hour"]) % 12 + (12 if found["half"] == "pm" else 0)
    return Clock(60 * hour + int(found["minute"] or 0))


def _ratio(text: str) -> Ratio | None:
    parts, _ = split(text, re.compile(r":"))
    return Ratio(tuple(parts)) if len(parts) > 1 and all(parts) else None


def based(text: str) -> Based | None:
    """Digits with their base after them."""
    found = _BASE.fullmatch(text)
    if found is None:
        return None
    name = re.sub(r"\\text\{|\}", "", found["base"] or found["base2"]).lower()
    base = BASES.get(name) or (int(name) if name.isdigit() else 0)
    digits = (found["sign"] or found["sign2"] or "") + (found["digits"] or found["digits2"])
    if not 2 <= base <= 16 or not re.search("[0-9]", digits) and base <= 10:
        return None
    try:
        int(digits, base)
    except ValueError:
        return None
    return Based(digits.upper(), base)


def _signs(text: str) -> Listing | None:
    r"""``\pm`` as the values it stands for; ``\mp`` goes with the ``\pm`` beside it."""
    count = len(re.findall(r"\\pm(?![a-zA-Z])", text))
    if not 1 <= count <= MAX_SIGNS:
        return None
    tied = "\\mp" in text
    items = []
    for choice in range(2 if tied else 2**count):
        bits = iter([choice & 1] * count if tied else [choice >> place & 1 for place in range(count)])
        item = re.sub(r"\\pm(?![a-zA-Z])", lambda _: "-" if next(bits) else "+", text)  # noqa: B023
        items.append(re.sub(r"\\mp(?![a-zA-Z])", "+" if choice & 1 else "-", item))
    return Listing(tuple(items))


_READERS = (
    _choice, _grid, _bracketed, _listing, based, _clock, _residue, _union, _difference, _inequality, _equation, _signs, _ratio,
)  # fmt: skip

__all__ = [
    "Based", "Choice", "Clock", "Equation", "Expression", "Grid", "Interval", "Listing", "Ratio", "Region", "Residue", "Shape",
    "based", "read", "region", "split",
]  # fmt: skip


def clock_like(text: str) -> bool:
    """Written as a time of day without a.m. or p.m."""
    return _CLOCK_PLAIN.fullmatch(text.strip()) is not None
