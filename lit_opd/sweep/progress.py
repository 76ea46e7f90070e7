"""How far a call is: one call at a time in a folder, what ended how, a bar with the time left, a line for each run."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lit_opd.errors import InputError
from lit_opd.sweep.crew import Advanced, Crew, Task

INTERRUPTED = "interrupted"
BAR = 24  # columns
MINUTE, HOUR = 60, 3600


@dataclass
class Outcome:
    """How a call ended.

    Args:
        finished: runs of this call.
        kept: runs that were finished before.
        failed: run, or what a run needs -> (reason, log file).
        stopped: why not all were tried, empty where all were.
    """

    finished: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, tuple[str, Path]] = field(default_factory=dict)
    stopped: str = ""

    @property
    def status(self) -> int:
        """Exit status of a command: 130 where it was interrupted, 1 where something failed, else 0."""
        return 130 if self.stopped == INTERRUPTED else int(bool(self.failed or self.stopped))

    def show(self, console: Console) -> None:
        """The last lines on the screen."""
        for name, (reason, log) in self.failed.items():
            console.print(f"failed: {name}: {reason} ({log})", style="red", markup=False, soft_wrap=True)
        if self.stopped:
            console.print(f"stopped: {self.stopped}; the same command goes on", markup=False, soft_wrap=True)
        counts = f"{len(self.finished)} runs finished, {len(self.kept)} were finished before, {len(self.failed)} failed"
        console.print(counts, highlight=False, soft_wrap=True)


@contextmanager
def locked(root: Path, option: str = "--runs") -> Iterator[None]:
    """One call at a time in a folder; the lock goes with the process, however it ends.

    Args:
        root: the folder.
        option: that names it, for the error.
    Raises:
        InputError: another call is at work there.
    """
    with (root / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"`{option}` must be free, got {root}, where another call is at work; wait for it"
            ) from error
        yield


def run_tasks(
    tasks: Sequence[Task], *, crew: Crew, outcome: Outcome, console: Console, ended: Callable[[Task, Any], str]
) -> None:
    """Do the tasks and show how far they are; failures go into ``outcome``, and on Ctrl-C all are stopped.

    Args:
        tasks: in their order.
        crew: the processes.
        outcome: of the call.
        console: where to write.
        ended: keeps the value of a task that ended well, and says it in a line.
    """
    try:
        with shown(console, tasks) as board:
            for event in crew.work(tasks):
                if isinstance(event, Advanced):
                    board.advance(event.task, event.steps)
                elif event.reason:
                    outcome.failed[event.task.name] = event.reason, event.task.log
                    board.end(event.task, f"failed: {event.reason}", failed=True)
                else:
                    board.end(event.task, ended(event.task, event.value))
    except KeyboardInterrupt:
        outcome.stopped = INTERRUPTED
        if crew.grace:
            console.print("stopping: the state of what runs is saved first (Ctrl-C again ends it at once)")
        crew.stop()


class Board:
    """Counts steps and tells the time that is left, by the pace of this call.

    Args:
        console: where to write.
        tasks: all of the call.
        bar: on a terminal, and the number of its task.
    """

    def __init__(self, console: Console, tasks: Sequence[Task], bar: Progress) -> None:
        self.console, self.bar, self.number = console, bar, len(tasks)
        self.open = {task.name: task.steps for task in tasks}  # steps that are not made yet
        self.steps = {task.name: 0 for task in tasks}  # steps that this call made
        self.ended, self.began = 0, time.monotonic()
        self.task = bar.add_task(self._counted(), total=sum(self.open.values()) or 1, left="")

    def _counted(self) -> str:
        return f"{self.ended}/{self.number} runs"

    @property
    def left(self) -> str:
        """Such as "3 min left"; empty before anything is done."""
        made = sum(self.steps.values())
        if not made:
            return ""
        return f"{duration((time.monotonic() - self.began) / made * sum(self.open.values()))} left"

    def advance(self, task: Task, steps: int) -> None:
        """``steps`` of the task are made."""
        self.steps[task.name], self.open[task.name] = steps, max(0, task.steps - steps)
        self._draw()

    def end(self, task: Task, line: str, *, failed: bool = False) -> None:
        """The task ended; the steps that a failed one did not make are no one's pace."""
        if not failed:
            self.steps[task.name] = task.steps
        self.open[task.name] = 0
        self.ended += 1
        self._draw()
        head = ", ".join(filter(None, [self._counted(), self.left if self.ended < self.number else ""]))
        self.console.print(f"{head} | {task.name}: {line}", markup=False, highlight=False, soft_wrap=True)

    def _draw(self) -> None:
        made, left = sum(self.steps.values()), sum(self.open.values())
        self.bar.update(self.task, completed=made, total=made + left or 1, description=self._counted(), left=self.left)


def duration(seconds: float) -> str:
    """
    >>> duration(42), duration(150), duration(5400)
    ('42 s', '2 min', '1.5 h')
    """
    if seconds < 2 * MINUTE:
        return f"{seconds:.0f} s"
    return f"{seconds / MINUTE:.0f} min" if seconds < HOUR else f"{seconds / HOUR:.1f} h"


@contextmanager
def shown(console: Console, tasks: Sequence[Task]) -> Iterator[Board]:
    """A bar with the time left on a terminal, and a line for each run anywhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(BAR),
        TextColumn("{task.percentage:>3.0f}% {task.fields[left]}"),
    )
    options: dict[str, Any] = {"refresh_per_second": 1, "transient": True, "disable": not console.is_terminal}
    with Progress(*columns, console=console, **options) as bar:
        yield Board(console, tasks, bar)
