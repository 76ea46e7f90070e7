"""SIGTERM, Ctrl-C and SLURM's requeue signal: the run stops where its state is whole."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_opd.distributed import all_max
from lit_opd.errors import Stopped, stop_when_put_back
from lit_opd.run.lightning import requeue_signal, restore_handlers, save_and_requeue, take_sigterm

AGAIN = 1.0  # seconds after which a further Ctrl-C is a second one; a launcher passes the first on to its ranks again
INTERRUPTED = 128 + signal.SIGINT
EARLY_NOTICE = b"\nstopping; nothing is trained yet\n"
NOTICE = b"\nstopping; the state is saved first (Ctrl-C again exits at once)\n"


class StopOnSignal(Callback):
    """Raises ``Stopped`` once a signal came; ``RunCheckpoint`` then saves, and the process ends with status 0 (130 on Ctrl-C).

    One process leaves at once before training, and abandons the running batch at once, unless its first update was made: then
    the batch is finished, and so are evaluations that are no part of the validation. While the student's weights hold a teacher's
    values it waits until its own are back. Several ranks agree at the next batch,
    whichever of them got the signal. A second Ctrl-C exits at once. Under SLURM the requeue signal saves Lightning's ``hpc_ckpt``
    at the next batch and queues the job again.
    """

    def __init__(self) -> None:
        self._signum, self._since = 0, 0.0
        self._open = False  # True while nothing is lost by leaving at any instruction
        self._training = False
        self._requeue: int | None = None
        self._ranks = 1
        self._former: dict[int, Any] = {}  # handlers of before the run

    # -- signals -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen before weights are read, which takes minutes; until training starts one process leaves at once."""
        if stage != "fit":
            return
        self._signum, self._training, self._ranks = 0, False, trainer.world_size
        self._open = self._ranks == 1
        self._requeue = requeue_signal(trainer)
        self._listen()

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in {int(signal.SIGINT), int(signal.SIGTERM), self._requeue or int(signal.SIGTERM)}:
            former = signal.signal(signum, self._received)
            if former is not None:
                self._former.setdefault(signum, former)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handlers, which save or talk to other ranks in the middle of an update."""
        self._open, self._training = False, True
        if take_sigterm(trainer):
            self._signum = self._signum or signal.SIGTERM
        self._listen()
        self._give_back(trainer)

    def _give_back(self, trainer: Trainer) -> None:
        """Put the handlers of before the run back: Lightning's teardown does, where it has put its own there by now."""
        restored = restore_handlers(trainer, self._former)
        if not restored and threading.current_thread() is threading.main_thread():
            for signum, handler in self._former.items():
                signal.signal(signum, handler)
        self._former = {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """For a fit that had nothing to train."""
        self._give_back(trainer)

    def _received(self, signum: int, frame: Any) -> None:
        if self._signum:
            if signum == signal.SIGINT and time.monotonic() - self._since > AGAIN:
                os._exit(INTERRUPTED)
            return
        self._signum, self._since = signum, time.monotonic()
        os.write(2, NOTICE if self._training else EARLY_NOTICE)
        if self._open and (self._training or signum != self._requeue):  # a job is queued again from a saved state
            stop_when_put_back(lambda: self._stop(signum))

    def _stop(self, signum: int) -> None:
        self._open = False
        by_hand = signum == signal.SIGINT and int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0
        code = INTERRUPTED if by_hand else 0  # a launcher takes another rank's status for a failure
        raise Stopped(signum, code, requeue=signum == self._requeue)

    # -- where the state is whole ------------------------------------------------------------------------------------

    def _leave_if_asked(self, pl_module: LightningModule) -> None:
        signum = int(all_max(torch.tensor(self._signum, device=pl_module.device))) if self._ranks > 1 else self._signum
        if signum:
            self._stop(signum)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Between two batches on all ranks; from here on one process may leave at any time."""
        self._open = self._ranks == 1
        self._leave_if_asked(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """From here on the batch is finished."""
        self._open = False

    def on_phase(self, name: str, done: int, total: int) -> None:
        """An update that was left out ends the time to leave, too."""
        self._open = self._open and name != "updating"

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The validation is made again by the run that goes on."""
        if self._handles(trainer):
            self._leave_if_asked(pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As for a training batch before its update."""
        self._open = self._ranks == 1 and self._handles(trainer)
        if self._open:
            self._leave_if_asked(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Results may be written from here on."""
        self._open = False

    def _handles(self, trainer: Trainer) -> bool:
        return trainer.state.fn == "fit"

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save Lightning's checkpoint of a requeued job, and queue it."""
        self._open = False
        self._give_back(trainer)
        if isinstance(exception, Stopped) and exception.requeue:
            save_and_requeue(trainer, exception.signum)
