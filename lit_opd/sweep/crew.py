"""Processes that work through tasks, each one at a time. One that dies takes its own task with it and no other.

Importing this loads no torch: a process of the crew does, once, for all the runs that it trains.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lit_opd.errors import first_line

SPAWN = multiprocessing.get_context("spawn")
LOOK_EVERY = 1.0  # seconds: whether a process is still there, where something it started holds its pipe open
END_WITHIN = 10.0  # seconds for an idle process to end
Report = Callable[[int], None]  # told how many steps of the task are done


class TaskFailed(Exception):
    """A task that ended with an error; the text is one line, the rest is in its log."""


@dataclass(frozen=True)
class Task:
    """Something to do in another process.

    Args:
        name: unique among the tasks of a call.
        steps: how much it is beside others.
        log: where it writes.
        call: what to do, picklable; raises ``TaskFailed`` where it fails.
        alone: in a process of its own, which ends with it.
    """

    name: str
    steps: int
    log: Path
    call: Callable[[Report], Any]
    alone: bool = False


@dataclass(frozen=True)
class Advanced:
    """A task has made ``steps`` of its steps."""

    task: Task
    steps: int


@dataclass(frozen=True)
class Ended:
    """A task ended: with a value, or with the reason why it failed."""

    task: Task
    value: Any = None
    reason: str = ""


class Crew:
    """The processes, started when there is work for them, ended with the ``with`` block.

    SIGTERM counts as Ctrl-C while the block runs.

    Args:
        places: environment variables of each process, as many processes at most.
        threads: of torch and other libraries in each process; None leaves it to them.
        grace: seconds for tasks to end by themselves (SIGTERM) when the crew is stopped; 0 ends them at once.
    """

    def __init__(self, places: Sequence[Mapping[str, str]], *, threads: int | None = None, grace: float = 0.0) -> None:
        self.places, self.threads, self.grace = list(places), threads, grace
        self._workers: dict[int, _Worker] = {}  # by place
        self._former: Any = None

    def __enter__(self) -> Crew:
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGTERM, _interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers.values():
            worker.dismiss()
        for worker in self._workers.values():
            worker.end(END_WITHIN)
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)

    def work(self, tasks: Sequence[Task]) -> Iterator[Advanced | Ended]:
        """Do all tasks in their order; every ``Ended`` comes once."""
        waiting = deque(tasks)
        while waiting or any(worker.task for worker in self._workers.values()):
            self._hand_out(waiting)
            busy = {place: worker for place, worker in self._workers.items() if worker.task}
            ready = wait([part for worker in busy.values() for part in worker.heard_through()], timeout=LOOK_EVERY)
            for place, worker in busy.items():
                if any(part in ready for part in worker.heard_through()) or not worker.process.is_alive():
                    yield from self._heard(place, worker)

    def _hand_out(self, waiting: deque[Task]) -> None:
        for place, variables in enumerate(self.places):
            worker = self._workers.get(place)
            if not waiting or (worker is not None and worker.task):
                continue
            if worker is None:
                worker = self._workers[place] = _Worker(variables, self.threads)
            worker.give(waiting.popleft())

    def _heard(self, place: int, worker: _Worker) -> Iterator[Advanced | Ended]:
        task = worker.task
        assert task is not None
        event = worker.listen()
        if isinstance(event, Ended):
            worker.task = None
            if event.reason or task.alone:  # files of a failed task are no other's business
                worker.dismiss()
                worker.end(END_WITHIN)
                del self._workers[place]
        if event is not None:
            yield event

    def stop(self) -> None:
        """End the running tasks, which have ``grace`` seconds for it; an interrupt in the meantime ends them at once."""
        busy = [worker for worker in self._workers.values() if worker.task]
        deadline = time.monotonic() + self.grace
        with suppress(KeyboardInterrupt):
            for worker in busy if self.grace else ():
                worker.dismiss()  # it ends after the task
                worker.process.terminate()
            for worker in busy:
                worker.process.join(max(0.0, deadline - time.monotonic()))
        for worker in self._workers.values():
            worker.end(0.0)
        self._workers = {}


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


class _Worker:
    """One process, seen from the one that hands out."""

    def __init__(self, variables: Mapping[str, str], threads: int | None) -> None:
        self.task: Task | None = None
        self.pipe, far = SPAWN.Pipe()
        self.process = SPAWN.Process(target=_serve, args=(far,))
        given = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a terminal's Ctrl-C reaches new ones too
        try:
            with _environment({**variables, **given}):
                self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        far.close()

    def heard_through(self) -> list[Any]:
        """What becomes readable when there is news."""
        return [self.pipe, self.process.sentinel]

    def give(self, task: Task) -> None:
        """The next task."""
        self.task = task
        with suppress(BrokenPipeError):  # it is gone, which ``listen`` says
            self.pipe.send(task)

    def listen(self) -> Advanced | Ended | None:
        """The next news, None where there is none yet."""
        assert self.task is not None
        try:
            if self.pipe.poll():
                steps, value, reason = self.pipe.recv()
                return Advanced(self.task, steps) if steps is not None else Ended(self.task, value, reason)
        except (EOFError, OSError):
            self.process.join(END_WITHIN)
        if self.process.is_alive():
            return None
        return Ended(self.task, reason=_of_status(self.process.exitcode))

    def dismiss(self) -> None:
        """No further task."""
        with suppress(OSError):
            self.pipe.send(None)

    def end(self, seconds: float) -> None:
        """Wait for its end, and end it."""
        if seconds:
            self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables of a process that is started inside: libraries read them when they are loaded, which may be at once."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _of_status(status: int | None) -> str:
    """Why a process is gone."""
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        memory = ", by the system for want of memory perhaps" if -status == signal.SIGKILL else ""
        return f"its process was ended by {name}{memory}"
    return f"its process ended by itself with status {status}"


# -- in the process ------------------------------------------------------------------------------------------------------


def _serve(pipe: Connection) -> None:
    """Do what comes until nothing more comes."""
    _begin()
    with suppress(EOFError):
        while (task := _received(pipe)) is not None:
            if isinstance(task, str):
                pipe.send((None, None, task))
            else:
                pipe.send(_done(task, lambda steps: pipe.send((steps, None, ""))))


def _received(pipe: Connection) -> Task | str | None:
    """The next task; why it cannot be loaded, where that fails."""
    try:
        return pipe.recv()  # type: ignore[no-any-return]
    except EOFError:
        return None
    except Exception as error:  # of whatever the task's function imports
        return f"{type(error).__name__}: {first_line(error)}"


def _begin() -> None:
    """Leave Ctrl-C to the caller, and end with it however it ends."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)  # else a killed caller leaves a process that goes on writing into the folder of the next one

    threading.Thread(target=end_with_parent, daemon=True).start()


def _done(task: Task, report: Report) -> tuple[None, Any, str]:
    """(no steps, value, reason) of a task."""
    try:
        return None, task.call(report), ""
    except TaskFailed as error:
        return None, None, str(error) or type(error).__name__
    except Exception as error:  # whatever ended one task, the others go on
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with task.log.open("a") as file:
            traceback.print_exc(file=file)
        return None, None, f"{type(error).__name__}: {first_line(error)}"
