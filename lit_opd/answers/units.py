r"""A number and what stands beside it: unit, percent sign, currency, a magnitude such as "million".

A word is a unit only where the whole is a number and words that name a unit or plain things follow. Symbols (x, i, e), numerals,
"a.m.", "or more", "remainder 3" are part of the answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from lit_opd.answers.tables import (
    AFTER_INCH,
    ANY_MEASURE,
    BEFORE_INCH,
    CENT_SIGN,
    CURRENCIES,
    MAGNITUDES,
    NO_MEASURE,
    NOT_IN_UNITS,
    PER_WORDS,
    PERCENT_WORDS,
    POWERS_BEFORE,
    POWERS_BEHIND,
    SMALL_WORDS,
    SPEEDS,
    UNIT_NAMES,
)

_MARKED = r"\\text\{[a-zA-Z]+\}"
_POWER = r"(?:\^(?:\{?-?[0-9]\}?))?"
_RAISED_WORD = rf"\^\{{?\s*{_MARKED}(?:\s*\}})?"
_PIECES = rf"(?:\s|\\cdot|{_RAISED_WORD}|{_MARKED}{_POWER}|/\s*[smhgL](?![a-zA-Z]){_POWER}|/)"
_FRACTION = rf"\\frac\{{(?:\s|\\cdot|{_MARKED}{_POWER})+\}}\{{(?:\s|\\cdot|{_MARKED}{_POWER})+\}}"
_SUFFIX = re.compile(  # each space can be read in one way only, else the time doubles with every piece
    rf"(?P<percent>\s*%)?(?:\^\\circ(?:\s*[CF])?(?![a-zA-Z])|{_PIECES}|{_FRACTION})*(?P<late>\s*%)?\s*$"
)
_TOKEN = re.compile(
    rf"\\text\{{(?P<word>[a-zA-Z]+)\}}(?P<power>{_POWER})|(?P<circle>\^\\circ\s*(?P<scale>[CF])?)|/\s*(?P<short>[smhgL])(?P<spow>{_POWER})"
    r"|(?P<over>/)|(?P<frac>\\frac\{)|(?P<under>\}\{)"
)
_NUMBER_LIKE = re.compile(
    r"(?=.*(?:[0-9]|\\pi))(?:[0-9\s.,+\-/*^(){}\[\]!]|\\(?:frac|sqrt|pi|cdot|times|div|binom|pm|mp)(?![a-zA-Z]))+"
)
_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_DEGREES = ({"degree", "celsius"}, {"degree", "fahrenheit"})  # the scale may go without saying
_PER_CENT = re.compile(r"\\text\{[pP]er\}\s*\\text\{cent\}")
# "in" before a word, as in "cm in length", but not in "square in of paper" or "in long"
_PREPOSITION = re.compile(
    rf"(?P<measure>(?:/|\\text\{{(?:{'|'.join(BEFORE_INCH)})\}})\s*)?\\text\{{in\}}"
    rf"(?=\s*\\text\{{(?!(?:{'|'.join(AFTER_INCH)})\}}))"
)
_CURRENCY = re.compile(
    r"^(?P<sign>-?\s*)(?P<mark>\\\$|[\u20ac\u00a3\u00a5\u20b9]|(?:\\text\{(?:Rs|USD|EUR|GBP|INR)\}\.?))\s*(?=[0-9.\\(-])"
)


@dataclass(frozen=True)
class Quantity:
    """A value and its unit.

    Args:
        text: the value, LaTeX.
        percent: a percent sign stood after it.
        unit: powers of measures, such as {("meter", 1), ("second", -2)}; empty where there is none.
        counted: "units" stood where a measure stands, as in "units per second", and may be any.
        times: what a magnitude multiplies the value by.
    """

    text: str
    percent: bool = False
    unit: frozenset[tuple[str, int]] = frozenset()
    counted: bool = False
    times: Fraction = Fraction(1)

    def agrees_with(self, other: Quantity) -> bool:
        """False where both name a measure and not the same; units are not converted."""
        if self.percent and other.unit or self.unit and other.percent:
            return False
        if not self.unit or not other.unit or self.unit == other.unit:
            return True
        if self.counted or other.counted:
            return self._below() == other._below()
        return {name for name, _ in self.unit | other.unit} in _DEGREES

    def _below(self) -> set[tuple[str, int]]:
        """What stands after "per"."""
        return {(name, power) for name, power in self.unit if power < 0}


def quantity(text: str) -> Quantity:
    r"""What a cleaned answer without commas says.

    >>> sorted(quantity(r"5\text{m}/\text{s}^2").unit), quantity(r"5\text{or}\text{more}").text
    ([('meter', 1), ('second', -2)], '5\\text{or}\\text{more}')
    """
    names: dict[str, int] = {}
    amount = _without_currency(text, names)
    start = _suffix_start(amount)
    head, tail = amount[:start].rstrip(), amount[start:]
    suffix = _Suffix(names)
    suffix.read(tail)
    if not suffix.unit or not _fits(head, tail, suffix.plain):
        return Quantity(text)
    unit = frozenset((name, power) for name, power in names.items() if power)
    return Quantity(head, suffix.percent, unit, suffix.counted, suffix.times)


def _without_currency(text: str, names: dict[str, int]) -> str:
    """The text without a sign of money before or after it, which is written into ``names``."""
    text = text.strip()
    money = _CURRENCY.match(text)
    if money:
        mark = re.sub(r"\\text\{|\}|\.", "", money["mark"])
        names[CURRENCIES.get(mark) or UNIT_NAMES[mark]] = 1
        return money["sign"] + text[money.end() :]
    for sign, name in (*CURRENCIES.items(), (CENT_SIGN, "cent")):
        if text.endswith(sign):
            names[name] = 1
            return text[: -len(sign)].rstrip()
    return text


def _suffix_start(text: str) -> int:
    match = _SUFFIX.search(text)
    return match.start() if match else len(text)


def _fits(head: str, tail: str, plain: bool) -> bool:
    """The head is a number; after symbols only a measure counts as a unit, and only where it is marked as text."""
    if not head:
        return False
    if not tail.strip():
        return True
    if "\\text{" in head or _ANGLE.search(head):  # \sin 30^\circ is no number of degrees
        return False
    return _NUMBER_LIKE.fullmatch(head.strip()) is not None or (not plain and re.search(r"[=<>]", head) is None)


class _Suffix:
    """What the pieces of a suffix say, one after the other; ``unit`` is False once a word is no unit."""

    def __init__(self, names: dict[str, int]) -> None:
        self.names = names
        self.plain, self.counted, self.percent, self.times, self.unit = False, False, False, Fraction(1), True
        self._sign, self._power, self._last, self._fraction, self._described = 1, 1, "", False, False

    def read(self, tail: str) -> None:
        """Read a whole suffix into the fields."""
        tail = _PER_CENT.sub("%", tail)
        tail = _PREPOSITION.sub(lambda found: found[0] if found["measure"] else r"\text{of}", tail)
        self.percent = "%" in tail
        for number, found in enumerate(_TOKEN.finditer(tail)):
            if found["frac"]:
                self._fraction = True
            elif found["under"] or found["over"]:
                self._sign = -1
            elif found["circle"]:
                self._count({"C": "celsius", "F": "fahrenheit"}.get(found["scale"] or "", "degree"), 1)
            elif found["short"]:
                self._sign = -1
                self._count(UNIT_NAMES[found["short"]], _power(found["spow"]))
            else:
                self._word(found["word"], _power(found["power"]), first=number == 0)

    def _word(self, word: str, power: int, *, first: bool) -> None:
        lower = word.lower()
        unit = UNIT_NAMES.get(word) or UNIT_NAMES.get(lower if len(word) > 1 else "")
        if lower in MAGNITUDES and first:
            self.times = MAGNITUDES[lower]
        elif lower in PERCENT_WORDS:
            self.percent = True
        elif lower in PER_WORDS:
            self._sign, self.plain = -1, self.plain or lower != "per"
        elif lower in POWERS_BEFORE:
            self._power = POWERS_BEFORE[lower]
        elif lower in POWERS_BEHIND:
            self.unit = self.unit and bool(self._last)  # "3 squared" is 9
            self.names[self._last] = self.names.get(self._last, 0) * POWERS_BEHIND[lower]
        elif word in SPEEDS:
            self.names.update(zip(SPEEDS[word], (1, -1), strict=True))
        elif unit is not None:
            if self._sign < 0 or not self._described:
                self._count(unit, power)
        elif lower in NO_MEASURE or _is_plain(word):
            self.counted = self.counted or (lower in ANY_MEASURE and self._sign > 0 and not self.names)
            self.plain, self._power, self._described = True, 1, bool(self.names)  # "days of the week" are days
        else:
            self.unit = False

    def _count(self, unit: str, power: int) -> None:
        if unit in ("celsius", "fahrenheit"):
            self.names.pop("degree", None)
        self.names[unit] = self.names.get(unit, 0) + self._sign * self._power * power
        self._last, self._power = unit, 1
        if not self._fraction:
            self._sign = 1


def _is_plain(word: str) -> bool:
    lower = word.lower()
    if lower in NOT_IN_UNITS:
        return False
    return lower in SMALL_WORDS or (len(word) >= 3 and (word.islower() or word.istitle()))


def _power(text: str | None) -> int:
    return int(re.sub(r"[\^{}]", "", text)) if text else 1
