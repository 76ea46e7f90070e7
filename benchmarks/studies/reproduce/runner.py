"""Runs a list of jobs in parallel processes: goes on where it stopped, says what is happening, collects failures."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.studies.reproduce.plan import Asset, Job, folder_of, missing
from benchmarks.studies.reproduce.processes import build, train
from benchmarks.studies.reproduce.results import Record, add_line, is_finished, mended, read_record
from lit_opd.errors import InputError
from lit_opd.sweep.crew import Crew, Task
from lit_opd.sweep.progress import Outcome, locked, run_tasks


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
            with Crew([{}] * workers, threads=1) as crew:
                _build(todo, root, crew=crew, outcome=outcome, console=console)
                if not outcome.stopped:
                    _train(todo, root, crew=crew, outcome=outcome, console=console)
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


def _build(jobs: Sequence[Job], root: Path, *, crew: Crew, outcome: Outcome, console: Console) -> None:
    """What the jobs train on in place of what is shipped, where it is not there yet."""

    def built(task: Task, about: Any) -> str:
        return ", ".join(["built", *(f"{key} {about[key]}" for key in ("greedy", "steps", "train") if key in about)])

    tasks = [_building(asset, root) for asset in missing(jobs, root)]
    if tasks:
        run_tasks(tasks, crew=crew, outcome=outcome, console=console, ended=built)


def _building(asset: Asset, root: Path) -> Task:
    log = root / "logs" / f"{folder_of(asset, root).name}.log"
    return Task(asset[0], int(asset[1].get("num_steps", 1)), log, functools.partial(build, asset, root))


def _train(jobs: Sequence[Job], root: Path, *, crew: Crew, outcome: Outcome, console: Console) -> None:
    """The runs; on Ctrl-C they end at once, and what they had begun is gone on with by the next call."""
    ready = [job for job in jobs if not missing([job], root)]
    if len(ready) < len(jobs):
        console.print(f"{len(jobs) - len(ready)} runs wait for what could not be built", style="red")

    def ended(task: Task, record: Any) -> str:
        add_line(root, record)
        outcome.finished.append(task.name)
        return in_words(record)

    logs = root / "logs"
    tasks = [Task(job.name, job.steps, logs / f"{job.name}.log", functools.partial(train, job, root)) for job in ready]
    run_tasks(tasks, crew=crew, outcome=outcome, console=console, ended=ended)


def in_words(record: Record) -> str:
    """End of a run in one line."""
    ends = [
        f"{name} {record['curves'][name][-1][1]:.3f}" for name in ("greedy", "reverse_kl") if record["curves"][name]
    ]
    return f"{', '.join(ends)} ({record['cpu_seconds']:.0f} CPU s, {record['wall_seconds']:.0f} s)"
