"""The processes of the pool, seen from the runner, which does not import the stack: that would take it seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path

from benchmarks.studies.reproduce.plan import Asset, Job
from benchmarks.studies.reproduce.results import Record


class RunFailed(Exception):
    """A run or a build that ended with an error; the text is one line, the rest is in its log."""


def begin() -> None:
    """Leave Ctrl-C to the runner, end with it however it ends, one thread."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)  # else a killed runner leaves a process that goes on writing into the folder of the next one

    threading.Thread(target=end_with_parent, daemon=True).start()


def train(job: Job, root: Path) -> Record:
    """``worker.run_job``."""
    from benchmarks.studies.reproduce.worker import run_job

    return run_job(job, root)


def build(asset: Asset, root: Path) -> Record:
    """``worker.build``."""
    from benchmarks.studies.reproduce.worker import build

    return build(asset, root)
