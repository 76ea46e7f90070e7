"""What a task prints, in a file of its own."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TypeVar

from lit_opd.errors import Stopped, first_line
from lit_opd.sweep.crew import TaskFailed

T = TypeVar("T")


def logged(path: Path, work: Callable[[], T]) -> T:
    """``work()`` with everything it prints appended to a file; any way it fails becomes one line and a traceback there.

    Raises:
        TaskFailed: it failed.
    """
    start = path.stat().st_size if path.exists() else 0
    with output_to(path):
        try:
            return work()
        except Stopped as stop:
            reason = str(stop)
        except SystemExit:  # the command line has said what is wrong
            reason = ""
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {first_line(error)}"
    raise TaskFailed(reason or last_error(path.read_bytes()[start:].decode(errors="replace")))


def last_error(text: str) -> str:
    """What a command line said last: its line after "error:", which notes may follow; else the last line there is."""
    lines = [line for line in text.splitlines() if line.strip()] or ["no reason was given"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else lines[-1]


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Standard output and error of the process, below Python too, appended to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = [os.dup(stream) for stream in (1, 2)]
    with path.open("a", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            yield
        finally:
            for stream, kept in zip((1, 2), saved, strict=True):
                os.dup2(kept, stream)
                os.close(kept)
