"""Calls of a user's code for many rows at once: in threads or as coroutines, each with a deadline and a failure of its own."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lit_opd.errors import first_line

Call = tuple[Any, ...]  # the arguments of one call


@dataclass(frozen=True)
class Failure:
    """Why a call has no result.

    Args:
        why: one line.
        timed_out: it took longer than it may.
    """

    why: str
    timed_out: bool = False


def failure(error: BaseException) -> Failure:
    """What a call raised."""
    return Failure(f"{type(error).__name__}: {first_line(error)}")


def run_all(function: Callable[..., Any], calls: Sequence[Call], *, timeout: float, workers: int) -> list[Any]:
    """The results of all calls in order, a ``Failure`` for each that raised or took too long; the others go on.

    A thread cannot be ended: what takes too long is left behind and its result ignored. Such threads do not keep the process
    alive.

    Args:
        function: plain, or a coroutine function.
        calls: the arguments of each call.
        timeout: seconds a call may take, from its own start.
        workers: calls at once; of coroutines too.
    """
    if not calls:
        return []
    if inspect.iscoroutinefunction(function):
        return _Loop(function, timeout, workers).run(calls)
    return _Threads(function, timeout, workers).run(calls)


class _Threads:
    def __init__(self, function: Callable[..., Any], timeout: float, workers: int) -> None:
        self.function, self.timeout, self.workers = function, timeout, workers
        self.changed = threading.Condition()
        self.waiting: deque[int] = deque()
        self.started: dict[int, float] = {}  # calls that run now
        self.results: dict[int, Any] = {}

    def run(self, calls: Sequence[Call]) -> list[Any]:
        self.waiting.extend(range(len(calls)))
        for _ in range(min(self.workers, len(calls))):
            self._hire(calls)
        with self.changed:
            while len(self.results) < len(calls):
                for _ in range(self._give_up()):
                    self._hire(calls)
                self.changed.wait(self._patience())
            return [self.results[number] for number in range(len(calls))]

    def _hire(self, calls: Sequence[Call]) -> None:
        threading.Thread(target=self._work, args=(calls,), name="environment", daemon=True).start()

    def _work(self, calls: Sequence[Call]) -> None:
        while True:
            with self.changed:
                if not self.waiting:
                    return
                number = self.waiting.popleft()
                self.started[number] = time.monotonic()
            try:
                result = self.function(*calls[number])
            except Exception as error:  # a user's code may raise anything
                result = failure(error)
            with self.changed:
                late = number in self.results
                if not late:
                    self.results[number] = result
                    del self.started[number]
                self.changed.notify()
            if late:
                return  # somebody else was hired meanwhile

    def _give_up(self) -> int:
        """Calls whose time is over have no result now; how many."""
        now = time.monotonic()
        late = [number for number, start in self.started.items() if now - start >= self.timeout]
        for number in late:
            del self.started[number]
            self.results[number] = _late(self.timeout)
        return len(late)

    def _patience(self) -> float:
        """Seconds until the next call's time is over."""
        first = min(self.started.values(), default=time.monotonic())
        return max(0.001, first + self.timeout - time.monotonic())


class _Loop:
    def __init__(self, function: Callable[..., Any], timeout: float, workers: int) -> None:
        self.function, self.timeout, self.workers = function, timeout, workers

    def run(self, calls: Sequence[Call]) -> list[Any]:
        """In a thread of its own: this one may have a loop already, as in a notebook."""
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.extend(asyncio.run(self._all(calls))), daemon=True)
        thread.start()
        thread.join()
        return found or [Failure("its event loop ended")] * len(calls)

    async def _all(self, calls: Sequence[Call]) -> list[Any]:
        places = asyncio.Semaphore(self.workers)
        return list(await asyncio.gather(*(self._one(call, places) for call in calls)))

    async def _one(self, call: Call, places: asyncio.Semaphore) -> Any:
        async with places:
            try:
                return await asyncio.wait_for(self.function(*call), self.timeout)
            except TimeoutError:
                return _late(self.timeout)
            except Exception as error:  # a user's code may raise anything
                return failure(error)


def _late(seconds: float) -> Failure:
    return Failure(f"no result within {seconds:g} s", timed_out=True)
