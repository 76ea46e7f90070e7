"""What an engine's processes print, passed on as it comes and kept, so that the reason of a failure can be told in one line.

vLLM's model runs in a child process. What goes wrong there is written to that process's standard output, and the exception that
reaches us says no more than that there is something to read.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

KEPT_BYTES = 256 * 1024  # of the newest output, for each of the two streams
_CHUNK = 65536
_WAIT = 2.0  # seconds for the last words of processes that ended

# "(EngineCore pid=83) ERROR 11-26 20:55:10 [core.py:1099] " and the parts of it that may be missing
_PREFIX = re.compile(
    r"(\([^)]*pid=\d+\) ?)?((?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\] ?)?"
)
_RAISED = re.compile(r"^(?P<kind>([A-Za-z_]\w*\.)*[A-Z]\w*(Error|Exception|Exit|Interrupt|Failure)): ?(?P<said>.*)$")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_INVALID = re.compile(r"\d+ validation errors? for ")  # the first line of pydantic's page
_POINTERS = ("root cause", "see stack trace", "enginecore encountered an issue")  # say: look elsewhere
_AFTERMATH = (
    "EngineDeadError",
    "KeyboardInterrupt",
    "SystemExit",
    "BrokenPipeError",
)  # what a death makes others raise
_LONGEST = 300  # characters

REMEDIES = (  # words of the reason, and what helps
    (
        ("no available memory for the cache", "larger than the available kv cache", "needed to serve at least one"),
        "raise `memory_fraction` (on a CPU VLLM_CPU_KVCACHE_SPACE), shorten prompts and responses, or set "
        "`engine_options: {enforce_eager: true}`; other processes on the device take their share",
    ),
    (
        ("free memory on device", "less than desired gpu memory", "less than requested memory"),
        "lower `memory_fraction` (on a CPU VLLM_CPU_KVCACHE_SPACE), or end other processes on the device",
    ),
    (
        ("out of memory",),
        "lower `memory_fraction`, set `engine_options: {enforce_eager: true}`, or end other processes on the device",
    ),
    (
        ("max_model_len", "max_position_embeddings", "maximum context"),
        "shorten prompts and responses, or set `engine_options: {max_model_len: ...}`",
    ),
    (("unexpected keyword argument",), "correct `engine_options`"),
    (
        ("support lora", "lora rank", "max_lora_rank", "target modules"),
        "set `weights: folder`, which merges the adapter",
    ),
)


def root_cause(text: str) -> str | None:
    """The exception that began a failure, in one line, from an engine's output; None where none is found.

    The first that is logged as an error: later ones are those of processes that waited for the first. Without any, the last
    that ends a plain traceback.
    """
    logged: list[str] = []
    plain: list[str] = []
    for line in _COLOUR.sub("", text).splitlines():
        prefix = _PREFIX.match(line)
        assert prefix is not None  # it may be empty
        raised = _RAISED.match(line[prefix.end() :].rstrip())
        if raised is None or raised["kind"].rpartition(".")[2] in _AFTERMATH or _points(raised["said"]):
            continue
        (logged if prefix["level"] in ("ERROR", "CRITICAL") else plain).append(_shortened(raised[0]))
    return logged[0] if logged else plain[-1] if plain else None


def reason(error: BaseException, output: str) -> str:
    """Why an engine failed, in one line: the exception's own words, or those of the output where it points there.

    Args:
        error: what vLLM raised.
        output: what its processes wrote meanwhile.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else type(error).__name__
    if _INVALID.match(said):
        said = " ".join(lines[1:3]).removeprefix("Value error, ")
    if lines and not _points(said) and type(error).__name__ not in _AFTERMATH:
        return _shortened(said)
    return root_cause(output) or _shortened(said)


def remedy(why: str) -> str | None:
    """What helps against a reason, None where nothing is known to."""
    lower = why.lower()
    return next((help for words, help in REMEDIES if any(word in lower for word in words)), None)


def _points(said: str) -> bool:
    """It only says where to look."""
    return any(pointer in said.lower() for pointer in _POINTERS)


def _shortened(said: str) -> str:
    said = " ".join(said.split())
    return said if len(said) <= _LONGEST else said[:_LONGEST] + "..."


class Output:
    """Standard output and error of this process and of those it starts while ``shared``, passed on and kept.

    A process started then writes through here for as long as it lives.
    """

    def __init__(self) -> None:
        self._streams: list[_Stream] = []

    @property
    def text(self) -> str:
        """The newest of it."""
        for stream in self._streams:
            stream.reader.join(_WAIT if stream.alone else 0)
        return "\n".join(bytes(stream.kept).decode(errors="replace") for stream in self._streams)

    def forget(self) -> None:
        """Begin anew, so that what was said before is not taken for the reason of what comes."""
        for stream in self._streams:
            stream.kept.clear()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Processes started inside write through here."""
        streams: list[_Stream] = []
        try:
            with contextlib.suppress(OSError):  # a process without these streams has nobody to show anything to
                for number in (1, 2):
                    streams.append(_Stream(number))
            self._streams = streams
            yield
        finally:
            for stream in streams:
                stream.restore()


class _Stream:
    """One file descriptor whose writers write into a pipe; a thread copies that to where it went before."""

    def __init__(self, number: int) -> None:
        _flush()
        self.number, self.kept, self.alone = number, bytearray(), False
        self.before = os.dup(number)
        read, write = os.pipe()
        os.dup2(write, number)
        os.close(write)
        self.reader = threading.Thread(target=self._copy, args=(read, os.dup(self.before)), daemon=True)
        self.reader.start()

    def restore(self) -> None:
        """This process writes where it wrote before."""
        _flush()
        os.dup2(self.before, self.number)
        os.close(self.before)
        self.alone = True

    def _copy(self, read: int, write: int) -> None:
        with open(read, "rb", buffering=0) as source, open(write, "wb", buffering=0) as there:
            while data := source.read(_CHUNK):
                self.kept += data
                del self.kept[:-KEPT_BYTES]
                with contextlib.suppress(OSError):  # nobody reads there any more
                    there.write(data)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError, AttributeError):  # closed, or none
            stream.flush()
