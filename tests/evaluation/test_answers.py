"""What answers say: many right and wrong ones by kind, the same verdict from every process, bounded work, repeated problems."""

from __future__ import annotations

import json
import math
import random
import signal
import time
from fractions import Fraction

import pytest

from lit_opd.answers import NeedsMathematics, canonical, cleaned, exact_value, same, undecided
from lit_opd.answers.arithmetic import value
from lit_opd.evaluation import Grader, load_sets
from lit_opd.evaluation.grading import MAX_ANSWER_CHARS, math_verify_available, quick_verdict, vote
from lit_opd.evaluation.sets import _reference
from lit_opd.prompts.encoding import PromptEncoder
from lit_opd.prompts.sources import DataSource, read_prompts
from tests.evaluation.answer_pairs import PAIRS
from tests.helpers import tiny

needs_math_verify = pytest.mark.skipif(not math_verify_available(), reason="math-verify is not installed (extra eval)")
CASES = [
    (kind, answer, reference, right)
    for kind, entries in PAIRS.items()
    for reference, *answers in entries
    for right, these in zip((True, False), answers, strict=True)
    for answer in these
]


@pytest.fixture(scope="module")
def verdicts() -> dict[tuple[str, str], bool]:
    """The whole table, graded as a run grades it: one process, with math-verify."""
    grader = Grader(num_workers=1)
    grades = grader.grade([f"So $\\boxed{{{answer}}}$." for _, answer, _, _ in CASES], [ref for _, _, ref, _ in CASES])
    grader.close()
    assert {grade.outcome.value for grade in grades} == {"correct", "wrong"}
    return {(case[1], case[2]): grade.correct for case, grade in zip(CASES, grades, strict=True)}


@needs_math_verify
@pytest.mark.parametrize("kind", PAIRS)
def test_right_answers_are_right_and_wrong_ones_wrong(kind, verdicts):
    missed = [
        (answer, ref, right) for own, answer, ref, right in CASES if own == kind and verdicts[answer, ref] != right
    ]
    assert missed == []


@needs_math_verify
def test_what_is_decided_early_is_what_the_worker_says(verdicts):
    early = {pair: quick_verdict(*pair) for pair in verdicts}
    decided = {pair: verdict for pair, verdict in early.items() if verdict is not None}
    assert len(decided) > len(early) / 2
    assert decided == {pair: verdicts[pair] for pair in decided}


def test_every_reference_is_its_own_answer_in_any_wrapping():
    references = {ref for entries in PAIRS.values() for ref, *_ in entries}
    for reference in references:
        for wrapped in (
            f" {reference} ",
            f"{{{reference}}}",
            f"\\boldsymbol{{{reference}}}",
            f"\\displaystyle {reference}.",
        ):
            assert quick_verdict(wrapped, reference), (wrapped, reference)


def test_cleaning_twice_changes_nothing():
    texts = {text for _, answer, reference, _ in CASES for text in (answer, reference)}
    assert [
        text
        for text in texts
        if canonical(cleaned(text)) != canonical(text) and "," not in text and "choice" not in cleaned(text)
    ] == []


# -- exact numbers -----------------------------------------------------------------------------------------------------


def test_arithmetic_equals_fractions_worked_out_by_python():
    """Random expressions, written as LaTeX and worked out beside it."""
    draw = random.Random(0)

    def expression(depth: int) -> tuple[str, Fraction]:
        if depth == 0:
            number = draw.randrange(1, 30)
            return draw.choice([(str(number), Fraction(number)), (f"{number}.5", number + Fraction(1, 2))])
        (one, a), (two, b) = expression(depth - 1), expression(depth - 1)
        power = draw.randrange(-3, 4)
        return draw.choice(
            [
                (f"({one}+{two})", a + b),
                (f"({one} - {two})", a - b),
                (f"({one}) \\cdot ({two})", a * b),
                (f"\\frac{{{one}}}{{{two}}}", a / b if b else None),
                (f"({one})^{{{power}}}", a**power if a or power >= 0 else None),
                (f"-({one})", -a),
                (f"{draw.randrange(6)}!", None),
            ]
        )

    checked = 0
    for _ in range(400):
        try:
            text, exact = expression(draw.randrange(1, 4))
        except (TypeError, ZeroDivisionError):
            continue
        if exact is not None:
            checked += 1
            assert value(text) == exact, text
    assert checked > 150
    assert (
        value("5!") == math.factorial(5)
        and value("\\binom{7}{3}") == math.comb(7, 3)
        and value("\\sqrt{\\frac{4}{9}}") == Fraction(2, 3)
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2x",
        "3 4",
        "2^{0.5}",
        "\\sqrt{2}",
        "9^{9^{9}}",
        "1000000!",
        "(" * 300 + "1" + ")" * 300,
        "1/0",
        "1/2(3)",
        "\\frac12",
    ],
)
def test_what_is_no_plain_arithmetic_has_no_value(text):
    assert value(text) is None


