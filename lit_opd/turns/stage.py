"""Calls of a user's code for many rows at once: in threads or as coroutines, each with a deadline and a failure of its own."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lit_opd.errors import InputError, first_line

Call = tuple[Any, ...]  # the arguments of one call
MOST_LEFT = 500  # threads whose result nobody waits for and that still run
_GRACE = 1.0  # seconds beyond the deadline for a coroutine that is being cancelled
_left: list[threading.Thread] = []


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
    alive. Coroutines of all calls of the process share one event loop, so what they open in it, such as connections, stays
    usable; one that blocks it fails, with those that wait for it, and a new loop takes its place.

    Args:
        function: plain, or a coroutine function.
        calls: the arguments of each call.
        timeout: seconds a call may take, from its own start.
        workers: calls at once; of coroutines too.
    Raises:
        InputError: more than ``MOST_LEFT`` threads were left behind and still run.
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
        self.started: dict[int, tuple[float, threading.Thread]] = {}  # calls that run now
        self.results: dict[int, Any] = {}

    def run(self, calls: Sequence[Call]) -> list[Any]:
        """Results in the order of ``calls``."""
        _require_few_left(self.timeout)
        self.waiting.extend(range(len(calls)))
        for _ in range(min(self.workers, len(calls))):
            self._hire(calls)
        try:
            with self.changed:
                while len(self.results) < len(calls):
                    for _ in range(self._give_up()):
                        self._hire(calls)
                    self.changed.wait(self._patience())
                return [self.results[number] for number in range(len(calls))]
        finally:  # an interruption: what has not begun does not begin
            self.waiting.clear()

    def _hire(self, calls: Sequence[Call]) -> None:
        threading.Thread(target=self._work, args=(calls,), name="environment", daemon=True).start()

    def _work(self, calls: Sequence[Call]) -> None:
        while True:
            with self.changed:
                if not self.waiting:
                    return
                number = self.waiting.popleft()
                self.started[number] = time.monotonic(), threading.current_thread()
            try:
                result = self.function(*calls[number])
            except (Exception, SystemExit) as error:  # a user's code may raise anything
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
        late = [number for number, (start, _) in self.started.items() if now - start >= self.timeout]
        for number in late:
            _left.append(self.started.pop(number)[1])
            self.results[number] = _late(self.timeout)
        return len(late)

    def _patience(self) -> float:
        """Seconds until the next call's time is over."""
        first = min((start for start, _ in self.started.values()), default=time.monotonic())
        return max(0.001, first + self.timeout - time.monotonic())


def _require_few_left(timeout: float) -> None:
    """Threads without end would use up memory over a long run."""
    _left[:] = [thread for thread in _left if thread.is_alive()]
    if len(_left) > MOST_LEFT:
        raise InputError(
            f"the environment must return, or raise, some time: {len(_left)} calls that took longer than `timeout` "
            f"{timeout:g} s still run; give what it waits for a time-out of its own, then go on from the last checkpoint"
        )


class _Loop:
    def __init__(self, function: Callable[..., Any], timeout: float, workers: int) -> None:
        self.function, self.timeout, self.workers = function, timeout, workers
        self.results: dict[int, Any] = {}
        self.given_up = False

    def run(self, calls: Sequence[Call]) -> list[Any]:
        """In a thread of its own: this one may have a loop already, as in a notebook."""
        future = asyncio.run_coroutine_threadsafe(self._all(calls), _event_loop(os.getpid()))
        try:
            while not future.done():
                before = len(self.results)
                try:
                    future.result(self.timeout + _GRACE)
                except TimeoutError:
                    # each call that runs has ended by now, unless one holds all others up
                    if len(self.results) == before:
                        self.given_up = True
                        _event_loop.cache_clear()
                        break
        finally:
            if not self.given_up:  # else the loop stops once they have ended
                future.cancel()  # of no effect once it has ended
        return [self.results.get(number, _late(self.timeout)) for number in range(len(calls))]

    async def _all(self, calls: Sequence[Call]) -> None:
        places = asyncio.Semaphore(self.workers)
        await asyncio.gather(*(self._one(number, call, places) for number, call in enumerate(calls)))
        if self.given_up:
            asyncio.get_running_loop().stop()

    async def _one(self, number: int, call: Call, places: asyncio.Semaphore) -> None:
        async with places:
            try:
                result = await asyncio.wait_for(self._called(call), self.timeout)
            except TimeoutError:
                result = _late(self.timeout)
            self.results[number] = result

    async def _called(self, call: Call) -> Any:
        try:
            return await self.function(*call)
        except asyncio.CancelledError as error:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise  # by us: its time is over, or nobody waits for it
            return failure(error)  # by the user's own code
        except (Exception, SystemExit) as error:  # a user's code may raise anything
            return failure(error)


@lru_cache(maxsize=1)
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """Runs in a thread of its own; a forked process has none of its parent's threads, hence the number."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="environment", daemon=True).start()
    return loop


def _late(seconds: float) -> Failure:
    return Failure(f"no result within {seconds:g} s", timed_out=True)
