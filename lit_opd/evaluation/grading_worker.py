"""A worker of ``grading.Grader``: this file run as a script.

It is run by its path and imports ``lit_opd.answers`` alone, so that a worker holds no torch and starts in a second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

MIB = 1 << 20


def serve() -> None:
    """The worker's main function: one JSON question a line on standard input, one word a line on standard output."""
    seconds, memory_mib = float(sys.argv[1]), int(sys.argv[2])
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints must not be read as a verdict
    _limit_memory(memory_mib)
    try:
        verdict = _verifier()
    except Exception as error:  # the parent reports it
        replies.write(f"{type(error).__name__}: {error}\n".replace("\n", " ").encode() + b"\n")
        return
    replies.write(b"ready\n")
    fork = _Fork(verdict, seconds)
    for line in sys.stdin.buffer:
        reply = fork.ask(line) or fork.ask(line) or b"timeout\n"  # what crashes every fork has no verdict either
        replies.write(reply)


class _Fork:
    """A child process that answers until a question ends it.

    Args:
        verdict: compares answer and reference.
        seconds: processor time a question.
    """

    def __init__(self, verdict: Callable[[str, str], bool], seconds: float) -> None:
        self.verdict, self.seconds = verdict, seconds
        self._child: tuple[int, IO[bytes], IO[bytes]] | None = None

    def ask(self, line: bytes) -> bytes:
        """The reply to one question, a line; empty when the child was killed or crashed before its time was up."""
        self._child = self._child or self._made()
        number, questions, replies = self._child
        with suppress(BrokenPipeError):
            questions.write(line)
        reply = replies.readline()
        if reply:
            return reply
        self._child = None
        for pipe in (questions, replies):
            with suppress(OSError):
                pipe.close()
        status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        return b"timeout\n" if status == -signal.SIGPROF else b""

    def _made(self) -> tuple[int, IO[bytes], IO[bytes]]:
        ask_reader, ask_writer = os.pipe()
        reply_reader, reply_writer = os.pipe()
        number = os.fork()
        mine, theirs = (ask_writer, reply_reader), (ask_reader, reply_writer)
        for end in theirs if number else mine:
            os.close(end)
        if not number:
            self._answer(*theirs)
        return number, os.fdopen(ask_writer, "wb", buffering=0), os.fdopen(reply_reader, "rb")

    def _answer(self, questions: int, replies: int) -> None:
        """The child's life."""
        try:
            for line in os.fdopen(questions, "rb"):
                question = json.loads(line)
                # SIGPROF ends it, whoever holds the interpreter lock
                signal.setitimer(signal.ITIMER_PROF, self.seconds)
                reply = _reply(self.verdict, question["answer"], question["reference"])
                signal.setitimer(signal.ITIMER_PROF, 0)
                os.write(replies, reply + b"\n")
        finally:
            os._exit(0)


def _limit_memory(memory_mib: int) -> None:
    with suppress(ImportError, ValueError, OSError):  # no such limit on this system: time still bounds it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_mib * MIB, memory_mib * MIB))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _reply(verdict: Callable[[str, str], bool], answer: str, reference: str) -> bytes:
    try:
        return b"correct" if verdict(answer, reference) else b"wrong"
    except MemoryError:
        return b"timeout"
    except Exception:  # too deep, too strange: no answer to the problem
        return b"wrong"


def _verifier() -> Callable[[str, str], bool]:
    """The comparison of two answers, with mathematics to decide expressions."""
    import logging

    sys.path.append(
        str(Path(__file__).resolve().parents[2])
    )  # this project's folder; the script's own is not on the path
    from lit_opd.answers import same
    from lit_opd.answers.mathematics import equal

    logging.disable(logging.CRITICAL)

    def ask(answer: str, reference: str) -> bool:
        """Whether mathematics finds both equal; what cannot be parsed or solved equals nothing."""
        try:
            return equal(answer, reference)
        except MemoryError:
            raise
        except Exception:  # the parser and sympy raise many types
            return False

    def verdict(answer: str, reference: str) -> bool:
        return same(answer, reference, ask)

    verdict("\\sqrt{2}", "\\frac{1}{3}")  # what the first question builds, every fork then has
    return verdict


if __name__ == "__main__":
    serve()
