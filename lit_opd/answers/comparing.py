r"""Do two answers say the same? By shape, then part by part; what is left to mathematics is asked of the caller.

The process that reads responses and the worker that has math-verify run this same function and differ in ``ask`` alone, so
what is decided early cannot disagree with what the worker would have said.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from lit_opd.answers.arithmetic import rounds_to, value
from lit_opd.answers.cleaning import canonical, cleaned, compact
from lit_opd.answers.reading import (
    INFINITY,
    Based,
    Choice,
    Clock,
    Equation,
    Expression,
    Grid,
    Interval,
    Listing,
    Ratio,
    Region,
    Residue,
    Shape,
    clock_like,
    read,
    region,
)
from lit_opd.answers.units import Quantity, quantity

Ask = Callable[[str, str], bool]
MAX_ITEMS = 60  # of a list that is compared in any order
_SPACED_COMMA = re.compile(r"(?<=[0-9])\s+,\s*(?=(?:\\!)?\s*[0-9]{3}(?![0-9]))")
_NUMBERS_APART = re.compile(r"(?<![_^])[0-9]\s+[0-9]")  # of \log_2 8 the 2 is the base, and all of it
_LETTER = re.compile(r"[A-J]")


class NeedsMathematics(Exception):
    """The verdict depends on an expression that numbers and text do not decide."""


def undecided(answer: str, reference: str) -> bool:
    """The ``ask`` of a process without math-verify."""
    raise NeedsMathematics(answer, reference)


def same(answer: str, reference: str, ask: Ask) -> bool:
    """True when an answer says what the reference says.

    Args:
        answer: as a response has it, without its box.
        reference: the right one.
        ask: are two expressions, cleaned LaTeX without words, equal.
    """
    if canonical(answer) == canonical(reference):
        return True
    if _Comparison(ask).same(cleaned(answer), cleaned(reference)):
        return True
    joined = _SPACED_COMMA.sub(",", answer)  # "58 , 500" may be either, "58, 500" is a list
    return joined != answer and same(joined, reference, ask)


def exact_value(answer: str) -> Fraction | None:
    r"""The number that an answer says, its name and unit aside; None for anything else.

    >>> exact_value("042"), exact_value(r"x = -7."), exact_value("1,2"), exact_value(r"\\frac{84}{2}\\text{ cm}")
    (Fraction(42, 1), Fraction(-7, 1), None, Fraction(42, 1))
    """
    shape = read(cleaned(answer))
    if isinstance(shape, Equation):
        shape = read(shape.value)
    if not isinstance(shape, Expression):
        return None
    found = quantity(shape.text)
    number = value(found.text)
    return None if number is None else number * found.times


class _Comparison:
    """Compares cleaned texts; ``ask`` is handed down."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask

    def same(self, answer: str, reference: str) -> bool:
        if compact(answer) == compact(reference):
            return True
        return self._shapes(read(answer), read(reference), answer, reference)

    def _shapes(self, ours: Shape, theirs: Shape, answer: str, reference: str) -> bool:
        if isinstance(ours, Choice) or isinstance(theirs, Choice):
            return self._choices(ours, theirs, answer, reference)
        if isinstance(ours, Equation) or isinstance(theirs, Equation):
            return self._equations(ours, theirs, answer, reference)
        if isinstance(ours, Region) or isinstance(theirs, Region) or _to_solve(ours, theirs) or _to_solve(theirs, ours):
            return self._regions(ours, theirs, answer, reference)
        for kind, compare in self._kinds().items():
            if isinstance(ours, kind) or isinstance(theirs, kind):
                return compare(ours, theirs)
        assert isinstance(ours, Expression) and isinstance(theirs, Expression)
        return self._expressions(ours.text, theirs.text)

    def _kinds(self) -> dict[type, Callable[..., bool]]:
        return {
            Grid: self._grids,
            Listing: self._listings,
            Residue: self._residues,
            Clock: self._clocks,
            Based: self._based,
            Ratio: self._ratios,
        }

    # -- shapes --------------------------------------------------------------------------------------------------------

    def _choices(self, ours: Shape, theirs: Shape, answer: str, reference: str) -> bool:
        if isinstance(ours, Choice) and isinstance(theirs, Choice):
            return ours.letter == theirs.letter and self.same(ours.content, theirs.content)
        choice, other = (ours, reference) if isinstance(ours, Choice) else (theirs, answer)
        assert isinstance(choice, Choice)
        letter = compact(other).strip("()").upper()
        if _LETTER.fullmatch(letter):
            return choice.letter == letter
        return self.same(choice.content, other) if choice is ours else self.same(other, choice.content)

    def _equations(self, ours: Shape, theirs: Shape, answer: str, reference: str) -> bool:
        if isinstance(ours, Equation) and isinstance(theirs, Equation):
            if compact(ours.left) == compact(theirs.left):
                return self.same(ours.value, theirs.value)
            return not (ours.named and theirs.named) and self._asked(answer, reference)
        if isinstance(ours, Equation):
            return _states(ours) and self.same(ours.value, reference)
        assert isinstance(theirs, Equation)
        return theirs.named and self.same(answer, theirs.value)

    def _regions(self, ours: Shape, theirs: Shape, answer: str, reference: str) -> bool:
        one, two = region(ours), region(theirs)
        if one is None or two is None:
            return self._solved(one or answer, two or reference)
        if one.name and two.name and compact(one.name) != compact(two.name):
            return False
        return self._matched(one.intervals, two.intervals, self._intervals)

    def _solved(self, ours: Region | str, theirs: Region | str) -> bool:
        """An inequality that has to be solved, |x| < 2, against intervals or another inequality."""
        sides = [side if isinstance(side, str) else _as_set(side) for side in (ours, theirs)]
        return any(_is_relation(side) for side in sides) and self._asked(*sides)

    def _intervals(self, ours: Interval, theirs: Interval) -> bool:
        closed = (ours.closed_low, ours.closed_high) == (theirs.closed_low, theirs.closed_high)
        return closed and self._ends(ours.low, theirs.low) and self._ends(ours.high, theirs.high)

    def _ends(self, ours: str, theirs: str) -> bool:
        if INFINITY in ours or INFINITY in theirs:
            return compact(ours) == compact(theirs)
        return self.same(ours, theirs)

    def _listings(self, ours: Shape, theirs: Shape) -> bool:
        if not isinstance(ours, Listing) or not isinstance(theirs, Listing):
            return self._single(ours, theirs)
        if len(ours.items) != len(theirs.items):
            return self._as_sets(ours, theirs)
        brackets = {(ours.opening, ours.closing), (theirs.opening, theirs.closing)}
        if ("{", "}") in brackets and not brackets <= {("{", "}"), ("", "")}:
            return False
        if len(brackets) == 2 and ("", "") not in brackets:
            return False
        if brackets <= {("{", "}"), ("", "")} and not _names_on_one_side(ours, theirs):
            return self._matched(ours.items, theirs.items, self.same)
        return all(self.same(one, two) for one, two in zip(ours.items, theirs.items, strict=True))

    def _as_sets(self, ours: Listing, theirs: Listing) -> bool:
        """Sets in braces may name an element twice."""
        if ours.opening != "{" or theirs.opening != "{":
            return False
        return all(any(self.same(one, two) for two in theirs.items) for one in ours.items) and all(
            any(self.same(one, two) for one in ours.items) for two in theirs.items
        )

    def _single(self, ours: Shape, theirs: Shape) -> bool:
        """A set of one element is that element; a whole line or nothing may be written as an interval."""
        listing, other = (ours, theirs) if isinstance(ours, Listing) else (theirs, ours)
        assert isinstance(listing, Listing)
        if listing.opening == "{" and len(listing.items) == 1 and isinstance(other, Expression):
            return self.same(listing.items[0], other.text)
        if isinstance(other, Expression) and (line := region(other)) and (span := region(listing)):
            return self._matched(span.intervals, line.intervals, self._intervals)
        return False

    def _matched(self, ours: tuple, theirs: tuple, same: Callable[..., bool]) -> bool:
        """Every item has its own partner, in any order."""
        if len(ours) != len(theirs) or len(ours) > MAX_ITEMS:
            return False
        left = list(theirs)
        for item in ours:
            partner = next((place for place, other in enumerate(left) if same(item, other)), None)
            if partner is None:
                return False
            del left[partner]
        return True

    def _grids(self, ours: Shape, theirs: Shape) -> bool:
        if not isinstance(ours, Grid) or not isinstance(theirs, Grid):
            grid, other = (ours, theirs) if isinstance(ours, Grid) else (theirs, ours)
            return isinstance(other, Listing) and other.opening == "(" and self._vector(grid, other)
        if [len(row) for row in ours.rows] != [len(row) for row in theirs.rows]:
            return False
        pairs = zip(ours.rows, theirs.rows, strict=True)
        return all(self.same(one, two) for row, other in pairs for one, two in zip(row, other, strict=True))

    def _vector(self, grid: Shape, other: Listing) -> bool:
        """A column may be written as a tuple."""
        assert isinstance(grid, Grid)
        if {len(row) for row in grid.rows} != {1} or len(grid.rows) != len(other.items):
            return False
        return all(self.same(row[0], item) for row, item in zip(grid.rows, other.items, strict=True))

    def _residues(self, ours: Shape, theirs: Shape) -> bool:
        if isinstance(ours, Residue) and isinstance(theirs, Residue):
            return self.same(ours.modulus, theirs.modulus) and self.same(ours.residue, theirs.residue)
        residue, other = (ours, theirs) if isinstance(ours, Residue) else (theirs, ours)
        assert isinstance(residue, Residue)
        return isinstance(other, Expression) and self.same(residue.residue, other.text)

    def _clocks(self, ours: Shape, theirs: Shape) -> bool:
        if isinstance(ours, Clock) and isinstance(theirs, Clock):
            return ours.minutes == theirs.minutes
        clock, other = (ours, theirs) if isinstance(ours, Clock) else (theirs, ours)
        assert isinstance(clock, Clock)
        if not isinstance(other, Ratio) or len(other.parts) != 2:
            return False
        hour, minute = (int(part) if part.isdigit() and len(part) <= 2 else -1 for part in other.parts)
        return (
            hour > 12 and 60 * hour + minute == clock.minutes
        )  # 17:30; a plain 5:30 does not say which half of the day

    def _based(self, ours: Shape, theirs: Shape) -> bool:
        if isinstance(ours, Based) and isinstance(theirs, Based):
            return ours.value == theirs.value
        based, other = (ours, theirs) if isinstance(ours, Based) else (theirs, ours)
        assert isinstance(based, Based)
        # the question names the base: the digits are the answer, their value in base ten is another one
        return isinstance(other, Expression) and compact(other.text).lstrip("0").upper() == based.digits.lstrip("0")

    def _ratios(self, ours: Shape, theirs: Shape) -> bool:
        if isinstance(ours, Ratio) and isinstance(theirs, Ratio):
            return self._same_ratio(ours, theirs)
        ratio, other = (ours, theirs) if isinstance(ours, Ratio) else (theirs, ours)
        assert isinstance(ratio, Ratio)
        if len(ratio.parts) != 2 or not isinstance(other, Expression):
            return False
        values = [value(part) for part in ratio.parts]
        fraction = re.fullmatch(r"\\frac\{[0-9]+\}\{[0-9]+\}|[0-9]+\s*/\s*[0-9]+", other.text)
        if fraction is None or values[0] is None or not values[1]:
            return False
        return values[0] / values[1] == value(other.text)

    def _same_ratio(self, ours: Ratio, theirs: Ratio) -> bool:
        if len(ours.parts) != len(theirs.parts):
            return False
        if all(clock_like(":".join(ratio.parts)) for ratio in (ours, theirs)):
            return [int(part) for part in ours.parts] == [int(part) for part in theirs.parts]
        one, two = ([value(part) for part in ratio.parts] for ratio in (ours, theirs))
        if all(one) and all(two):
            shares = {a / b for a, b in zip(one, two, strict=True) if a is not None and b is not None}
            return len(shares) == 1
        return all(self.same(a, b) for a, b in zip(ours.parts, theirs.parts, strict=True))

    # -- expressions ---------------------------------------------------------------------------------------------------

    def _expressions(self, answer: str, reference: str) -> bool:
        ours, theirs = quantity(answer), quantity(reference)
        if "\\text{" in ours.text or "\\text{" in theirs.text:  # words that are no unit: equal as text or not at all
            return False
        if not ours.agrees_with(theirs):
            return False
        if compact(ours.text) == compact(theirs.text) and ours.times == theirs.times:
            return True
        return any(self._values(*pair) for pair in _scaled(ours, theirs))

    def _values(self, answer: tuple[str, Fraction], reference: tuple[str, Fraction]) -> bool:
        one, two = value(answer[0]), value(reference[0])
        if one is not None and two is not None:
            if one * answer[1] == two * reference[1]:
                return True
            if answer[1] != reference[1]:
                return False
            return rounds_to(answer[0], two) or rounds_to(reference[0], one)
        return self._asked(_times(*answer), _times(*reference))

    def _asked(self, answer: str, reference: str) -> bool:
        if any(not text or _NUMBERS_APART.search(text) for text in (answer, reference)):  # "3 4" is neither 34 nor 12
            return False
        return self.ask(answer, reference)


