"""Processes that work through tasks: what one of them suffers is its own, and nothing of them is left."""

from __future__ import annotations

import functools
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lit_opd.errors import InputError, Stopped
from lit_opd.sweep.crew import Advanced, Crew, Ended, Task, TaskFailed
from lit_opd.sweep.logs import logged
from lit_opd.sweep.progress import Board, Outcome, locked, run_tasks, shown
from tests.sweep import parts


def task(folder: Path, name: str, call: Any, **more: Any) -> Task:
    return Task(name, more.pop("steps", 1), folder / f"{name}.log", call, **more)


def spending(folder: Path, name: str, **more: Any) -> Task:
    return task(folder, name, functools.partial(parts.spend, folder, name), **more)


def said(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / f"{name}.json").read_text()))


def gone(pid: int) -> bool:
    path = Path(f"/proc/{pid}/cmdline")
    return not path.exists() or not path.read_bytes()


def test_a_task_that_ends_its_process_takes_no_other_with_it(tmp_path):
    """Nor does one that fails, or that cannot be loaded; each ends once, and the reason is said."""
    wrong = {
        "status": (functools.partial(parts.exit_at_once, 7), "its process ended by itself with status 7"),
        "killed": (parts.be_killed, "its process was ended by SIGKILL, by the system for want of memory perhaps"),
        "failed": (parts.fail, "the lights went out"),
        "broken": (parts.break_down, "ZeroDivisionError: by nothing"),
        "unloadable": (parts.Unloadable(), "ImportError: no module named nothing"),
    }
    tasks = [spending(tmp_path, "a"), *(task(tmp_path, name, call) for name, (call, _) in wrong.items())]
    with Crew([{}, {}]) as crew:
        events = list(crew.work([*tasks, spending(tmp_path, "b")]))
    ended = [event for event in events if isinstance(event, Ended)]
    assert sorted(event.task.name for event in ended) == sorted(["a", "b", *wrong])
    assert {event.task.name: event.reason for event in ended if event.reason} == {n: r for n, (_, r) in wrong.items()}
    assert {event.task.name: event.value for event in ended if not event.reason} == {"a": "a done", "b": "b done"}
    assert {event.task.name for event in events if isinstance(event, Advanced) and event.steps == 1} == {"a", "b"}
    assert "ZeroDivisionError: by nothing" in (tmp_path / "broken.log").read_text()


def test_places_are_taken_one_task_at_a_time_by_processes_that_stay(tmp_path, monkeypatch):
    monkeypatch.delenv("PLACE", raising=False)
    names = [f"t{number}" for number in range(6)]
    with Crew([{"PLACE": "left"}, {"PLACE": "right"}], threads=1) as crew:
        events = list(crew.work([spending(tmp_path, name) for name in names]))
        again = list(crew.work([spending(tmp_path, "again")]))
    assert len([e for e in events if isinstance(e, Ended)]) == len(names) and isinstance(again[-1], Ended)
    found = [said(tmp_path, name) for name in [*names, "again"]]
    by_pid = {line["pid"]: [other for other in found if other["pid"] == line["pid"]] for line in found}
    assert len(by_pid) == 2 and os.getpid() not in by_pid  # the second call took one of the first call's
    for lines in by_pid.values():
        assert len({line["place"] for line in lines}) == 1
        assert all(a["ended"] <= b["began"] for a, b in zip(lines, lines[1:], strict=False))
    assert {line["place"] for line in found} == {"left", "right"} and {line["threads"] for line in found} == {"1"}
    assert all(line["session"] != os.getsid(0) for line in found)  # a terminal's Ctrl-C is the caller's business
    assert "PLACE" not in os.environ and all(map(gone, by_pid))


