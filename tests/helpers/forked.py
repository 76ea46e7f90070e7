"""Runs the command line in children that are forked from this process, and kills them where it is told.

A job: {"argv": [...], "callbacks": Python for a list, "env": {...}, "log": file, "kill": [phase, occurrence, delay]}. The answer
has exit status, phase at the kill, and optimizer step.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys
import time
import traceback
from typing import Any

import torch
from lightning.pytorch import Callback

from callbacks import default_callbacks
from lit_opd.cli.command import main
from lit_opd.run import checkpoint_files

PHASES = ("other", "sampling", "scoring", "backward", "evaluation", "checkpoint")
LAYOUT = "qqq"  # phase, how often a phase began, optimizer step
TIME_LIMIT = 120.0  # seconds a child may take


class Tells(Callback):
    """Writes the running phase into memory that the parent reads."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory, self.begun, self.step = memory, 0, 0
        publish = checkpoint_files._write

        def telling(*args: Any) -> Any:
            self.tell("checkpoint")
            return publish(*args)

        checkpoint_files._write = telling

    def tell(self, phase: str) -> None:
        """The phase begins."""
        self.begun += 1
        self.memory[: struct.calcsize(LAYOUT)] = struct.pack(LAYOUT, PHASES.index(phase), self.begun, self.step)

    def on_phase(self, name: str, done: int, total: int) -> None:
        """Sampling, scoring."""
        if name in PHASES:
            self.tell(name)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Backward."""
        self.step = trainer.global_step
        self.tell("backward")

    def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
        """Evaluation."""
        self.step = trainer.global_step
        self.tell("evaluation")

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        """Nothing special yet."""
        self.step = trainer.global_step
        self.tell("other")


def child(job: dict[str, Any], memory: mmap.mmap) -> None:
    """Run the command line; never returns."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.update(job.get("env", {}))
    torch.set_num_threads(1)
    sys.argv = ["train.py", *job["argv"]]
    status = 1
    try:
        extra = eval(job.get("callbacks", "[]"))  # a test's own text
        main(lambda: [Tells(memory), *extra, *default_callbacks()], job["argv"])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:  # the child never returns, so nothing else would print it
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def watched(pid: int, memory: mmap.mmap, kill: list[Any] | None) -> dict[str, Any]:
    """Wait for the child, or kill it ``delay`` seconds into the n-th occurrence of a phase."""
    seen, last, end = 0, 0, time.monotonic() + TIME_LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        phase, begun, step = struct.unpack(LAYOUT, memory[: struct.calcsize(LAYOUT)])
        if done:
            return {"status": os.waitstatus_to_exitcode(status), "phase": PHASES[phase], "step": step}
        if kill is not None and begun != last:
            last, seen = begun, seen + (PHASES[phase] == kill[0])
            if seen >= kill[1] and PHASES[phase] == kill[0]:
                time.sleep(kill[2])
                os.kill(pid, signal.SIGKILL)
                kill = None
        time.sleep(0.0001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return {"status": None, "phase": "hung", "step": -1}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One child."""
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    pid = os.fork()
    if pid == 0:
        child(job, memory)
    return watched(pid, memory, job.get("kill"))
