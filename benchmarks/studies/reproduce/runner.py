"""Runs a list of jobs in parallel processes: goes on where it stopped, says what is happening, collects failures."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from benchmarks.studies.reproduce.plan import Job, folder_of, missing
from benchmarks.studies.reproduce.processes import begin, build, train
from benchmarks.studies.reproduce.results import Record, add_line, is_finished, mended, read_record
from lit_opd.errors import InputError


@dataclass
class Outcome:
    """How a call ended.

    Args:
        finished: runs of this call.
        kept: runs that were finished before.
        failed: run or asset -> (reason, log file).
        stopped: why not all were tried, empty where all were.
    """

    finished: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, tuple[str, Path]] = field(default_factory=dict)
    stopped: str = ""

    def show(self, console: Console) -> None:
        """The last lines on the screen."""
        for name, (reason, log) in self.failed.items():
            console.print(f"failed: {name}: {reason} ({log})", style="red", markup=False, soft_wrap=True)
        if self.stopped:
            console.print(f"stopped: {self.stopped}; the same command goes on", markup=False, soft_wrap=True)
        counts = f"{len(self.finished)} runs finished, {len(self.kept)} were finished before, {len(self.failed)} failed"
        console.print(counts, highlight=False, soft_wrap=True)


def run_jobs(
    jobs: Sequence[Job], root: Path, *, workers: int, rerun_changed: bool = False, console: Console | None = None
) -> Outcome:
    """Train what is not finished yet, ``workers`` runs at a time.

    Args:
        jobs: of one plan.
        root: folder of the runs; one call at a time works in it.
        workers: processes, one thread each.
        rerun_changed: train runs again that were finished under other settings; otherwise they are an error.
        console: where to write.
    Raises:
        InputError: finished runs of other settings, or another call at work.
    """
    console, root = console or Console(), root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        records = {job.name: read_record(root / job.name) for job in jobs}
        if not rerun_changed:
            require_unchanged(jobs, records)
        done = [job for job in jobs if is_finished(job, records[job.name])]
        complete_lines(root, [record for job in done if (record := records[job.name])])
        outcome = Outcome(kept=[job.name for job in done])
        todo = [job for job in jobs if job not in done]
        if todo:
            _Pool(root, workers, console, outcome).work(todo)
    outcome.show(console)
    return outcome


def require_unchanged(jobs: Sequence[Job], records: dict[str, Record | None]) -> None:
    """Refuse to train over runs that were finished under other settings."""
    changed = [job for job in jobs if (record := records[job.name]) and not is_finished(job, record)]
    if changed:
        plans = sorted({str(records[job.name]["plan"])[:12] for job in changed})  # type: ignore[index]
        raise InputError(
            f"`--runs` must hold runs of this plan, got {len(changed)} finished under other settings (plan "
            f"{', '.join(plans)}; {changed[0].name} is the first); name another folder, or give --rerun-changed to lose them"
        )


def complete_lines(root: Path, records: Sequence[Record]) -> None:
    """Mend what a kill left: a line cut short goes, finished runs without a line of their own get one."""
    known = mended(root)
    for record in records:
        if known.get(record["run"], {}).get("finished") != record["finished"]:
            add_line(root, record)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """One call at a time; the lock goes with the process, however it ends."""
    with (root / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"`--runs` must be free, got {root}, where another call is at work; wait for it"
            ) from error
        yield


class _Pool:
    """Builds assets, then trains runs, and keeps the books."""

    def __init__(self, root: Path, workers: int, console: Console, outcome: Outcome) -> None:
        self.root, self.workers, self.console, self.outcome = root, workers, console, outcome

    def work(self, jobs: Sequence[Job]) -> None:
        """All of it; on Ctrl-C the processes end at once and what they had begun is gone on with by the next call."""
        os.environ["OMP_NUM_THREADS"] = "1"
        context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=begin)
        try:
            self._build(pool, jobs)
            self._train(pool, jobs)
        except KeyboardInterrupt:
            self.outcome.stopped = "interrupted"
        except BrokenProcessPool:
            self.outcome.stopped = "a worker process died, out of memory perhaps"
        if self.outcome.stopped:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
        pool.shutdown(cancel_futures=True)

    def _build(self, pool: ProcessPoolExecutor, jobs: Sequence[Job]) -> None:
        assets = missing(jobs, self.root)
        futures = {pool.submit(build, asset, self.root): asset for asset in assets}
        for future in as_completed(futures):
            asset = futures[future]
            about = self._result(future, asset[0], self.root / "logs" / f"{folder_of(asset, self.root).name}.log")
            if about is not None:
                facts = ", ".join(f"{key} {about[key]}" for key in ("greedy", "steps", "train") if key in about)
                self.console.print(f"built {asset[0]}: {facts}", markup=False, highlight=False, soft_wrap=True)

    def _train(self, pool: ProcessPoolExecutor, jobs: Sequence[Job]) -> None:
        ready = [job for job in jobs if not missing([job], self.root)]
        if len(ready) < len(jobs):
            self.console.print(f"{len(jobs) - len(ready)} runs wait for what could not be built", style="red")
        futures = {pool.submit(train, job, self.root): job for job in ready}
        with shown(self.console, sum(job.steps for job in ready)) as advance:
            for future in as_completed(futures):
                job = futures[future]
                record = self._result(future, job.name, self.root / "logs" / f"{job.name}.log")
                if record is not None:
                    add_line(self.root, record)
                    self.outcome.finished.append(job.name)
                    advance(job.steps, f"{job.name}: {in_words(record)}")
                else:
                    advance(job.steps, f"{job.name}: failed")

    def _result(self, future: Future[Any], name: str, log: Path) -> Any:
        """What the worker returned, None where it failed; a dead worker ends it all."""
        try:
            return future.result()
        except BrokenProcessPool:
            raise
        except Exception as error:  # whatever ended one run, the others go on; it is shown at the end
            self.outcome.failed[name] = (str(error), log)
            return None


def in_words(record: Record) -> str:
    """End of a run in one line."""
    ends = [
        f"{name} {record['curves'][name][-1][1]:.3f}" for name in ("greedy", "reverse_kl") if record["curves"][name]
    ]
    return f"{', '.join(ends)} ({record['cpu_seconds']:.0f} CPU s, {record['wall_seconds']:.0f} s)"


@contextmanager
def shown(console: Console, total: int) -> Iterator[Callable[[int, str], None]]:
    """A bar with the time left on a terminal, and a line for each run anywhere.

    Args:
        console: where to write.
        total: optimizer steps of all runs.
    """
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}% {task.fields[left]}")
    began, done = time.monotonic(), 0
    with Progress(*columns, console=console, refresh_per_second=1, disable=not console.is_terminal) as bar:
        task = bar.add_task("runs", total=total, left="")

        def advance(steps: int, line: str) -> None:
            nonlocal done
            done += steps
            left = f"{(time.monotonic() - began) / done * (total - done) / 60:.0f} min left"
            bar.update(task, advance=steps, left=left)
            console.print(f"{done}/{total} steps, {left} | {line}", markup=False, highlight=False, soft_wrap=True)

        yield advance
