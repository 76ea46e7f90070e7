"""Trains what is not finished, in parallel processes, until the minutes are over; the next call goes on.

Importing this loads no torch: a process of the crew does.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.studies.healing.plan import Job
from benchmarks.studies.healing.records import Place, Record, is_finished, is_started, read, require_weights
from lit_opd.sweep.crew import Crew, Report, Task
from lit_opd.sweep.progress import INTERRUPTED, Outcome, locked, run_tasks

GRACE = 180.0  # seconds to save what runs when the study is stopped: two checkpoints of 3 GB at once, read back
OVER = "the minutes are over"
MINUTE = 60.0


class TimeLimit:
    """Raises ``KeyboardInterrupt``, as Ctrl-C does, once so many minutes have passed in its block.

    Args:
        minutes: None for no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self.minutes, self.over = minutes, False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The block."""
        if self.minutes is None:
            yield
            return
        former = signal.signal(signal.SIGALRM, self._end)
        signal.setitimer(signal.ITIMER_REAL, self.minutes * MINUTE)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, former)

    def _end(self, signum: int, frame: Any) -> None:
        self.over = True
        raise KeyboardInterrupt


def run_jobs(
    jobs: Sequence[Job], place: Place, *, workers: int, minutes: float | None = None, console: Console | None = None
) -> Outcome:
    """Train and measure what has no record yet.

    Args:
        jobs: of one device.
        place: where; one call at a time works in its folder of runs.
        workers: processes; 0 for this one, without a limit of time.
        minutes: what runs then is saved, which takes three minutes more at most; None for no limit.
        console: where to write.
    Raises:
        InputError: records of other settings, missing weights, or another call at work.
    """
    console = console or Console()
    place.runs.mkdir(parents=True, exist_ok=True)
    with locked(place.runs):
        done = [job for job in jobs if is_finished(job, place)]
        outcome = Outcome(kept=[job.name for job in done])
        todo = [job for job in jobs if job not in done]
        for model in dict.fromkeys(job.model for job in todo):
            before = [place.record(job) for job in done if job.model == model]
            require_weights(model, map(read, [*before, place.start(todo[0].device, model)]), place)
        limit = TimeLimit(minutes)
        tasks = [*_starts(todo, place), *(_task(job, place) for job in todo)]
        if tasks and workers:
            threads = min(int(job.settings["num_threads"]) for job in todo)
            crew = Crew([{"HF_HUB_OFFLINE": "1"}] * workers, threads=threads, grace=GRACE)
            _in_processes(tasks, crew, limit, outcome=outcome, console=console)
        for task in tasks if not workers else ():
            console.print(_ended(outcome, task, task.call(lambda steps: None)), markup=False)
    if limit.over:
        outcome.stopped = OVER
    outcome.show(console)
    return outcome


def _in_processes(tasks: Sequence[Task], crew: Crew, limit: TimeLimit, *, outcome: Outcome, console: Console) -> None:
    try:
        with limit(), crew:
            run_tasks(tasks, crew=crew, outcome=outcome, console=console, ended=functools.partial(_ended, outcome))
    except KeyboardInterrupt:  # between two instructions of the crew's own
        outcome.stopped = INTERRUPTED


def _ended(outcome: Outcome, task: Task, record: Any) -> str:
    outcome.finished.append(task.name)
    return in_words(record)


def _starts(jobs: Sequence[Job], place: Place) -> list[Task]:
    """What is measured before training, where that was not done."""
    wanted = dict.fromkeys((job.model, job.device) for job in jobs)
    return [_starting(model, device, place) for model, device in wanted if not is_started(model, device, place)]


def _starting(model: str, device: str, place: Place) -> Task:
    name = f"{model}-start"
    return Task(name, 1, _log(place, device, name), functools.partial(_start, model, device, place), alone=True)


def _task(job: Job, place: Place) -> Task:
    return Task(job.name, job.steps, _log(place, job.device, job.name), functools.partial(_run, job, place), alone=True)


def _log(place: Place, device: str, name: str) -> Path:
    return place.runs / "logs" / device / f"{name}.log"


def _start(model: str, device: str, place: Place, report: Report) -> Record:
    from benchmarks.studies.healing.worker import measure_start

    return measure_start(model, device, place, report)


def _run(job: Job, place: Place, report: Report) -> Record:
    from benchmarks.studies.healing.worker import run_job

    return run_job(job, place, report)


def in_words(record: Record) -> str:
    """A record in one line."""
    figures = record.get("end") or record["student"]
    means = {name: sum(figures[name]) / len(figures[name]) for name in ("reverse_kl", "teacher_text_nll", "exact")}
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in means.items())
