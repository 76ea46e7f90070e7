"""A tool that runs Python code, for those who ask for it: nothing runs code unless a config names this class.

Each call is a process of its own without network, files, threads or other processes; see ``python_worker.py``. It is a fence
against what a model writes while it learns, made of what Linux offers to every user. Run untrusted models inside a container or a
virtual machine all the same.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from lit_opd.errors import InputError, require
from lit_opd.turns.python_worker import READY
from lit_opd.turns.tools import Tool, ToolError

WORKER = Path(__file__).with_name("python_worker.py")
START_SECONDS = 30.0  # of wall time, for a busy machine to start a process
END_SECONDS = 5.0  # the same to end one
WALL_FACTOR = 6  # seconds by the clock for each of processor time
_KILLED, _OUT_OF_TIME = 128 + signal.SIGKILL, 128 + signal.SIGXCPU  # exit statuses


class PythonTool(Tool):
    """Runs Python code and returns what it prints, and the value of its last line.

    Args:
        seconds: of processor time a call may take, and six times as many by the clock.
        memory_mib: of memory, with the interpreter's own.
        characters: of the output that are kept.
    Raises:
        InputError: a value outside its range.
    """

    name = "python"

    def __init__(self, seconds: int = 5, memory_mib: int = 256, characters: int = 2000) -> None:
        self.seconds, self.memory_mib, self.characters = seconds, memory_mib, characters
        for field, least in (("seconds", 1), ("memory_mib", 64), ("characters", 1)):
            value = getattr(self, field)
            require(
                isinstance(value, int) and value >= least, f"PythonTool.{field}", f"a whole number >= {least}", value
            )

    def check(self) -> None:
        """A first call works here.

        Raises:
            InputError: this system does not let a user fence a process in.
        """
        try:
            self.call("1 + 1")
        except RuntimeError as error:
            raise InputError(
                f"`PythonTool` must be able to fence code in, got {error}; it needs Linux with user namespaces and seccomp "
                "(a container may forbid them): leave the tool out, or run where they are allowed"
            ) from error

    def call(self, code: str) -> str:
        """What the code printed, cut after ``characters``."""
        with tempfile.TemporaryDirectory(prefix="python-tool-") as root:
            os.chmod(root, 0o555)  # nothing is made in it
            command = [
                sys.executable,
                "-I",
                "-B",
                str(WORKER),
                str(self.seconds),
                str(self.memory_mib),
                root,
                str(os.getpid()),
            ]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                env={"PYTHONIOENCODING": "utf-8"},
            )  # fmt: skip
            try:
                assert process.stdin is not None
                with suppress(BrokenPipeError):
                    process.stdin.write(code.encode("utf-8", "replace"))
                    process.stdin.close()
                output, cut = self._output(process)
            finally:
                said = self._end(process)
        if not output.startswith(READY):
            raise RuntimeError(cut or said or f"exit status {process.returncode}")
        if cut is not None:
            raise ToolError(cut)
        return output.removeprefix(READY).decode("utf-8", "replace")[: self.characters].rstrip("\n")

    def _output(self, process: subprocess.Popen[bytes]) -> tuple[bytes, str | None]:
        """What was printed, and why that is not all; None where it is, or as much as is kept."""
        assert process.stdout is not None
        found, most = b"", len(READY) + 4 * self.characters
        deadline = time.monotonic() + START_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while len(found) < most:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return found, f"no result within {WALL_FACTOR * self.seconds} s" if found else "no start in time"
                part = os.read(process.stdout.fileno(), 65536)
                if not part:
                    return found, self._ended(process.wait()) if found else None
                if not found:
                    deadline = time.monotonic() + WALL_FACTOR * self.seconds
                found += part
        return found, None

    def _ended(self, status: int) -> str | None:
        """Why the code's process ended before the code did; None where it did not."""
        if status in (_KILLED, _OUT_OF_TIME):
            return f"no result within {self.seconds} s of processor time"
        return None if status == 0 else f"the process ended with exit status {status}"

    def _end(self, process: subprocess.Popen[bytes]) -> str:
        """End it and the code's; the last line of what it said before it gave up."""
        process.terminate()  # it kills the code's process, which nobody else can reach for sure
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None and process.stderr is not None
        with process.stdout, process.stderr:
            lines = process.stderr.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""
