"""Checkpoints in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lit_opd.distributed import shared_failure
from lit_opd.errors import InputError, ServerError, Stopped
from lit_opd.prompts import PromptDataModule
from lit_opd.run.checkpoint_files import FOLDER, LAST, REQUEUE, point, remove, save, sweep
from lit_opd.run.tracking import crossed
from lit_opd.shipped import program

EVERY = 50  # the default of --checkpoint_every
SAVED_AFTER = (InputError, ServerError, Stopped, OSError)  # what leaves models and optimizer as they were


def save_first(trainer: Trainer, pl_module: LightningModule) -> None:
    """Write the run's last checkpoint now, where it is not written yet: what comes at the end and fails then costs no training.

    Lightning runs checkpoints after all other callbacks. Call it first in an ``on_train_end`` that may fail.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, RunCheckpoint):
            callback.on_train_end(trainer, pl_module)


class RunCheckpoint(ModelCheckpoint):
    """``checkpoints/step-N.ckpt`` every N optimizer steps and at the end, and ``last.ckpt``, a link to the newest.

    A checkpoint appears whole or not at all, is read back, and has its check sums beside it (``step-N.ckpt.sha256``).

    Args:
        every: optimizer steps between checkpoints; None for ``--checkpoint_every`` (50).
        keep: numbered checkpoints to keep, the newest ones.
        dirpath: folder, default ``checkpoints`` in the run folder.
        monitor: a logged ``val/`` or ``train/`` metric; the checkpoint where it was best is kept too. A ``val/`` metric is looked
            at after every validation, which saves where it is the best so far (again where ``every`` has saved the step, since
            the newest checkpoint says which one is the best); a ``train/`` metric at every checkpoint.
        mode: whether the best is the smallest ("min") or the largest ("max") value.
    Raises:
        InputError: a value outside its range.
    """

    def __init__(
        self,
        every: int | None = None,
        keep: int = 2,
        dirpath: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
    ) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and value < 1:
                raise InputError(f"`RunCheckpoint.{name}` must be >= 1, got {value}")
        if mode not in ("min", "max"):
            raise InputError(f"`RunCheckpoint.mode` must be 'min' or 'max', got {mode!r}")
        if monitor is not None and not monitor.startswith(("val/", "train/")):
            raise InputError(
                f"`RunCheckpoint.monitor` must be a val/ or train/ metric of docs/metrics.md, got {monitor!r}"
            )
        super().__init__(dirpath=dirpath, monitor=monitor, mode=mode, save_top_k=-1, every_n_train_steps=every or EVERY)
        self.every, self._own_every = every or EVERY, every
        self.save_top_k = keep + bool(monitor)  # what a run keeps on the disk
        self.keep = keep
        self._names: list[str] = []  # of the checkpoints that are kept, oldest first
        self._best: tuple[float, str] | None = None  # value and name
        self._bests_saved: list[str] = []  # what the newest checkpoint says of the best ones, ours and Lightning's
        self._batch_began_at: int | None = None  # optimizer step at the last batch boundary, None before training
        self._saving = False  # True where the saving itself failed

    @property
    def state_key(self) -> str:
        """The same whatever the settings are."""
        return type(self).__qualname__

    def use_run_dir(self, run_dir: Path, every: int) -> None:
        """Take folder and interval from the command line, where the settings name none."""
        self.dirpath = self.dirpath or str(run_dir / FOLDER)
        if self._own_every is None:
            self.every = every
        elif every not in (self._own_every, EVERY):
            rank_zero_warn(
                f"`--checkpoint_every` {every} has no effect: `{type(self).__name__}.every` is {self._own_every}; leave that out"
            )

    def check(self, pl_module: LightningModule, data: PromptDataModule | None) -> None:
        """A validation metric needs validation data."""
        named = getattr(data, "val", None), getattr(data, "val_fraction", None)
        if self.monitor is not None and self.monitor.startswith("val/") and named == (None, None):
            raise InputError(
                f"`RunCheckpoint.monitor` must be a train/ metric where `data.val` is null, got {self.monitor!r}"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The run folder's ``checkpoints`` where no folder was given."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / FOLDER)
        super().setup(trainer, pl_module, stage)

    # -- when --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there is something to save, and ``last`` is where this run goes on, also where it went back."""
        self._batch_began_at, self._saving = trainer.global_step, False
        self._bests_saved = _bests(trainer)
        if trainer.is_global_zero:
            sweep(self._folder)
        own = self._folder / self._name(trainer)
        with shared_failure():
            if trainer.is_global_zero and trainer.ckpt_path and Path(trainer.ckpt_path).resolve() == own.resolve():
                point(self._folder / LAST, own.name)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the optimizer step."""
        self._batch_began_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is due."""
        began, self._batch_began_at = self._batch_began_at, trainer.global_step
        if began is not None and crossed(trainer.global_step, began, self.every) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._consider(trainer, "train/")
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Epochs do not matter here."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best so far; before the first step there is nothing to save."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.global_step > 0:
            if self._consider(trainer, "val/"):
                self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where the last step was not one of the saved ones, or the best one has been another since."""
        if not self._saved(trainer) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the state before the failed or abandoned batch, and say so in a note.

        Nothing is saved after an error that is none of ``SAVED_AFTER``, where the batch had made some of its optimizer steps (a
        checkpoint falls on batch boundaries, so the last numbered one is what is kept), or where not every rank failed, since
        saving needs them all.
        """
        if self._batch_began_at is None and isinstance(exception, Stopped):
            exception.add_note("nothing was trained and nothing saved; start again with the same command")
        if self._batch_began_at is None or not isinstance(exception, SAVED_AFTER):
            return
        if isinstance(exception, Stopped) and exception.requeue:
            exception.add_note(f"the job is queued again and goes on from {REQUEUE}*.ckpt in its run folder")
        elif self._saving:
            exception.add_note(self._kept())
        elif getattr(exception, "torn", False):
            exception.add_note(f"an update was cut short, so nothing was saved; {self._kept()}")
        elif trainer.world_size > 1 and not getattr(exception, "on_every_rank", False):
            exception.add_note(f"one rank failed alone, so nothing was saved; {self._kept()}")
        elif trainer.global_step != self._batch_began_at:
            made = trainer.global_step - self._batch_began_at
            exception.add_note(
                f"the batch had made {made} of its optimizer steps, so nothing was saved; {self._kept()}"
            )
        else:
            exception.add_note(self._saved_before(trainer))
        if isinstance(exception, Stopped):
            folder = trainer.default_root_dir
            again = "" if exception.requeue else " --ckpt_path last"
            exception.add_note(f"{program()} fit --config {folder}/config.yaml --run_dir {folder}{again}")

    def _saved_before(self, trainer: Trainer) -> str:
        """Save the state before the running batch unless it is there; where it is."""
        if not self._saved(trainer):
            try:
                self._save(trainer)
            except InputError as error:
                return f"nothing could be saved: {error}; {self._kept()}"
        step, path = trainer.global_step, self.last_model_path
        return f"the state before the failed batch (optimizer step {step}) is in {path}; go on with --ckpt_path last"

    def _kept(self) -> str:
        if not self.last_model_path:
            return "there is no checkpoint yet"
        return f"the last checkpoint is {self.last_model_path}; go on with --ckpt_path last"

    # -- saving ------------------------------------------------------------------------------------------------------

    @property
    def _folder(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath)

    @staticmethod
    def _name(trainer: Trainer) -> str:
        return f"step-{trainer.global_step}.ckpt"

    def _saved(self, trainer: Trainer) -> bool:
        """There is a checkpoint of this step, and it names the best ones."""
        return self._name(trainer) in self._names and self._bests_saved == _bests(trainer)

    def _consider(self, trainer: Trainer, stage: str) -> bool:
        """Compare the metric with the best so far; True where this step is the best."""
        if self.monitor is None or not self.monitor.startswith(stage):
            return False
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith(stage)))
            error = InputError(
                f"`RunCheckpoint.monitor` must be a metric that is logged, got {self.monitor!r}; there are {logged}"
            )
            error.on_every_rank = True
            raise error
        value, name = float(trainer.callback_metrics[self.monitor]), self._name(trainer)
        sign = 1.0 if self.mode == "min" else -1.0
        if value != value or (self._best is not None and sign * value >= sign * self._best[0]):
            return False
        self._best, self.best_model_path = (value, name), str(self._folder / name)
        return True

    def _save(self, trainer: Trainer) -> None:
        """Save, let ``last.ckpt`` point there, delete what is no longer kept."""
        name = self._name(trainer)
        before = list(self._names)
        self._names = [*(other for other in before if other != name), name]  # part of the state that is saved
        self._saving = True
        try:
            save(trainer, self._folder / name, link=LAST)
        except BaseException:
            self._names = before
            raise
        self._saving, self.last_model_path = False, str(self._folder / LAST)
        self._bests_saved = _bests(trainer)
        self._forget_old(trainer)

    def _forget_old(self, trainer: Trainer) -> None:
        best = self._best[1] if self._best is not None else None
        old = [name for name in self._names[: -self.keep] if name != best]
        self._names = [name for name in self._names if name not in old]
        if not trainer.is_global_zero:
            return
        superseded = Path(trainer.default_root_dir).glob(f"{REQUEUE}*.ckpt")
        for path in [*(self._folder / name for name in old), *superseded]:
            try:
                remove(path)
            except OSError as error:
                rank_zero_warn(f"the old checkpoint {path} could not be deleted: {error}")

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Which checkpoints there are, by name: the folder may move."""
        return {"names": list(self._names), "best": list(self._best) if self._best else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with those that are still there."""
        self._names = [name for name in state_dict.get("names", ()) if (self._folder / name).exists()]
        best = state_dict.get("best")
        if best is not None and (self._folder / best[1]).exists():
            self._best, self.best_model_path = (float(best[0]), str(best[1])), str(self._folder / best[1])
        if self._names:
            self.last_model_path = str(self._folder / LAST)


def _bests(trainer: Trainer) -> list[str]:
    """The best checkpoint of every callback that keeps one, "" where there is none yet."""
    return [str(getattr(callback, "best_model_path", "")) for callback in trainer.checkpoint_callbacks]
