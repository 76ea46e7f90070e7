"""SIGTERM, Ctrl-C and SLURM's requeue signal, sent for real: what is saved, what is said, and that nothing is lost or doubled."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from callbacks import default_callbacks
from lit_opd.cli.command import main
from lit_opd.errors import Stopped
from lit_opd.run.checkpoint_files import numbered, problem
from tests.helpers import forked, tiny
from tests.run.test_resume import assert_same_files, assert_same_run, fit, write_config

CHANGES: dict[str, Any] = {"trainer.max_steps": 6, "trainer.val_check_interval": 2, "model.mini_batches": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> tuple[Path, Path]:
    """A config of three batches of two updates, a validation after the second, checkpoints at stops only; and its whole run."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder, models, every=99, **CHANGES)
    return config, fit(config, folder / "run")


class Sends(Callback):
    """Sends this process a signal the ``count``-th time that ``hook`` is called."""

    def __init__(self, signum: int, hook: str, count: int) -> None:
        self.signum, self.left = signum, count
        setattr(self, hook, self._send)

    def _send(self, *args: Any, **options: Any) -> None:
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
    "validation batch at step 4": ("on_validation_batch_start", 2, 4),
    "an evaluation's end at step 4": ("on_validation_epoch_end", 2, 4),
}


SLOW = {"validation at the start", "sampling of the first batch", "an evaluation's end at step 4"}
SLOW |= {"second backward of the first batch"}
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


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_models_load_ends_at_once_and_leaves_nothing(whole, tmp_path, capsys, signum):
    """The hook comes after this project's own and before the weights."""
    run, before = tmp_path / "run", signal.getsignal(signum)
    with pytest.raises(Stopped) as stop:
        main(lambda: [*default_callbacks(), Sends(signum, "setup", 1)],
             ["fit", "--config", str(whole[0]), "--run_dir", str(run)])  # fmt: skip
    assert stop.value.code == {signal.SIGTERM: 0, signal.SIGINT: 130}[signum]
    assert signal.getsignal(signum) is before
    said = capsys.readouterr().err
    assert f"stopped by {signum.name}" in said and said.rstrip().endswith("start again with the same command")
    assert not run.exists()


class Told(Callback):
    """Lets Lightning's own handler, which is there for a moment before the training, note a SIGTERM."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """As that handler does."""
        trainer._signal_connector.received_sigterm = True


def test_a_sigterm_that_lightning_took_before_the_training_stops_with_the_state_saved(whole, tmp_path, capsys):
    stop = stopped(whole[0], tmp_path / "run", Told())
    assert isinstance(stop, Stopped) and stop.code == 0
    assert "--ckpt_path last" in capsys.readouterr().err
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 0


# -- processes ---------------------------------------------------------------------------------------------------------


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


SLURM = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
         "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS_PER_NODE": "1"}  # fmt: skip
PHASES = ("sampling", "scoring", "backward", "evaluation", "checkpoint")


def with_checkpoints(config: Path, **options: int) -> list[dict[str, Any]]:
    """The config's callbacks with other options of ``RunCheckpoint``."""
    callbacks = yaml.safe_load(config.read_text())["trainer"]["callbacks"]
    return [{"class_path": "callbacks.RunCheckpoint", "init_args": options}, *callbacks[1:]]


def job(config: Path, run: Path, *words: str, **options: Any) -> dict[str, Any]:
    return {"argv": ["fit", "--config", str(config), "--run_dir", str(run), *words], "log": f"{run}.log", **options}


IMPORTED = "__import__('tests.callbacks.test_signals').callbacks.test_signals"


