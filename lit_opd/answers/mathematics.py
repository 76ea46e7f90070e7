"""Are two LaTeX expressions equal? Parsed by math-verify's parser, compared exactly with sympy.

Only the grading worker imports this file: sympy can be made to run for ever, and the worker has limits. math-verify's own
comparison rounds (2^-70 equals 2^-71), drops bases and primes and takes letters for units, so it decides only what is neither an
expression nor a relation, sets in particular.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from lit_opd.answers.arithmetic import is_rounding
from lit_opd.answers.reading import based

DIGITS = 60  # of numeric comparison; it can only tell apart, exact algebra must agree
NEAR = sympy.Rational(1, 10**45)  # relative
POINTS = 4  # at which expressions in letters are compared

_BASED = re.compile(r"(?<![a-zA-Z0-9.}])[0-9]+_(?:[0-9]{1,2}|\{[0-9]{1,2}\})(?![0-9])")
_PRIMED = re.compile(r"([a-zA-Z])('+)")
_DEGREES = re.compile(r"([0-9.]+|\\?[a-zA-Z]+)\s*\^\\circ")
_ANGLES = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_CONFIG = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
_OPPOSITE = {sympy.StrictLessThan: sympy.StrictGreaterThan, sympy.LessThan: sympy.GreaterThan}


def equal(answer: str, reference: str) -> bool:
    """True when two cleaned expressions are equal; what cannot be parsed equals nothing.

    Args:
        answer: LaTeX without words and units.
        reference: likewise.
    """
    if any("\\ldots" in text or "\\text" in text for text in (answer, reference)):
        return False
    ours, theirs = parsed(answer), parsed(reference)
    if isinstance(ours, sympy.Expr) and isinstance(theirs, sympy.Expr):
        return _expressions(ours, theirs) or _rounded(answer, theirs) or _rounded(reference, ours)
    if isinstance(ours, sympy.Eq) and isinstance(theirs, sympy.Eq):
        return _equations(ours, theirs)
    if _is_relation(ours) and _is_relation(theirs):
        return _inequalities(ours, theirs)
    for relation, other in ((ours, theirs), (theirs, ours)):
        if _is_relation(relation) and isinstance(other, sympy.Set):
            return bool(len(relation.free_symbols) == 1 and _solved(relation) == other)
    return bool(verify(theirs, ours, timeout_seconds=None, raise_on_error=True))


def parsed(text: str) -> Any:
    """What math-verify's parser makes of a cleaned text, with exact numbers and the imaginary unit."""
    text = _BASED.sub(_in_base_ten, text)
    text = _PRIMED.sub(lambda found: f"{found[1]}_{{{'p' * len(found[2])}}}", text)
    if _ANGLES.search(text):
        text = _DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
    text = text.replace("^\\circ", "").replace("%", "\\%")
    return _exact(latex2sympy(text, is_real=True, normalization_config=None, conversion_config=_CONFIG))


def _in_base_ten(found: re.Match[str]) -> str:
    """The value of digits with their base, which the parser would drop."""
    number = based(found[0])
    if number is None:
        raise ValueError(f"{found[0]}: no digits of this base")
    return f"({number.value})"


def _exact(expression: Any) -> Any:
    """Decimals as fractions; i as the imaginary unit."""
    if not isinstance(expression, sympy.Basic):
        return expression
    units = {symbol: sympy.I for symbol in expression.free_symbols if symbol.name == "i"}
    expression = expression.replace(lambda part: isinstance(part, sympy.Float), lambda part: sympy.Rational(str(part)))
    return expression.xreplace(units) if units else expression


def _expressions(ours: sympy.Expr, theirs: sympy.Expr) -> bool:
    ours, theirs = ours.doit(), theirs.doit()
    if any(value.has(sympy.nan, sympy.zoo) for value in (ours, theirs)):
        return False
    if ours == theirs:
        return True
    if ours.is_Rational and theirs.is_Rational or any(value.has(sympy.oo, -sympy.oo) for value in (ours, theirs)):
        return False
    if ours.atoms(AppliedUndef) or theirs.atoms(AppliedUndef):
        return bool(sympy.simplify(ours - theirs) == 0)
    return _near_everywhere(ours, theirs) and _algebra_agrees(ours, theirs)


def _near_everywhere(ours: sympy.Expr, theirs: sympy.Expr) -> bool:
    """False where the values differ at one of some points; letters get unrelated fractions of both signs."""
    letters = sorted(ours.free_symbols | theirs.free_symbols, key=str)
    for point in range(POINTS if letters else 1):
        values = {letter: _coordinate(point, place) for place, letter in enumerate(letters)}
        one, two = (expression.subs(values).evalf(DIGITS) for expression in (ours, theirs))
        if not (one.is_number and two.is_number) or any(value.has(sympy.nan, sympy.zoo) for value in (one, two)):
            continue
        if abs(one - two) > NEAR * max(abs(one), abs(two)):
            return False
    return True


def _coordinate(point: int, place: int) -> sympy.Rational:
    sign = -1 if (place + 1) * point % 2 else 1
    return sign * sympy.Rational(sympy.prime(5 + 7 * point + place), 7 + point)


def _algebra_agrees(ours: sympy.Expr, theirs: sympy.Expr) -> bool:
    """The difference is not shown to be other than zero: 2^200 + 1 is near 2^200."""
    difference = sympy.simplify(ours - theirs)
    if difference == 0:
        return True
    return not difference.is_number or difference.equals(0) is not False


def _rounded(decimal: str, exact: sympy.Expr) -> bool:
    """A decimal of enough digits for an irrational number."""
    if exact.free_symbols or exact.is_Rational or not exact.is_real:
        return False
    return is_rounding(decimal.strip(), Fraction(str(exact.evalf(DIGITS))))


def _is_relation(value: Any) -> bool:
    return isinstance(value, Relational) or type(value).__name__ == "And"


def _equations(ours: sympy.Eq, theirs: sympy.Eq) -> bool:
    """One is the other times a number that is not zero, after fractions are cleared."""
    one, two = (sympy.numer(sympy.together(equation.lhs - equation.rhs)) for equation in (ours, theirs))
    if not one.free_symbols or not two.free_symbols or sympy.expand(one) == 0 or sympy.expand(two) == 0:
        return False
    ratio = sympy.simplify(one / two)
    return bool(ratio.is_number and ratio != 0)


def _inequalities(ours: Any, theirs: Any) -> bool:
    letters = ours.free_symbols | theirs.free_symbols
    if len(letters) == 1:
        return bool(_solved(ours) == _solved(theirs))
    if not isinstance(ours, Relational) or not isinstance(theirs, Relational):
        return False
    one, two = (_smaller_than_zero(relation) for relation in (ours, theirs))
    if one[0] is not two[0]:
        return False
    ratio = sympy.simplify(one[1] / two[1])
    return bool(ratio.is_number and ratio.is_positive)


def _solved(relation: Any) -> Any:
    """The set of real numbers for which it holds."""
    if isinstance(relation, Relational):
        return relation.doit().as_set()
    return sympy.Intersection(*(part.as_set() for part in relation.args))


def _smaller_than_zero(relation: Relational) -> tuple[type, sympy.Expr]:
    """(kind, f) of f < 0 or f <= 0."""
    for smaller, greater in _OPPOSITE.items():
        if isinstance(relation, smaller):
            return smaller, relation.lhs - relation.rhs
        if isinstance(relation, greater):
            return smaller, relation.rhs - relation.lhs
    return type(relation), relation.lhs - relation.rhs
