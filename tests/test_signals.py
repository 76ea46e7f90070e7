"""SIGTERM, Ctrl-C and SLURM's requeue signal, sent for real: what is saved, what is said, and that nothing is lost or doubled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import default_callbacks
from lit_opd.cli import main
from lit_opd.types import Stopped
from tests import tiny
from tests.test_resume import ROOT, TIME_LIMIT, assert_same_run, fit, no_pictures, write_config

__all__ = ["no_pictures"]
CHANGES: dict[str, Any] = {"trainer.max_steps": 4, "trainer.val_check_interval": 1, "model.mini_batches": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> tuple[Path, Path]:
    """A config of two batches of two updates, and the run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder, models, **CHANGES)
    return config, fit(config, folder / "run")


class Sends(Callback):
    """Sends this process a signal the ``count``-th time that ``hook`` is called."""

    def __init__(self, signum: int, hook: str, count: int) -> None:
        self.signum, self.left = signum, count
        setattr(self, hook, self._send)

    def _send(self, *args: Any) -> None:
        if args[0] == "evaluating":
            return
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.signum)


def stopped(config: Path, run: Path, sends: Callback, *words: str) -> SystemExit:
    with pytest.raises(SystemExit) as caught:
        main(lambda: [sends, *default_callbacks()], ["fit", "--config", str(config), "--run_dir", str(run), *words])
    return caught.value


# where the signal comes -> (hook, its number, optimizer step that is saved); mini-batches 2, batches end at steps 2 and 4
PLACES = {
    "validation at the start": ("on_validation_batch_start", 1, 0),
    "sampling of the first batch": ("on_train_batch_start", 1, 0),
    "first backward of the second batch": ("on_before_backward", 3, 2),
    "second backward of the first batch": ("on_before_backward", 2, 2),
    "validation at step 2": ("on_validation_batch_end", 2, 2),
    "an evaluation's end at step 2": ("on_validation_epoch_end", 2, 2),
}


SLOW = {"validation at the start", "first backward of the second batch", "an evaluation's end at step 2"}
CASES = [pytest.param(place, marks=pytest.mark.slow if place in SLOW else ()) for place in sorted(PLACES)]


@pytest.mark.parametrize("place", CASES)
def test_a_signal_stops_at_a_whole_state_and_nothing_is_lost(whole, tmp_path, capsys, place):
    config, undisturbed = whole
    hook, count, saved = PLACES[place]
    signum, status = (signal.SIGTERM, 0) if "batch" in place else (signal.SIGINT, 130)
    run, before = tmp_path / "run", signal.getsignal(signum)
    stop = stopped(config, run, Sends(signum, hook, count))
    assert isinstance(stop, Stopped) and stop.code == status
    assert signal.getsignal(signum) is before  # the handlers are those of before the run
    said = capsys.readouterr().err
    assert f"stopped by {signum.name}" in said
    assert said.rstrip().endswith(f"python train.py fit --config {run}/config.yaml --run_dir {run} --ckpt_path last")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == saved
    main(default_callbacks, said.rstrip().splitlines()[-1].split()[2:])
    assert_same_run(run, undisturbed)


# -- processes ---------------------------------------------------------------------------------------------------------


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


# Runs the command line with a callback that sends signals to its own process: argv[1] is Python for the list of callbacks.
PROGRAM = """
import os, signal, sys, time
import callbacks.profile_pictures
from callbacks import default_callbacks
from lit_opd.cli import main
from tests.test_signals import Impatient, Sends
callbacks.profile_pictures.draw_all = lambda *args, **options: {}
extra = eval(sys.argv[1])
sys.argv = ["train.py", *sys.argv[2:]]
main(lambda: [*extra, *default_callbacks()], sys.argv[1:])
"""


def program(callbacks: str, config: Path, run: Path, *words: str, **extra: str) -> subprocess.CompletedProcess:
    """A process of its own."""
    command = [sys.executable, "-c", PROGRAM, callbacks, "fit", "--config", str(config), "--run_dir", str(run), *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=TIME_LIMIT
    )


class Impatient(Callback):
    """Presses Ctrl-C in the middle of an update and again while the state is being saved, which would take a minute."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The first time."""
        os.kill(os.getpid(), signal.SIGINT)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """The second time; a repetition within a second is a launcher's."""
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)


def test_a_second_ctrl_c_exits_at_once(whole, tmp_path):
    began = time.monotonic()
    done = program("[Impatient()]", whole[0], tmp_path / "run", "--wandb.mode", "disabled")
    assert done.returncode == 130, done.stderr[-3000:]
    assert "stopping; the state is saved first" in done.stderr and time.monotonic() - began < 50
    assert not list((tmp_path / "run").glob("checkpoints/*.ckpt"))


SLURM = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
         "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS_PER_NODE": "1"}  # fmt: skip


def test_a_slurm_job_saves_is_queued_again_and_goes_on_without_another_option(whole, tmp_path, monkeypatch):
    """A real process, environment and scontrol program; the second start is the same command."""
    config, undisturbed = whole
    run, calls = tmp_path / "run", tmp_path / "calls"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    job = SLURM | {"PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    done = program("[Sends(signal.SIGUSR1, 'on_before_backward', 3)]", config, run, **job)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stopped by SIGUSR1" in done.stderr and "the job is queued again" in done.stderr
    assert calls.read_text() == "requeue 77\n"
    assert [path.name for path in run.glob("hpc*")] == ["hpc_ckpt_1.ckpt"]
    assert torch.load(run / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 2
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    fit(config, run)
    assert_same_run(run, undisturbed)
    assert not list(run.glob("hpc*"))  # numbered ones came after it


def test_a_folder_that_no_job_left_is_still_refused_under_slurm(whole, monkeypatch, capsys):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        fit(*whole)
    assert "--overwrite" in capsys.readouterr().err