def test_names_and_units_are_left_aside_and_equal_numbers_vote_together():
    assert (
        exact_value(r"x = \frac{84}{2}\text{ cm}") == 42 and exact_value("2x") is None and exact_value("1, 2") is None
    )
    assert vote("042") == vote(r"x = 42\text{ cm}") == vote(r"\frac{84}{2}") != vote("43")


# -- bounds ------------------------------------------------------------------------------------------------------------

PIECES = (
    "{ } ( ) [ ] \\{ \\} \\text{ \\text{a} \\text{cm} ^ _ \\frac \\frac{ 1 1, 1,234 . ... \\, $ ** a and \\pm \\le < > = x= \\in "
    "\\cup : % \\circ \\sqrt( \\mathbf{ \\left( \\begin{pmatrix} \\\\ & 0.1 \\overline{ \\dot{1} "
    "a.m. 1_8 \\text{and} | \\textbf{(C)} - "
    "/ ! 1/2 \u221a \u00bd \u00b0 word the 9"
).split(" ")


def test_no_text_holds_the_training_process_up():
    """A thousand characters of every kind, alone and mixed: the process that trains compares them, and has no limit."""
    draw = random.Random(0)
    texts = [(piece * MAX_ANSWER_CHARS)[:MAX_ANSWER_CHARS] for piece in PIECES]
    texts += ["".join(draw.choices(draw.sample(PIECES, 3), k=300))[:MAX_ANSWER_CHARS] for _ in range(40)]
    start = time.process_time()
    for text in texts:
        assert quick_verdict(text, r"\frac{1}{2}x") in (False, None)
    assert time.process_time() - start < 0.5 * len(texts)


def test_integers_are_fast():
    """Against the time that a worker's round trip takes: some milliseconds."""
    start = time.process_time()
    for number in range(5000):
        assert quick_verdict(f"{number:04d}", str(number))
    assert time.process_time() - start < 5000 * 200e-6


def test_expressions_are_left_to_the_one_who_can():
    with pytest.raises(NeedsMathematics):
        same("x+1", "1+x", undecided)
    asked = []
    assert same("(x+1, 2)", "(1+x, 2)", lambda *pair: asked.append(pair) or True)
    assert asked == [("x+1", "1+x")]


# -- references and sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["solution", "answer", "ground_truth"])
def test_validation_and_evaluation_cut_a_solution_to_the_same_answer(tmp_path, column):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "3 + 4", column: r"First \boxed{3}. Four more: $\boxed{\frac{14}{2}}$."}))
    (row,) = read_prompts(str(path))
    assert row.answer == _reference(row) == r"\frac{14}{2}"
    assert Grader(mathematics=False).grade([r"\boxed{7}", r"\boxed{8}"], [row.answer] * 2)[0].correct


def test_a_repeated_problem_is_one_problem(tmp_path, capfd, caplog):
    rows = [{"id": n, "problem": f"{n % 3} + 1", "answer": n % 3 + 1} for n in range(9)] + [
        {"id": 9, "problem": "7 + 1", "answer": 8}
    ]
    path = tmp_path / "repeats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level("INFO"):
        (loaded,) = load_sets(
            [DataSource(str(path))], PromptEncoder(tiny.tokenizer(), chat_template=False), suffix=None, seed=0
        )
    assert {problem.problem_id: problem.group for problem in loaded.problems} == {
        str(n): str(n % 3) if n < 9 else "9" for n in range(10)
    }
    assert loaded.repeats
    assert "4 different problems in 10 rows" in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "answer",
    [
        "1" * 400 + "." + "12" * 200,
        ":" * 998 + "\\}",
        "1" + "^\\circ \\text{a}" * 65 + "x",
        "1" + "^{\\text{a}} \\text{a}" * 50 + "x",
    ],
)
def test_text_and_numbers_are_read_in_bounded_time(answer):
    """This process has no limit on time: an answer of 1,000 characters must not hold it."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 8.0)
    try:
        assert quick_verdict(answer, "5") is not True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def test_a_number_too_long_to_be_written_has_a_vote():
    assert vote(r"9^{5000}") == vote(r"9^{4999}\cdot 9") != vote(r"9^{4999}")
