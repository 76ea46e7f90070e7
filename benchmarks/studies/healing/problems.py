"""Word problems in the manner of GSM8K, made here: no data set is needed, and every answer is known by construction."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from lit_opd.answers import after_hashes, exact_value, last_box

NAMES = (
    "Ada",
    "Ben",
    "Clara",
    "David",
    "Elif",
    "Farid",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Liam",
    "Mona",
    "Nils",
)
THINGS = ("apples", "stickers", "marbles", "pencils", "cookies", "shells", "stamps", "buttons", "cards", "beads")
# Text and answer, one after the other; capitals of the alphabet's end are names and things, small letters numbers. Where a number
# must divide another, or be the smaller one, the numbers are drawn so that it is (``_numbers``): a > b, and c divides nothing.
TEMPLATES: tuple[tuple[str, str], ...] = (
    ("{X} has {a} {T} and finds {b} more. How many {T} does {X} have now?", "a + b"),
    ("{X} had {a} {T} and gave {b} of them to {Y}. How many {T} does {X} have left?", "a - b"),
    ("There are {c} boxes with {b} {T} in each box. How many {T} are there in all?", "b * c"),
    ("{X} has {b} {T}. {Y} has {c} times as many. How many {T} do they have together?", "b + b * c"),
    (
        "A shop sells a bag of {T} for {c} dollars. {X} buys {b} bags and pays with {pay}. How many dollars does {X} get back?",
        "pay - b * c",
    ),
    ("{X} reads {b} pages every day. How many pages does {X} read in {c} weeks?", "7 * b * c"),
    ("{X} has {a} {T}, and {Y} has {b} fewer than {X}. How many {T} do they have together?", "a + a - b"),
    (
        "A bus has {a} passengers. At a stop {b} get off and {c} get on. How many passengers are on the bus now?",
        "a - b + c",
    ),
    (
        "{X} earns {b} dollars an hour and works {c} hours a day for {d} days. How many dollars does {X} earn?",
        "b * c * d",
    ),
    ("{X} shares {share} {T} equally among {c} friends. How many {T} does each friend get?", "share / c"),
    (
        "{X} bakes {share} cookies and packs them in bags of {c}. {X} sells every bag for {d} dollars. "
        "How many dollars does {X} get?",
        "share / c * d",
    ),
    (
        "A rope of {a} meters is cut {d} times, and each time {c} meters are taken off. How many meters are left?",
        "a - c * d",
    ),
)
SMALL, MIDDLE, LARGE = (2, 6), (5, 12), (40, 90)


@dataclass(frozen=True)
class Problem:
    """One problem.

    Args:
        id: unique in its set.
        question: the text.
        answer: a whole number.
    """

    id: str
    question: str
    answer: int


def problems(name: str, count: int, *, seed: int, without: frozenset[str] = frozenset()) -> list[Problem]:
    """``count`` different problems, the same for the same seed.

    Args:
        name: what their ids begin with; it is part of the seed.
        count: how many.
        seed: of all numbers, names and templates.
        without: questions that must not be among them.
    """
    source = random.Random(f"{name}/{seed}")
    seen, found = set(without), []
    for question, answer in _endless(source):
        if question not in seen:
            seen.add(question)
            found.append(Problem(f"{name}-{len(found):04d}", question, answer))
        if len(found) == count:
            return found
    raise AssertionError("the source has no end")


def _endless(source: random.Random) -> Iterator[tuple[str, int]]:
    while True:
        text, expression = source.choice(TEMPLATES)
        first, second = source.sample(NAMES, 2)
        numbers = _numbers(source)
        yield text.format(X=first, Y=second, T=source.choice(THINGS), **numbers), value(expression, numbers)


def _numbers(source: random.Random) -> dict[str, int]:
    numbers = {"a": source.randint(*LARGE), "b": source.randint(*MIDDLE)}
    numbers |= {name: source.randint(*SMALL) for name in "cd"}
    numbers["share"] = numbers["b"] * numbers["c"]
    numbers["pay"] = 10 * (numbers["b"] * numbers["c"] // 10 + source.randint(1, 2))
    return numbers


def value(expression: str, numbers: Mapping[str, int]) -> int:
    """What an expression of + - * / and names says, read from the left, products first.

    >>> value("a - b * c", {"a": 20, "b": 3, "c": 4})
    8
    """
    total = Fraction(0)
    for sign, term in re.findall(r"([+-]?)\s*([^+-]+)", expression):
        product = Fraction(1)
        for operation, factor in re.findall(r"([*/]?)\s*(\w+)", term):
            number = Fraction(factor) if factor.isdigit() else Fraction(numbers[factor])
            product = product / number if operation == "/" else product * number
        total += -product if sign == "-" else product
    if total.denominator != 1:
        raise ValueError(f"{expression!r} of {dict(numbers)} must be whole, got {total}")
    return int(total)


# -- answers -------------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_NEXT = re.compile(r"\n\s*(?:Question|Q)\s*:")


def answer_of(response: str) -> Fraction | None:
    """The number that a response gives as its answer; None where there is none.

    A box, or what stands after "####", else the last number; a base model writes a next question, which is left out.

    >>> answer_of("3 + 4 = 7. So there are 7 apples."), answer_of("It is 1,200.\\n\\nQuestion: 5"), answer_of("many")
    (Fraction(7, 1), Fraction(1200, 1), None)
    """
    own = _NEXT.split(response)[0]
    boxed, _ = last_box(own)
    said = boxed if boxed is not None else after_hashes(own)
    if said is not None and (found := exact_value(said)) is not None:
        return found
    numbers = _NUMBER.findall(own)
    return Fraction(numbers[-1].replace(",", "")) if numbers else None


def is_right(response: str, answer: int) -> bool:
    """Whether the answer of a response is the number."""
    return answer_of(response) == answer
