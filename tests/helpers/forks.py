"""Two ranks of a helper as torchrun starts them, but forked from this process: what it has imported is imported once.

Importing the stack takes longer than most of what the ranks do. tests/step/test_stopped_rank.py starts ranks in processes of
their own, and by torchrun and Lightning themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")
GRACE = 30.0  # seconds for the other rank after one has failed
SHOWN = 4000  # characters of a log's end


def run(module: str, *words: str, logs: Path, timeout: float, cwd: Path = ROOT) -> list[int | None]:
    """Exit status of each rank of ``python -m module *words``; what they print goes to ``logs``/log-0 and log-1.

    Both are ended after ``timeout`` seconds, or ``GRACE`` seconds after one of them has failed.
    """
    ranks = [FORK.Process(target=_rank, args=(module, words, own, logs, cwd)) for own in _environments()]
    for rank in ranks:
        rank.start()
    left, end = {rank.sentinel: rank for rank in ranks}, time.monotonic() + timeout
    while left and (seconds := end - time.monotonic()) > 0:
        for ended in wait(list(left), timeout=seconds):
            if left.pop(ended).exitcode:  # type: ignore[call-overload]
                end = min(end, time.monotonic() + GRACE)
    for rank in left.values():
        rank.kill()
    for rank in ranks:
        rank.join()
    return [rank.exitcode for rank in ranks]


def succeed(module: str, *words: str, logs: Path, timeout: float, cwd: Path = ROOT) -> None:
    """``run``; an error with the ends of both logs where a rank failed."""
    statuses = run(module, *words, logs=logs, timeout=timeout, cwd=cwd)
    assert statuses == [0, 0], (statuses, said(logs))


def said(logs: Path) -> str:
    """The ends of both logs."""
    return "\n".join((logs / f"log-{rank}").read_text()[-SHOWN:] for rank in (0, 1))


def _environments() -> list[dict[str, str]]:
    """What torchrun tells each rank, on a free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]


def _rank(module: str, words: tuple[str, ...], environment: Mapping[str, str], logs: Path, cwd: Path) -> None:
    """In the forked process: nothing of the test around it but what is imported."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    os.environ.update(environment)
    rank_zero_only.rank = int(environment["RANK"])  # Lightning reads it from the environment when it is imported
    os.chdir(cwd)
    log = os.open(logs / f"log-{environment['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1), os.dup2(log, 2)
    with_own_streams(_as_main, module, words)


def _as_main(module: str, words: tuple[str, ...]) -> None:
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def with_own_streams(target: Callable[..., Any], *given: Any) -> None:
    """Call it with streams that write to the process's files 1 and 2, not to what pytest captures."""
    streams = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.stdout, sys.stderr = streams
    target(*given)


class Forked:
    """In the place of ``multiprocessing``'s spawn context, where what a process imports is not what is tested."""

    @staticmethod
    def Pipe() -> Any:
        """As there."""
        return FORK.Pipe()

    @staticmethod
    def Process(*, target: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """As there."""
        return FORK.Process(target=with_own_streams, args=(target, *args))