def test_a_task_that_wants_a_process_for_itself_has_one(tmp_path):
    with Crew([{}]) as crew:
        list(crew.work([spending(tmp_path, name, alone=name == "own") for name in ("a", "own", "b", "c")]))
    pids = {name: said(tmp_path, name)["pid"] for name in ("a", "own", "b", "c")}
    assert pids["b"] == pids["c"] and pids["own"] != pids["b"]


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("obeys", [True, False])
def test_an_interrupted_call_lets_tasks_save_and_then_ends_them(tmp_path, obeys, interruptible):
    """By Ctrl-C or SIGTERM; one that does not end by itself is killed when the time is over."""
    console, outcome = Console(file=io.StringIO()), Outcome()

    class Interrupting(Crew):
        def work(self, tasks: Any) -> Any:
            for event in super().work(tasks):
                yield event
                os.kill(os.getpid(), signal.SIGTERM if obeys else signal.SIGINT)

    waiting = functools.partial(parts.wait_for_a_signal, tmp_path, obeys)
    before = signal.getsignal(signal.SIGTERM)
    with Interrupting([{}], grace=30.0 if obeys else 0.3) as crew:
        tasks = [task(tmp_path, "waiting", waiting), spending(tmp_path, "next")]
        run_tasks(tasks, crew=crew, outcome=outcome, console=console, ended=lambda task, value: "")
    assert outcome.stopped == "interrupted" and outcome.status == 130 and not outcome.failed
    assert (tmp_path / parts.SAVED).exists() == obeys and gone(int((tmp_path / parts.READY).read_text()))
    assert not (tmp_path / "next.json").exists()
    assert signal.getsignal(signal.SIGTERM) == before


# -- logs and books ------------------------------------------------------------------------------------------------------


def test_a_log_has_what_was_printed_and_the_reason_is_of_this_call(tmp_path):
    path = tmp_path / "deep" / "run.log"

    def wrong() -> None:
        print("error: `a` must be b, got c")
        os.write(2, b"what to do\n")
        raise SystemExit(2)

    with pytest.raises(TaskFailed, match="^`a` must be b, got c$"):
        logged(path, wrong)
    assert logged(path, lambda: os.write(1, b"below Python\n")) == 13
    with pytest.raises(TaskFailed, match="^no reason was given$"):  # not that of the first call
        logged(path, lambda: (_ for _ in ()).throw(SystemExit(2)))
    with pytest.raises(TaskFailed, match="^stopped by SIGTERM$"):
        logged(path, lambda: (_ for _ in ()).throw(Stopped(signal.SIGTERM)))
    with pytest.raises(TaskFailed, match="^KeyError: 'k'$"):
        logged(path, lambda: {}["k"])
    text = path.read_text()
    assert "what to do\n" in text and "below Python\n" in text and "Traceback" in text


def test_one_call_at_a_time_works_in_a_folder(tmp_path):
    with locked(tmp_path, "--out"):
        with pytest.raises(InputError, match="`--out` must be free, got .*, where another call is at work"):
            with locked(tmp_path, "--out"):
                pass
    with locked(tmp_path):
        pass


def test_the_time_left_follows_the_pace_of_this_call(tmp_path, monkeypatch):
    """100 steps in 50 s; a run that fails early takes its other steps with it."""
    now = 0.0
    monkeypatch.setattr("lit_opd.sweep.progress.time.monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=80)
    tasks = [task(tmp_path, name, None, steps=100) for name in ("a", "b", "c")]
    with shown(console, tasks) as board:
        assert isinstance(board, Board) and board.left == ""
        now = 50.0
        board.end(tasks[0], "0.9")
        board.advance(tasks[1], 50)
        now = 75.0
        assert board.left == "75 s left"  # 150 steps at 2 a second
        board.end(tasks[1], "failed: no memory", failed=True)
        assert board.left == "50 s left"
        board.end(tasks[2], "0.8")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == ["1/3 runs, 100 s left | a: 0.9", "2/3 runs, 50 s left | b: failed: no memory", "3/3 runs | c: 0.8"]
