"""Answers cut out of responses and compared with references. No code in an answer is ever run here.

What an answer says is read by ``lit_opd.answers``: numbers, lists, intervals and equal texts are decided in this process. What
needs mathematics goes to worker processes, which run the same function with math-verify (extra ``eval``): its own time limits
need the main thread, and ``9^{9^{9^9}}`` holds the interpreter lock. A worker imports math-verify once and forks; the fork
answers question after question under a limit on processor time and on memory until one of them ends it, and the next fork
takes milliseconds. A worker that dies itself is replaced.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import selectors
import subprocess
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from lit_opd.answers import (
    NeedsMathematics,
    after_hashes,
    canonical,
    exact_value,
    last_box,
    same,
    undecided,
)
from lit_opd.errors import InputError, require

MAX_ANSWER_CHARS = 1000  # a longer answer is wrong; the longest reference of MATH-500 has 53
WALL_FACTOR = 6  # wall seconds allowed per second of processor time, for busy machines
START_SECONDS = 180.0  # to import math-verify
ATTEMPTS = 2  # a question whose worker was killed from outside is asked again
WORKER = Path(__file__).with_name("grading_worker.py")


class Outcome(StrEnum):
    """What became of one response."""

    CORRECT = "correct"
    WRONG = "wrong"
    TRUNCATED = "truncated"  # the last box is not closed
    TIMEOUT = "timeout"  # the grader ran out of time or memory: no verdict
    NO_ANSWER = "no_answer"  # no box and no "#### n"


@dataclass(frozen=True)
class Grade:
    """One graded response.

    Args:
        outcome: see ``Outcome``.
        answer: the text that was graded, None where there is none.
    """

    outcome: Outcome
    answer: str | None = None

    @property
    def correct(self) -> bool:
        """True when the answer equals the reference."""
        return self.outcome is Outcome.CORRECT


# -- cutting the answer out --------------------------------------------------------------------------------------------


def extracted(response: str) -> Grade | str:
    """The answer in a response: its last box, without any box the text after its last "####"; or what became of it."""
    answer, unclosed = last_box(response)
    if unclosed:
        return Grade(Outcome.TRUNCATED)
    if answer is None:
        answer = after_hashes(response)
    if answer is None or not answer.strip():
        return Grade(Outcome.NO_ANSWER)
    return answer.strip()


# -- comparing without a worker ----------------------------------------------------------------------------------------

_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")


def number(answer: str) -> Fraction | None:
    """The exact number that an answer says, unit and ``x =`` left aside; None for anything else.

    >>> number("042"), number(r"$1{,}000\\text{ cm}^2$"), number("x = -7."), number("1,2"), number("2x")
    (Fraction(42, 1), Fraction(1000, 1), Fraction(-7, 1), None, None)
    """
    try:
        return exact_value(answer) if len(answer) <= MAX_ANSWER_CHARS else None
    except RecursionError:  # brackets in brackets
        return None


def is_integer(reference: str) -> bool:
    """True when a reference is a whole number, as in AIME and GSM8K."""
    value = number(reference)
    return value is not None and value.denominator == 1


def quick_verdict(answer: str, reference: str) -> bool | None:
    """Equal or not where text and numbers decide it exactly; None where mathematics is needed."""
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(reference):
        return int(answer) == int(reference)
    try:
        return same(answer, reference, undecided)
    except (NeedsMathematics, RecursionError):
        return None


def quick_outcome(response: str, reference: str) -> Outcome | None:
    """What became of a response as far as text and numbers say it; None where mathematics is needed."""
    answer = extracted(response)
    if isinstance(answer, Grade):
        return answer.outcome
    verdict = quick_verdict(answer, reference)
    return None if verdict is None else Outcome.CORRECT if verdict else Outcome.WRONG


def vote(answer: str) -> str:
    """The name under which equal wrong answers are counted in a majority vote."""
    value = number(answer)
    if value is not None:  # in hexadecimal: of 9^{5000} Python writes no decimal digits
        return f"={value.numerator:x}/{value.denominator:x}"
    return canonical(answer[:MAX_ANSWER_CHARS])


def math_verify_available() -> bool:
    """True when the package math-verify is installed (extra ``eval``); it is imported in the workers only."""
    return importlib.util.find_spec("math_verify") is not None


# -- the grader --------------------------------------------------------------------------------------------------------


class Grader:
    """Grades responses; workers start when the first answer needs one, and end with ``close`` or this process.

    Args:
        num_workers: processes that run math-verify.
        seconds: processor time a comparison may take; six times as much wall time.
        memory_mib: address space of a worker, MiB.
        mathematics: False decides by numbers, shapes and text alone; what they do not decide is wrong.
    Raises:
        InputError: a value outside its range.
    """

    def __init__(
        self, num_workers: int = 2, seconds: float = 5.0, memory_mib: int = 1024, mathematics: bool = True
    ) -> None:
        require(_is_count(num_workers), "Grader.num_workers", "an integer >= 1", num_workers)
        require(0 < seconds < math.inf, "Grader.seconds", "a finite number > 0", seconds)
        require(_is_count(memory_mib), "Grader.memory_mib", "an integer >= 1", memory_mib)
        self.num_workers, self.seconds, self.memory_mib = num_workers, seconds, memory_mib
        self.mathematics = mathematics
        self._told_missing = False  # that math-verify is missing
        self._idle: SimpleQueue[_Worker] | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._workers: list[_Worker] = []

    def grade(self, responses: Sequence[str], references: Sequence[str], *, integers: bool = False) -> list[Grade]:
        """One grade a response, N of them, in order.

        Args:
            responses: N texts.
            references: N reference answers.
            integers: the references are whole numbers. Then math-verify may be missing: the few answers that need it, such as
                an unsimplified logarithm, are wrong without it, with one warning.
        Raises:
            InputError: a worker cannot start, for want of math-verify or of memory.
        """
        mathematics = self.mathematics and (not integers or math_verify_available())
        grades: list[Grade | None] = []
        open_pairs: list[tuple[int, str, str]] = []
        for row, (response, reference) in enumerate(zip(responses, references, strict=True)):
            answer = extracted(response)
            grades.append(answer if isinstance(answer, Grade) else None)
            if isinstance(answer, str):
                verdict = quick_verdict(answer, reference)
                if verdict is None and mathematics:
                    open_pairs.append((row, answer, reference))
                else:
                    if verdict is None:
                        self._tell_missing(answer, reference)
                    grades[row] = Grade(Outcome.CORRECT if verdict else Outcome.WRONG, answer[:MAX_ANSWER_CHARS])
        outcomes = self.compare([(answer, reference) for _, answer, reference in open_pairs])
        for (row, answer, _), outcome in zip(open_pairs, outcomes, strict=True):
            grades[row] = Grade(outcome, answer)
        return [grade for grade in grades if grade is not None]

    def _tell_missing(self, answer: str, reference: str) -> None:
        """Say once that answers count as wrong because nobody can compare them."""
        if self._told_missing or math_verify_available():
            return
        self._told_missing = True
        warnings.warn(
            f"math-verify is not installed: answers that only mathematics can compare, such as {answer[:60]!r} with "
            f"{reference[:60]!r}, count as wrong; pip install 'lit-opd[eval]'",
            stacklevel=3,
        )

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[Outcome]:
        """Verdicts of math-verify on (answer, reference) pairs, in order: correct, wrong or timeout.

        Raises:
            InputError: a worker cannot start.
        """
        if not pairs:
            return []
        if self._threads is None:
            self._start()
        assert self._threads is not None
        return list(self._threads.map(self._compare_one, pairs))

    def _start(self) -> None:
        self._threads = ThreadPoolExecutor(self.num_workers, thread_name_prefix="grader")
        self._idle = SimpleQueue()
        self._workers = [_Worker(self.seconds, self.memory_mib) for _ in range(self.num_workers)]
        for worker in self._workers:
            self._idle.put(worker)

    def _compare_one(self, pair: tuple[str, str]) -> Outcome:
        assert self._idle is not None
        worker = self._idle.get()
        try:
            for _ in range(ATTEMPTS):
                outcome = worker.ask(*pair)
                if outcome is not None:
                    return outcome
            return Outcome.TIMEOUT  # this pair kills every worker it meets
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the workers; a later call of ``grade`` starts new ones."""
        if self._threads is not None:
            self._threads.shutdown()
        for worker in self._workers:
            worker.stop()
        self._threads, self._idle, self._workers = None, None, []

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: processes stay with the process that started them."""
        return self.__dict__ | {"_threads": None, "_idle": None, "_workers": []}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class _Worker:
    """One process that answers one line a question."""

    def __init__(self, seconds: float, memory_mib: int) -> None:
        self.seconds, self.memory_mib = seconds, memory_mib
        self.process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def ask(self, answer: str, reference: str) -> Outcome | None:
        """The verdict; None when the process died."""
        if self.process is None or self.process.poll() is not None:
            self._launch()
        assert self.process is not None and self.process.stdin is not None
        question = json.dumps({"answer": answer, "reference": reference}).encode() + b"\n"
        try:
            self.process.stdin.write(question)
            self.process.stdin.flush()
            line = self._line(self.seconds * WALL_FACTOR)
        except BrokenPipeError:
            line = b""
        if line in (b"correct", b"wrong", b"timeout"):
            return Outcome(line.decode())
        self.stop()
        return Outcome.TIMEOUT if line is None else None

    def _launch(self) -> None:
        self.stop()
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(self.seconds), str(self.memory_mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        hello = self._line(START_SECONDS)
        if hello != b"ready":
            self.stop()
            raise InputError(
                f"`Grader.memory_mib` must let a worker start, got {self.memory_mib} "
                f"({(b'no answer in time' if hello is None else hello).decode() or 'it died'}); raise it, free memory, or see "
                f"what {sys.executable} -c 'import math_verify' says"
            )

    def _line(self, seconds: float) -> bytes | None:
        """The next line without its end; empty when the process is gone, None when it did not come in time."""
        assert self.process is not None and self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(seconds):
                    return None
                part = os.read(self.process.stdout.fileno(), 4096)
                if not part:
                    return b""
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def stop(self) -> None:
        """End the process."""
        process, self.process, self._buffer = self.process, None, b""
        if process is not None:
            process.kill()
            process.wait()
            _close(process.stdin)
            _close(process.stdout)


def _close(pipe: IO[bytes] | None) -> None:
    if pipe is not None:
        with suppress(OSError):
            pipe.close()
