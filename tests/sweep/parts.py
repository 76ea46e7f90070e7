"""Tasks, callbacks and weightings that other processes import."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from lit_opd.sweep.crew import Report, TaskFailed

READY, SAVED = "ready", "saved"


def spend(folder: Path, name: str, report: Report) -> str:
    """Write when and by whom it was done."""
    began = time.monotonic()
    report(1)
    time.sleep(0.05)
    line = {"name": name, "pid": os.getpid(), "began": began, "ended": time.monotonic(), "session": os.getsid(0)}
    line |= {"threads": os.environ.get("OMP_NUM_THREADS"), "place": os.environ.get("PLACE")}
    (folder / f"{name}.json").write_text(json.dumps(line))
    return f"{name} done"


def fail(report: Report) -> None:
    raise TaskFailed("the lights went out")


def break_down(report: Report) -> None:
    raise ZeroDivisionError("by nothing")


def exit_at_once(status: int, report: Report) -> None:
    os._exit(status)


def be_killed(report: Report) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Unloadable:
    """What another process cannot load."""

    def __reduce__(self) -> Any:
        return _refuse, ()

    def __call__(self, report: Report) -> None:
        """Never called."""


def _refuse() -> None:
    raise ImportError("no module named nothing")


def wait_for_a_signal(folder: Path, obeys: bool, report: Report) -> None:
    """Say that it is at work; save when it is asked to end, or do not care."""

    def save(signum: int, frame: Any) -> None:
        (folder / SAVED).touch()
        raise TaskFailed("stopped")

    signal.signal(signal.SIGTERM, save if obeys else signal.SIG_IGN)
    (folder / READY).write_text(str(os.getpid()))
    report(1)
    while True:
        time.sleep(0.05)


# -- of runs -------------------------------------------------------------------------------------------------------------

CRASH = "crash"  # a file of this name in the working folder


def callbacks() -> list[Any]:
    """Those of every run, without pictures, and one that ends the process of a named run at its second step."""
    from lightning.pytorch import Callback

    from callbacks import ExportStudent, Progress, RngState, RunCheckpoint, StopOnSignal, Summary

    class Crash(Callback):
        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            path = Path(CRASH)
            if trainer.global_step == 1 and path.exists() and path.read_text() in trainer.default_root_dir:
                os._exit(7)

    return [Progress(), RngState(), ExportStudent(), Summary(), StopOnSignal(), RunCheckpoint(), Crash()]