@pytest.fixture(scope="module")
def processes(whole, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """A SLURM job, and a run that is killed in the second writing of a checkpoint and goes on."""
    config, folder = whole[0], tmp_path_factory.mktemp("processes")
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n')
    scontrol.chmod(0o755)
    slurm = SLURM | {"PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    often = ["--trainer.callbacks", json.dumps(with_checkpoints(config, every=2))]
    jobs = [
        job(config, folder / "slurm", callbacks=f"[{IMPORTED}.Sends(10, 'on_before_backward', 3)]", env=slurm),
        job(config, folder / "killed", *often, kill=["checkpoint", 2, 0.0]),
        job(config, folder / "killed", *often, "--ckpt_path", "last"),
    ]
    return folder, [forked.run(asked) for asked in jobs]


@pytest.mark.slow
def test_a_second_ctrl_c_exits_at_once(whole, tmp_path):
    report = forked.run(job(whole[0], tmp_path / "impatient", callbacks=f"[{IMPORTED}.Impatient()]"))
    assert report["status"] == 130
    assert "stopping; the state is saved first" in (tmp_path / "impatient.log").read_text()
    assert not list((tmp_path / "impatient").glob("checkpoints/*.ckpt"))


def test_a_slurm_job_saves_is_queued_again_and_goes_on_without_another_option(whole, processes, monkeypatch):
    """A real process, environment and scontrol program; the second start is the same command."""
    config, undisturbed = whole
    folder, reports = processes
    said, run = (folder / "slurm.log").read_text(), folder / "slurm"
    assert reports[0]["status"] == 0, said[-3000:]
    assert "stopped by SIGUSR1" in said and "the job is queued again" in said
    assert (folder / "calls").read_text() == "requeue 77\n"
    assert [path.name for path in run.glob("hpc*")] == ["hpc_ckpt_1.ckpt"]
    assert torch.load(run / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 2
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    fit(config, run)
    assert_same_run(run, undisturbed)
    assert not list(run.glob("hpc*"))  # numbered ones came after it


class Begins(Sends):
    """Notes the optimizer step that training starts at, and stops it at the first batch."""

    def __init__(self) -> None:
        super().__init__(signal.SIGTERM, "on_train_batch_start", 1)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note it."""
        self.step = trainer.global_step


def test_a_slurm_job_that_began_at_a_named_checkpoint_goes_on_from_its_own(whole, processes, tmp_path, monkeypatch):
    """It is queued again at step 2; another job, a first start, and a job that has saved nothing begin where they are told."""
    config, start, run = whole[0], tmp_path / "start", tmp_path / "run"
    stopped(config, start, Begins())
    named = ("--ckpt_path", str(start / "checkpoints" / "last.ckpt"))
    monkeypatch.setenv("PATH", f"{processes[0] / 'bin'}:{os.environ['PATH']}")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    stop = stopped(config, run, Sends(signal.SIGUSR1, "on_before_backward", 3), *named)
    assert isinstance(stop, Stopped) and stop.requeue and (run / "hpc_ckpt_1.ckpt").is_file()

    def began(folder: Path, *words: str, job: str = "77", restarts: str = "1") -> int:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        callback = Begins()
        stopped(config, folder, callback, *words)
        return callback.step

    others = {"another job": {"job": "78"}, "a first start": {"restarts": "0"}}
    for name, options in others.items():
        copy = shutil.copytree(run, tmp_path / name, symlinks=True)
        assert began(copy, *named, **options) == 0, name
    assert began(tmp_path / "nothing saved", *named) == 0
    with pytest.warns(
        UserWarning, match=r"queued again and goes on from its own .*/hpc_ckpt_1\.ckpt, not from .*start"
    ):
        assert began(run, *named) == 2
    with pytest.warns(UserWarning, match=r"queued again and goes on from its own .*/step-2\.ckpt, not from .*best"):
        assert began(run, "--ckpt_path", "best") == 2


def test_a_folder_that_no_job_left_is_still_refused_under_slurm(whole, monkeypatch, capsys):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        fit(*whole)
    assert "--overwrite" in capsys.readouterr().err


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_bit_for_bit(whole, processes):
    folder, reports = processes
    assert (reports[1]["status"], reports[1]["phase"]) == (-signal.SIGKILL, "checkpoint")
    assert reports[2]["status"] == 0, (folder / "killed.log").read_text()[-3000:]
    assert_same_files(folder / "killed", whole[1])


# -- many kills --------------------------------------------------------------------------------------------------------

KILLS = 60
SLOWEST = 0.03  # seconds into a phase


def newest_step(run: Path) -> int:
    """Of the checkpoints on the disk, every one of which is whole; 0 without any."""
    found = numbered(run / "checkpoints")
    assert [(path, problem(path)) for path in found.values() if problem(path)] == []
    return max(found, default=0)


@pytest.mark.slow
def test_sixty_kills_at_random_instants_lose_nothing_beyond_the_last_checkpoint(models, tmp_path):
    """Runs of 6 steps, a checkpoint every second one, killed again and again until they end; then all is as if undisturbed."""
    draw = random.Random(0)
    config = write_config(tmp_path, models, **{"trainer.max_steps": 6, "trainer.val_check_interval": 2})
    words = ("--trainer.callbacks", json.dumps(with_checkpoints(config, every=2, keep=2)))
    undisturbed = tmp_path / "undisturbed"
    fit(config, undisturbed, *words)
    killed, at, runs = 0, dict.fromkeys(PHASES, 0), 0
    while killed < KILLS:
        run, saved = tmp_path / f"run-{runs}", 0
        while True:
            going_on = ("--ckpt_path", "last") if saved else ("--overwrite", "true")
            kill = [draw.choice(PHASES), draw.randint(1, 4), draw.random() * SLOWEST] if killed < KILLS else None
            report = forked.run(job(config, run, *words, *going_on, kill=kill))
            assert report["status"] in (0, -signal.SIGKILL), Path(f"{run}.log").read_text()[-3000:]
            now = newest_step(run)
            assert now >= saved and report["step"] - now <= 2
            saved = now
            if report["status"] == 0:
                break
            killed, at[report["phase"]] = killed + 1, at.get(report["phase"], 0) + 1
        assert_same_files(run, undisturbed)
        runs += 1
    print(f"{killed} kills in {runs} runs: {at}")
    assert all(at[phase] for phase in PHASES)
