"""Exact values of answers that are written with numbers alone: no floating point, and a bound on every size."""

from __future__ import annotations

import math
import re
from fractions import Fraction

MAX_CHARS = 400
MAX_BITS = 20_000  # of a numerator or denominator; larger values are left to the worker, which has limits
MAX_EXPONENT = 5_000
MAX_FACTORIAL = 1_000
MAX_DEPTH = 40
ROUNDED_DIGITS = 6  # a decimal of fewer digits is no rounded value of anything

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?)"
    r"|(?P<sign>\\(?:frac|binom|cdot|times|div|sqrt)(?![a-zA-Z])|[-+*/^!(){}\[\]]))"
)
_DECIMAL = re.compile(r"[+-]?[0-9]*\.[0-9]+")


class NotArithmetic(Exception):
    """The text holds something other than numbers, or a size beyond the bounds."""


def value(text: str) -> Fraction | None:
    """The exact value of numbers joined by + - * / ^ ! and fractions; None for anything else.

    >>> value(r"\\\\frac{1}{2^{80}}") == Fraction(1, 2**80), value("042"), value("2x"), value("9^{9^9}")
    (True, Fraction(42, 1), None, None)
    """
    if len(text) > MAX_CHARS:
        return None
    try:
        return _Reader(_tokens(text)).whole()
    except (NotArithmetic, ZeroDivisionError, ValueError):
        return None


def rounds_to(decimal: str, exact: Fraction) -> bool:
    """True when a decimal of at least six digits is an endless decimal's rounded value.

    A value that ends is not rounded: 41.9999999 is not 42.

    >>> rounds_to("0.333333", Fraction(1, 3)), rounds_to("0.33", Fraction(1, 3)), rounds_to("0.499999", Fraction(1, 2))
    (True, False, False)
    """
    return not ends(exact) and is_rounding(decimal, exact)


def is_rounding(decimal: str, near: Fraction) -> bool:
    """The same of an irrational number, given to more digits than the decimal has."""
    if not _DECIMAL.fullmatch(decimal):
        return False
    digits = decimal.split(".")[1]
    if len(decimal.lstrip("+-").replace(".", "").lstrip("0")) < ROUNDED_DIGITS:
        return False
    return abs(Fraction(decimal) - near) * 2 * 10 ** len(digits) <= 1


def ends(exact: Fraction) -> bool:
    """True when the value has a finite decimal."""
    rest = exact.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _tokens(text: str) -> list[str]:
    found, place = [], 0
    text = text.strip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise NotArithmetic(text[place:])
        found.append(match[0].strip())
        place = match.end()
    return found


def _bounded(number: Fraction) -> Fraction:
    if max(number.numerator.bit_length(), number.denominator.bit_length()) > MAX_BITS:
        raise NotArithmetic("too large")
    return number


class _Reader:
    """Recursive descent over tokens; each method reads one grammar rule."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.place, self.depth = tokens, 0, 0

    def whole(self) -> Fraction:
        found = self.sum()
        if self.place != len(self.tokens):
            raise NotArithmetic(self.next())
        return found

    def next(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        """The next token, read; one of ``wanted`` where some are named, else ``NotArithmetic``."""
        token = self.next()
        if token == "" or (wanted and token not in wanted):
            raise NotArithmetic(token)
        self.place += 1
        return token

    def sum(self) -> Fraction:
        """product, then any number of + product or - product."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotArithmetic("too deep")
        total = self.product()
        while self.next() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            total = _bounded(total + sign * self.product())
        self.depth -= 1
        return total

    def product(self) -> Fraction:
        """signed, then any number of * signed, / signed, or a factor in parentheses where no division came before."""
        total, divided = self.signed(), False
        while True:
            token = self.next()
            if token in ("*", "\\cdot", "\\times"):
                self.take()
                total = _bounded(total * self.signed())
            elif token in ("/", "\\div"):
                self.take()
                total, divided = _bounded(total / self.signed()), True
            elif token == "(" and not divided:  # 2(3); what 1/2(3) means is anyone's guess
                total = _bounded(total * self.power())
            else:
                return total

    def signed(self) -> Fraction:
        sign = 1
        while self.next() in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        return sign * self.power()

    def power(self) -> Fraction:
        """atom, its factorials, and ^ signed: a whole exponent of bounded size."""
        base = self.atom()
        while self.next() == "!":
            self.take()
            base = Fraction(_factorial(base))
        if self.next() != "^":
            return base
        self.take()
        exponent = self.signed()
        if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
            raise NotArithmetic("exponent")
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(exponent) > MAX_BITS:
            raise NotArithmetic("too large")
        return base ** int(exponent)

    def atom(self) -> Fraction:
        """A number, a sum in brackets, a fraction, a binomial or a root."""
        token = self.take()
        closing = {"(": ")", "{": "}", "[": "]"}.get(token)
        if closing:
            inner = self.sum()
            self.take(closing)
            return inner
        if token == "\\frac":
            return _bounded(self.argument() / self.argument())
        if token == "\\binom":
            return _binomial(self.argument(), self.argument())
        if token == "\\sqrt":
            return _root(self.argument())
        if token[0].isdigit() or token[0] == ".":
            return _bounded(Fraction(token))
        raise NotArithmetic(token)

    def argument(self) -> Fraction:
        if self.next() != "{":
            raise NotArithmetic("no braces")
        return self.atom()


def _factorial(number: Fraction) -> int:
    if number.denominator != 1 or not 0 <= number <= MAX_FACTORIAL:
        raise NotArithmetic("factorial")
    return math.factorial(int(number))


def _binomial(above: Fraction, below: Fraction) -> Fraction:
    if (
        above.denominator != 1
        or below.denominator != 1
        or not 0 <= below <= MAX_FACTORIAL
        or not 0 <= above <= MAX_FACTORIAL
    ):
        raise NotArithmetic("binomial")
    return Fraction(math.comb(int(above), int(below)))


def _root(number: Fraction) -> Fraction:
    if number < 0:
        raise NotArithmetic("root")
    root = Fraction(math.isqrt(number.numerator), math.isqrt(number.denominator))
    if root * root != number:
        raise NotArithmetic("no exact root")
    return root
