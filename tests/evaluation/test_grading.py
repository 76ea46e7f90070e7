"""Answers cut out and compared: a table of tricky ones, hostile ones, workers that die, and the real sets."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from lit_opd.answers import boxed_answer
from lit_opd.errors import InputError
from lit_opd.evaluation.grading import (
    MAX_ANSWER_CHARS,
    Grader,
    Outcome,
    extracted,
    is_integer,
    math_verify_available,
    quick_verdict,
    vote,
)
from lit_opd.rollout import TransformersSampler
from tests.helpers import fixed, forks, tiny

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
needs_math_verify = pytest.mark.skipif(not math_verify_available(), reason="math-verify is not installed (extra eval)")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data beside the repository")


@pytest.fixture(scope="module")
def grader():
    """Small limits, so that hostile answers end soon."""
    made = Grader(num_workers=2, seconds=0.3)
    yield made
    made.close()


@pytest.fixture(scope="module")
def patient():
    """The time that answers have in a run: a busy machine is no reason for another verdict."""
    made = Grader(num_workers=2)
    yield made
    made.close()


# -- one process: integers and text ------------------------------------------------------------------------------------

# response, reference, outcome; decided without math-verify
QUICK = [
    (r"\boxed{042}", "42", "correct"),
    (r"\boxed{42}", "042", "correct"),
    (r"\boxed{000}", "0", "correct"),
    (r"\boxed{-7}", "-7", "correct"),
    (r"\boxed{+7}", "7", "correct"),
    (r"\boxed{" + "\u2212" + "7}", "-7", "correct"),
    (r"\boxed{7}", "-7", "wrong"),
    (r"\boxed{1,234}", "1234", "correct"),
    (r"\boxed{1{,}234}", "1234", "correct"),
    (r"\boxed{1\,234}", "1234", "correct"),
    (r"\boxed{1,2}", "12", "wrong"),
    (r"\boxed{3 4}", "34", "wrong"),
    (r"\boxed{12,34}", "1234", "wrong"),
    (r"\boxed{42.0}", "42", "correct"),
    (r"\boxed{41.9999999999}", "42", "wrong"),
    (r"\boxed{42.}", "42", "correct"),
    (r"\boxed{$42$}", "42", "correct"),
    (r"\boxed{\(42\)}", "42", "correct"),
    (r"\boxed{\text{42}}", "42", "correct"),
    (r"\boxed{42\text{ apples}}", "42", "correct"),
    (r"\boxed{42\text{ cm}^2}", "42", "correct"),
    (r"\boxed{42^\circ}", "42", "correct"),
    (r"\boxed{42\%}", "42", "correct"),
    (r"\boxed{\$42}", "42", "correct"),
    (r"\boxed{x = 42}", "42", "correct"),
    (r"\boxed {42}", "42", "correct"),
    (r"\fbox{42}", "42", "correct"),
    (r"\boxed{41} no, \boxed{42}", "42", "correct"),
    (r"\boxed{42} no, \boxed{41}", "42", "wrong"),
    (r"\boxed{\boxed{42}}", "42", "correct"),
    (r"\boxed{42 or 43}", "42", "wrong"),
    (r"\boxed{42 \text{ or } 43}", "42", "wrong"),
    (r"\boxed{4" + "\u00b2" + "}", "42", "wrong"),
    (r"\boxed{\frac{84}{2}}", "42", "correct"),
    (r"\boxed{m + n = 25 + 17 = 42}", "42", "correct"),
    (r"\boxed{m + n = 25 + 17 = 43}", "42", "wrong"),
    (r"\boxed{\angle ABC = 42^\circ}", "42", "correct"),
    (r"\boxed{42", "42", "truncated"),
    (r"\boxed{41} so \boxed{42", "42", "truncated"),
    (r"so the answer is \boxed", "42", "truncated"),
    (r"put it into \boxed and say 42", "42", "no_answer"),
    (r"\boxed{}", "42", "no_answer"),
    ("the answer is 42", "42", "no_answer"),
    ("", "42", "no_answer"),
    ("3 + 4 = 7\n#### 7", "7", "correct"),
    ("#### 6\nno\n#### 1,007 ", "1007", "correct"),
    (r"#### 7 but \boxed{8}", "7", "wrong"),
    (r"\boxed{" + "9" * 5000 + "}", "9", "wrong"),
]


@pytest.mark.parametrize(("response", "reference", "outcome"), QUICK)
def test_integers_are_graded_without_a_worker(response, reference, outcome):
    grader = Grader()
    for integers in (True, False):  # a set of whole numbers is graded as validation grades
        assert grader.grade([response], [reference], integers=integers)[0].outcome == outcome
    assert not grader._workers


@needs_math_verify
def test_a_set_of_integers_is_graded_as_validation_grades(patient):
    """Also where mathematics decides."""
    responses = [r"\boxed{6\sqrt{49}}", r"\boxed{2x + 42}", r"\boxed{42\sin^2 x + 42\cos^2 x}", r"\boxed{42i}"]
    expected = [True, False, True, False]
    for integers in (True, False):
        assert [grade.correct for grade in patient.grade(responses, ["42"] * 4, integers=integers)] == expected


def test_a_set_of_integers_needs_no_math_verify(monkeypatch):
    monkeypatch.setattr("lit_opd.evaluation.grading.math_verify_available", lambda: False)
    grader = Grader()
    assert not grader.grade([r"\boxed{6\sqrt{50}}"], ["42"], integers=True)[0].correct
    assert not grader._workers


def test_who_lacks_math_verify_hears_that_answers_were_not_compared(monkeypatch):
    monkeypatch.setattr("lit_opd.evaluation.grading.math_verify_available", lambda: False)
    with pytest.warns(UserWarning, match=r"6\\\\sqrt\{50\}.*'42'.*count as wrong.*lit-opd\[eval\]"):
        Grader().grade([r"\boxed{6\sqrt{50}}", r"\boxed{41}"], ["42"] * 2, integers=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Grader().grade([r"\boxed{42}", r"\boxed{41}"], ["42"] * 2, integers=True)  # numbers decide these


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 0}, r"`Grader\.num_workers` must be an integer >= 1, got 0"),
        ({"seconds": 0.0}, r"`Grader\.seconds` must be a finite number > 0, got 0\.0"),
        ({"seconds": float("inf")}, r"`Grader\.seconds` must be a finite number > 0, got inf"),
        ({"memory_mib": -1}, r"`Grader\.memory_mib` must be an integer >= 1, got -1"),
    ],
)
def test_limits_that_cannot_hold_are_refused(settings, message):
    """Without time every comparison would be a timeout, and no answer right."""
    with pytest.raises(ValueError, match=message):
        Grader(**settings)


def test_braces_are_matched_and_escaped_ones_do_not_count():
    assert boxed_answer(r"a \boxed{\frac{1}{\sqrt{2}}} b") == r"\frac{1}{\sqrt{2}}"
    assert boxed_answer(r"\boxed{\left\{ 1, 2 \right.}") == r"\left\{ 1, 2 \right."
    assert boxed_answer(r"\boxed{a \\}") == r"a \\"
    assert boxed_answer(r"\boxed{a \}") is None


def test_equal_wrong_answers_vote_together():
    assert vote("042") == vote("42.0") == vote(r"\text{42}")
    assert vote(r"\dfrac{1}{2}") == vote(r"$\frac{1}{2}$") != vote(r"\frac{1}{3}")


def test_a_long_answer_is_wrong_without_being_parsed():
    assert quick_verdict("1+" * MAX_ANSWER_CHARS + "1", r"\frac12") is False


def test_without_mathematics_latex_is_compared_as_text():
    grader = Grader(mathematics=False)
    pair = [r"\boxed{\dfrac{x}{2}}", r"\boxed{0.5x}"]
    assert [g.outcome for g in grader.grade(pair, [r"\frac{x}{2}"] * 2)] == ["correct", "wrong"]
    assert not grader._workers


# -- math-verify in workers --------------------------------------------------------------------------------------------

# response, reference, outcome; these need mathematics
MATHEMATICS = [
    (r"\boxed{0.5}", r"\frac{1}{2}", "correct"),
    (r"\boxed{\frac{2}{4}}", r"\frac12", "correct"),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", "correct"),
    (r"\boxed{\frac{84}{2}}", "42", "correct"),
    (r"\boxed{\{2,1\}}", r"\{1,2\}", "correct"),
    (r"\boxed{(1,2)}", "(2,1)", "wrong"),
    (r"\boxed{x^2+2x+1}", "(x+1)^2", "correct"),
    (r"\boxed{\frac{\pi}{3}}", r"\frac{\pi}{4}", "wrong"),
    (r"\boxed{1} \boxed{\frac{1}{2}}", r"0.5", "correct"),
    (r"\boxed{[0,1)}", "[0,1]", "wrong"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "correct"),
    (r"\boxed{\frac{1}{}", r"\frac12", "truncated"),
    (r"\boxed{\log_2 8}", "3", "correct"),
    (r"\boxed{\log_2 9}", r"2\log_2 3", "correct"),
    (r"\boxed{\log_2 8}", "4", "wrong"),
]


@needs_math_verify
def test_latex_goes_to_math_verify(patient):
    responses, references, outcomes = zip(*MATHEMATICS, strict=True)
    assert [grade.outcome for grade in patient.grade(responses, references)] == list(outcomes)


HOSTILE = [
    "9^{9^{9^9}}",
    "10^{10^{10}}",
    "(1+1)^{10^{9}}",
    "1000000000!",
    "((((10!)!)!)!)",
    r"\binom{10^9}{10^8}",
    r"\sum_{n=1}^{10^{9}} \frac{1}{n^2}",
    r"\prod_{n=1}^{10^9} n",
    "(x+1)^{100000}",
    "(a+b+c+d+e)^{400}",
    "(" * 400 + "1" + ")" * 400,
    "{" * 450 + "}" * 450,
    r"\frac{" * 100 + "1" + "}{2}" * 100,
    r"\sqrt{" * 150 + "2" + "}" * 150,
    "x^" * 300 + "x",
    r"\int_0^{1}" * 80 + "x",
    "9" * MAX_ANSWER_CHARS,
    "__import__('os').system('touch /tmp/lit_opd_was_here')",
    "\u202e\u0001\ufffd" * 100,
    "1+" * 5_000_000 + "1",
]


@needs_math_verify
def test_hostile_answers_end_in_time_and_the_process_goes_on(grader):
    assert len(HOSTILE) == 20
    grades = grader.grade([f"\\boxed{{{answer}}}" for answer in HOSTILE], [r"\frac{1}{2}"] * len(HOSTILE))
    outcomes = [grade.outcome for grade in grades]
    assert set(outcomes) <= {Outcome.WRONG, Outcome.TIMEOUT}
    assert outcomes[0] == Outcome.TIMEOUT
    assert grader.grade([r"\boxed{0.5}"], [r"\frac12"])[0].correct
    assert not Path("/tmp/lit_opd_was_here").exists()


def asked(verdict: str) -> str:
    """What a fork under 200 MiB replies to three questions, 400, 1 and 2."""
    script = (
        "import json, os; from grading_worker import _Fork, _limit_memory; _limit_memory(200); "
        f"fork = _Fork(lambda answer, _: {verdict}, 0.2); "
        "print([fork.ask(json.dumps({'answer': n, 'reference': ''}).encode() + b'\\n').decode().strip() for n in (400, 1, 2)])"
    )
    folder = ROOT / "lit_opd" / "evaluation"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_fork_has_limits_and_the_next_question_gets_a_new_one():
    assert asked("bytearray(answer << 20)") == "['timeout', 'correct', 'correct']"  # memory
    assert (
        asked("[answer for _ in iter(int, answer)] if answer > 2 else answer > 1") == "['timeout', 'wrong', 'correct']"
    )
    assert asked("os.abort() if answer > 2 else answer > 1") == "['', 'wrong', 'correct']"
    assert asked("1 / 0 if answer > 2 else answer > 1") == "['wrong', 'wrong', 'correct']"


@needs_math_verify
def test_a_killed_worker_recovers_and_its_answer_is_graded(grader):
    grader.compare([("0.5", "1/2")] * 2)
    for worker in grader._workers:
        if worker.process is not None:
            os.kill(worker.process.pid, signal.SIGKILL)
    assert grader.compare([("0.5", "1/2"), ("0.25", "1/4"), ("0.5", "1/3")]) == ["correct", "correct", "wrong"]


@needs_math_verify
def test_workers_end_with_the_grader_and_copies_start_their_own(grader):
    own = Grader(num_workers=1)
    own.compare([("0.5", "1/2")])
    process = own._workers[0].process
    assert process is not None and not copy.deepcopy(own)._workers
    own.close()
    assert process.poll() is not None
    assert own.compare([("0.5", "1/2")]) == ["correct"]
    own.close()


def test_a_worker_that_cannot_start_says_how_to_find_out(monkeypatch):
    monkeypatch.setattr("lit_opd.evaluation.grading.START_SECONDS", 30.0)
    starved = Grader(num_workers=1, memory_mib=30)
    with pytest.raises(InputError, match=r"`Grader\.memory_mib` must let a worker start, got 30 .*import math_verify"):
        starved.compare([("0.5", "1/2")])
    starved.close()


# -- the real sets -----------------------------------------------------------------------------------------------------


def answers(name: str, field: str = "answer") -> list[str]:
    return [json.loads(line)[field] for line in (DATA / name).read_text().splitlines()]


@needs_data
@pytest.mark.parametrize("name", ["aime24.jsonl", "aime25.jsonl"])
def test_aime_answers_grade_as_themselves_and_not_as_their_neighbours(name):
    references = [str(answer) for answer in answers(name)]
    assert len(references) == 30 and all(is_integer(reference) for reference in references)
    right = Grader().grade([f"\\boxed{{{int(r):03d}}}" for r in references], references, integers=True)
    wrong = Grader().grade([f"\\boxed{{{int(r) + 1}}}" for r in references], references, integers=True)
    assert all(grade.correct for grade in right)
    assert all(grade.outcome == Outcome.WRONG for grade in wrong)


@needs_data
def test_gsm8k_solutions_grade_as_their_own_answers():
    solutions = answers("gsm8k_test.jsonl")
    references = [solution.rsplit("####", 1)[1].strip() for solution in solutions]
    assert all(is_integer(reference) for reference in references)
    assert all(grade.correct for grade in Grader().grade(solutions, references, integers=True))


@needs_data
@needs_math_verify
def test_math500_answers_grade_as_themselves(patient):
    """The whole solutions by text; and 100 answers through math-verify itself, against themselves and their neighbour."""
    references, solutions = answers("math500.jsonl"), answers("math500.jsonl", "solution")
    assert all(grade.correct for grade in patient.grade(solutions, references))
    latex = [reference for reference in references if "\\" in reference][:100]
    assert all(isinstance(extracted(f"\\boxed{{{answer}}}"), str) for answer in latex)
    assert patient.compare([(answer, answer) for answer in latex]) == ["correct"] * len(latex)
    different = [(a, b) for a, b in zip(latex, latex[1:], strict=False) if a != b]
    assert patient.compare(different).count(Outcome.CORRECT) <= 2


@needs_math_verify
def test_the_end_of_a_run_ends_the_processes_that_graded_in_it(tmp_path):
    started: list[subprocess.Popen[bytes]] = []

    class Grades(Callback):
        def on_train_end(self, trainer, pl_module):
            grader = pl_module.evaluator.grader
            assert grader.compare([("x+1", "1+x")]) == [Outcome.CORRECT]
            started.extend(worker.process for worker in grader._workers if worker.process is not None)
            assert all(process.poll() is None for process in started)

    rollout = fixed.rollout(lengths=[3, 6], prompt_lengths=[4, 2], truncated=set())
    trained = fixed.module(tiny.pair(tmp_path), rollout, dtype="float32", sampler=TransformersSampler(max_new_tokens=4))
    fixed.fit(trained, rollout.prompts, steps=1, watch=Grades())
    assert started and all(process.poll() is not None for process in started)


@needs_math_verify
def test_a_grader_that_cannot_start_on_one_rank_ends_both(tmp_path):
    forks.succeed("tests.helpers.grading_ranks", str(tmp_path), logs=tmp_path, timeout=240.0)
    for rank in (0, 1):
        assert "`Grader.memory_mib` must let a worker start, got 1" in (tmp_path / f"ended-{rank}").read_text()