def _scaled(ours: Quantity, theirs: Quantity) -> list[tuple[tuple[str, Fraction], tuple[str, Fraction]]]:
    """What is to be compared: 50 % is 50 where the other side has no percent sign, or a half."""
    plain = ((ours.text, ours.times), (theirs.text, theirs.times))
    if ours.percent == theirs.percent:
        return [plain]
    hundredth = Fraction(1, 100)
    if ours.percent:
        return [plain, ((ours.text, ours.times * hundredth), plain[1])]
    return [plain, (plain[0], (theirs.text, theirs.times * hundredth))]


def _times(text: str, factor: Fraction) -> str:
    return text if factor == 1 else f"\\frac{{{factor.numerator}}}{{{factor.denominator}}}\\cdot ({text})"


def _states(equation: Equation) -> bool:
    """The last side is the answer: not of 2 + 2 = 5, and not of x - 5 = 0, whose answer is not 0."""
    left, right = value(equation.left), value(equation.value)
    if left is not None and right is not None:
        return left == right
    return right != 0 or not (re.search(r"[0-9]", equation.left) and re.search(r"[-+]", equation.left))


def _is_relation(text: str) -> bool:
    return re.search(r"[<>=]|\\[lg]e(?![a-zA-Z])|\\ne(?![a-zA-Z])", text) is not None


def _to_solve(one: Shape, other: Shape) -> bool:
    """An inequality without a bound to read off, |x| < 2, beside a part of the line."""
    return isinstance(one, Expression) and _is_relation(one.text) and region(other) is not None


def _as_set(region: Region) -> str:
    """Intervals as mathematics writes them."""
    return " \\cup ".join(
        f"{'[' if part.closed_low else '('}{part.low},{part.high}{']' if part.closed_high else ')'}"
        for part in region.intervals
    )


def _names_on_one_side(ours: Listing, theirs: Listing) -> bool:
    """One side says which is which, a = 1, b = 2, and the other relies on the order."""

    def names(listing: Listing) -> int:
        shapes = [read(item) for item in listing.items]
        return len({compact(shape.left) for shape in shapes if isinstance(shape, Equation)})

    return (names(ours) > 1) != (names(theirs) > 1)
