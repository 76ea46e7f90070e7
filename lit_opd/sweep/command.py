"""``lit-opd sweep``: checks every run, trains what is not finished, compares what is."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lit_opd.errors import InputError, first_line
from lit_opd.sweep.options import Asked, read

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from rich.console import Console

    from lit_opd.sweep.checks import Checked, SweepRun
    from lit_opd.sweep.crew import Task
    from lit_opd.sweep.progress import Outcome

FEW_SEEDS = 3  # below them an interval says little
GRACE = 120.0  # seconds to save what runs when the sweep is stopped
INTERRUPTED = 130


def run(words: Sequence[str], callbacks: Callable[[], list[Callback]]) -> int:
    """Do what the words ask for; the exit status.

    Args:
        words: after ``sweep`` on the command line.
        callbacks: of every run; a function that other processes can import.
    Raises:
        InputError: wrong input, of any of the runs; nothing is trained.
    """
    asked = read(words)
    try:
        return _run(asked, callbacks)
    except KeyboardInterrupt:
        print("stopped: interrupted before anything was trained", file=sys.stderr)
        return INTERRUPTED


def _run(asked: Asked, callbacks: Callable[[], list[Callback]]) -> int:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a weighting in the user's own file
    from rich.console import Console

    console = Console()
    console.print("checking the runs ...", highlight=False)
    import torch

    from lit_opd.sweep.checks import check, places
    from lit_opd.sweep.progress import locked
    from lit_opd.sweep.record import known_runs, write_record

    threads = torch.get_num_threads()  # before a config sets them
    known = known_runs(asked.out)
    checked = check(asked, callbacks, known)
    names = list(dict.fromkeys(run.variant.name for run in checked.runs))
    baseline = asked.baseline or names[0]
    if baseline not in names:
        raise InputError(f"`--baseline` must be one of the variants {', '.join(names)}, got {baseline!r}")
    environment = places(asked.jobs, checked.devices)
    _announce(asked, checked, console)
    if asked.dry_run:
        _list(checked.runs, console)
        return 0
    _make(asked)
    with locked(asked.out, "--out"):
        write_record(asked, checked, baseline=baseline, known=known)
        outcome = _train(asked, checked, callbacks, console, environment, _threads(asked, checked, threads))
        return _end(asked, checked.runs, outcome, console, baseline)


def _make(asked: Asked) -> None:
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"`--out` must be a folder that can be written, got {asked.out}: {error.strerror}") from error


# -- what is said before -------------------------------------------------------------------------------------------------


def _announce(asked: Asked, checked: Checked, console: Console) -> None:
    """How many runs, and what to know before they start."""
    said = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    for text in checked.warned:
        said(f"warning: {text}")
    if len(asked.seeds) < FEW_SEEDS:
        many = "1 seed gives" if len(asked.seeds) == 1 else f"{len(asked.seeds)} seeds give"
        none = "no interval" if len(asked.seeds) == 1 else "very wide intervals"
        said(f"warning: {many} {none}; more can be added later with the same command")
    number, count = len(checked.runs), len({run.variant.name for run in checked.runs})
    seeds = len(asked.seeds)
    parts = [f"{_many(number, 'run')} ({_many(count, 'variant')} x {_many(seeds, 'seed')})"]
    if checked.steps > 0:
        parts.append(f"{checked.steps} steps each")
    parts += [f"{min(asked.jobs, number)} at a time", f"in {asked.out}"]
    said(", ".join(parts))


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _list(runs: Sequence[SweepRun], console: Console) -> None:
    for run in runs:
        state = f"goes on from step {run.step}" if run.step else run.state
        console.print(f"  {run.name}: {state}", markup=False, highlight=False, soft_wrap=True)


# -- training ------------------------------------------------------------------------------------------------------------


def _threads(asked: Asked, checked: Checked, threads: int) -> int | None:
    """Of each process: what this one may use, divided; None where the command line says it."""
    if any(word.partition("=")[0] == "--num_threads" for word in asked.overrides):
        return None
    share = max(1, threads // asked.jobs)
    return share if checked.threads is None else min(checked.threads, share)


def _train(
    asked: Asked,
    checked: Checked,
    callbacks: Callable[[], list[Callback]],
    console: Console,
    environment: list[dict[str, str]],
    threads: int | None,
) -> Outcome:
    from lit_opd.sweep.checks import FINISHED
    from lit_opd.sweep.crew import Crew
    from lit_opd.sweep.progress import Outcome, run_tasks

    todo = [run for run in checked.runs if run.state != FINISHED]
    outcome = Outcome(kept=[run.name for run in checked.runs if run.state == FINISHED])

    def ended(task: Task, summary: dict[str, Any]) -> str:
        outcome.finished.append(task.name)
        return _in_words(summary)

    tasks = [_task(run, asked, checked, callbacks, threads) for run in todo]
    with Crew(environment, threads=threads, grace=GRACE) as crew:
        run_tasks(tasks, crew=crew, outcome=outcome, console=console, ended=ended)
    return outcome


def _task(
    run: SweepRun, asked: Asked, checked: Checked, callbacks: Callable[[], list[Callback]], threads: int | None
) -> Task:
    from lit_opd.sweep.crew import Task

    words = run.words(asked)
    if threads is not None:
        words += ["--num_threads", str(threads)]
    call = functools.partial(_in_process, tuple(words), run.folder, run.log, callbacks)
    steps = checked.steps - run.step if checked.steps > 0 else 1
    return Task(run.name, max(1, steps), run.log, call, alone=checked.alone)


def _in_process(*given: Any) -> dict[str, Any]:
    """``train``; it is loaded where it is needed."""
    from lit_opd.sweep.train import train

    return train(*given)


def _in_words(summary: dict[str, Any]) -> str:
    """End of a run, in half a line."""
    named = {"greedy_end": "greedy", "reverse_kl_end": "KL"}
    ends = [f"{name} {summary[key]:.3f}" for key, name in named.items() if summary.get(key) is not None]
    return ", ".join(ends) or f"{summary['seconds']:.0f} s"


# -- the end -------------------------------------------------------------------------------------------------------------


def _end(asked: Asked, runs: Sequence[SweepRun], outcome: Outcome, console: Console, baseline: str) -> int:
    """The comparison of what is finished, then what is not."""
    from lit_opd.sweep.ending import compare

    finished = [run for run in runs if run.name in {*outcome.finished, *outcome.kept}]
    status = outcome.status
    if not outcome.stopped:
        if any(run.variant.name == baseline for run in finished):
            try:
                print("\n" + compare(finished, asked.out, baseline))
            except InputError as error:
                print(f"error: the runs cannot be compared: {first_line(error)}", file=sys.stderr)
                status = status or 1
        else:
            print(f"no run of {baseline} is finished, so nothing is compared", file=sys.stderr)
    outcome.show(console)
    return status
