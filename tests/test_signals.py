"""SIGTERM, Ctrl-C and SLURM's requeue signal, sent for real: what is saved, what is said, and that nothing is lost or doubled."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import default_callbacks
from lit_opd.cli import main
from lit_opd.types import Stopped
from tests import tiny
from tests.test_resume import assert_same_run, fit, no_pictures, write_config

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


@pytest.mark.parametrize("place", sorted(PLACES))
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
