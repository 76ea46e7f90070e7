"""All that is read or changed of Lightning behind its public names: nothing else in this project touches a private one.

Read and run with lightning 2.6; each function says what it relies on by its name and nothing more.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.loggers.logger import _DummyExperiment as NoExperiment
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

__all__ = ["NoExperiment"]

# -- strategies --------------------------------------------------------------------------------------------------------


def tensor_parallel_size(strategy: Strategy) -> int | str:
    """Ranks that share a layer under FSDP2's strategy; 1 under every other."""
    return strategy._tensor_parallel_size if isinstance(strategy, ModelParallelStrategy) else 1


def data_parallel_size(strategy: ModelParallelStrategy) -> int | str:
    """Ranks over which FSDP2 spreads weights; "auto" is the number of nodes."""
    return strategy._data_parallel_size


def recomputes_activations(strategy: FSDPStrategy) -> dict[str, Any] | None:
    """The arguments of FSDP1's own recomputation, None where it is off."""
    return strategy._activation_checkpointing_kwargs


def saves_shards(strategy: Strategy) -> bool:
    """True where a checkpoint of the strategy is a folder of shards."""
    if isinstance(strategy, ModelParallelStrategy):
        return strategy._save_distributed_checkpoint
    return isinstance(strategy, FSDPStrategy) and strategy._state_dict_type == "sharded"


def device_mesh(module: LightningModule) -> Any:
    """The mesh that ``ModelParallelStrategy`` made for the module, else None."""
    return getattr(module, "_device_mesh", None)


def bound_waits(strategy: ModelParallelStrategy, mesh: Any) -> None:
    """Give the mesh's process groups the strategy's time-out; torch before 2.11 left them its own 30 minutes."""
    if strategy._timeout is not None:
        for dimension in range(mesh.ndim):
            _set_pg_timeout(strategy._timeout, mesh.get_group(dimension))


def attached_trainer(module: LightningModule) -> Trainer | None:
    """The module's trainer, None where it has none (its public name raises then)."""
    return module._trainer  # type: ignore[return-value]


# -- the trainer's connectors ------------------------------------------------------------------------------------------


def dump_checkpoint(trainer: Trainer, *, weights_only: bool) -> dict[str, Any]:
    """The trainer's state; a collective where weights are sharded."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only)


def log_now(trainer: Trainer, metrics: Mapping[str, Tensor]) -> None:
    """Give the loggers each scalar by its name, where this step is one to log. Lightning would do so after the batch's
    checkpoint: a kill in between lost the line."""
    connector = trainer._logger_connector
    if connector.should_update_logs:
        connector.log_metrics(dict(metrics))


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The trainer's callbacks, an attribute that its class does not declare."""
    return trainer.callbacks  # type: ignore[attr-defined]


def observers(module: LightningModule) -> tuple[Any, ...]:
    """The callbacks around a module that ask for fields of the signal by a set of names, ``requires``."""
    trainer = attached_trainer(module)
    found = callbacks_of(trainer) if trainer is not None else []
    return tuple(callback for callback in found if isinstance(getattr(callback, "requires", None), frozenset))


def log_agreed(module: LightningModule, metrics: Mapping[str, float]) -> None:
    """Log from an evaluation's end what is the same on every rank, in float64.

    Lightning is told to reduce it, or it would advise so name by name; the maximum of equal numbers is their value. NCCL reduces
    nothing that is on the CPU.
    """
    device = module.trainer.strategy.root_device
    values = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in metrics.items()}
    module.log_dict(values, sync_dist=True, reduce_fx="max")


def set_callbacks(trainer: Trainer, callbacks: list[Callback]) -> None:
    """Give the trainer these callbacks, in the order in which it runs them."""
    trainer.callbacks = trainer._callback_connector._reorder_callbacks(callbacks)  # type: ignore[attr-defined]


def requeue_signal(trainer: Trainer) -> int | None:
    """The signal at which a SLURM job is to be queued again, None where it is not."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return int(environment.requeue_signal or signal.SIGUSR1)
    return None


def take_sigterm(trainer: Trainer) -> bool:
    """True where Lightning has received a SIGTERM, which is taken from it: it would end the run with nothing saved."""
    connector = trainer._signal_connector
    received, connector.received_sigterm = connector.received_sigterm, False
    return received


def restore_handlers(trainer: Trainer, former: Mapping[int, Any]) -> bool:
    """Let Lightning's teardown put ``former`` signal handlers back; False where it has put none of its own in place."""
    kept = trainer._signal_connector._original_handlers
    if kept:
        kept |= former  # type: ignore[arg-type]
    return bool(kept)


def save_and_requeue(trainer: Trainer, signum: int) -> None:
    """Save Lightning's checkpoint of a SLURM job, and queue the job again."""
    trainer._signal_connector._slurm_sigusr_handler_fn(signum, None)  # type: ignore[arg-type]


class EndedFits(Trainer):
    """A fit that a kill ended after its last checkpoint has nothing to train, but its end is made: the last validation, the
    exported student, the summary."""

    def _run_stage(self) -> Any:
        before = self.global_step
        result = super()._run_stage()
        if self.training and before and self.global_step == before and self.fit_loop.skip:
            self.fit_loop.on_run_start()
            self.fit_loop.on_run_end()
        return result


# -- loggers -----------------------------------------------------------------------------------------------------------


class KeptFileWriter(ExperimentWriter):
    """The writer of CSVLogger, which may go on with a file.

    Args:
        log_dir: folder of the file.
        continued: an existing file is gone on with; False deletes it, as Lightning does.
    """

    def __init__(self, log_dir: str, *, continued: bool) -> None:
        self._continued = continued
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        if not self._continued:
            super()._check_log_dir_exists()

    def record_new_keys(self) -> bool:
        """True where a recorded line has names that the header lacks, which are added to it."""
        return bool(self._record_new_keys())


class OwnWriterLogger(CSVLogger):
    """CSVLogger with a writer of its own."""

    def make_writer(self) -> KeptFileWriter:
        """Called at the first use, on rank 0."""
        raise NotImplementedError(f"{type(self).__name__} must define make_writer")

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:  # type: ignore[override]
        """The writer, made at first use on rank 0."""
        if self._experiment is None:
            self._experiment = self.make_writer()
        return self._experiment  # type: ignore[return-value]


def wandb_settings(logger: WandbLogger) -> dict[str, Any]:
    """What the logger gives to ``wandb.init``; may be changed before its first use."""
    return logger._wandb_init


def wandb_is_offline(logger: WandbLogger) -> bool:
    """Whether the run is offline."""
    return logger._offline


def take_wandb_offline(logger: WandbLogger) -> None:
    """From its first use on."""
    logger._offline, logger._wandb_init["mode"] = True, "offline"


def begun_experiment(logger: Any) -> Any:
    """The logger's experiment where it has begun, else None."""
    return logger._experiment


# -- loops -------------------------------------------------------------------------------------------------------------


def validate_now(trainer: Trainer) -> None:
    """Run the fit loop's own validation loop, as Lightning does between training batches."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop.skip:
        return
    trainer.validating = True
    loop.run()
    trainer.training = True


def begin_next_epoch(trainer: Trainer) -> None:
    """Where the checkpoint that a run goes on from ended with an epoch, go on with the next; called at the start of training.

    Lightning takes the epoch that ended for the running one, finds no batch left in it, and looks again without end.
    """
    loop = trainer.fit_loop.epoch_loop
    if loop.restarting and loop.restarted_on_last and loop._num_ready_batches_reached():
        loop.restarting = False


def validation_due(trainer: Any, *, validated_at: int | None, at_start: bool) -> bool:
    """True where the validation that belongs to the trainer's step is still to be made.

    Args:
        trainer: in a fit.
        validated_at: optimizer step of the last validation.
        at_start: the run measures its start.
    """
    step, loop = trainer.global_step, trainer.fit_loop.epoch_loop
    progress = loop.batch_progress.total
    if validated_at == step or progress.ready > progress.processed:  # the running batch came after it
        return False
    if step == 0:
        return at_start
    return 0 < trainer.max_steps <= step or loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


def at_batch_end(loops: dict[str, Any], *, validating: bool) -> None:
    """Rewrite the counters of Lightning's fit loop, in place, to those at the end of the last whole batch.

    A checkpoint saved inside a batch would otherwise count that batch twice, and shift the validations; one saved inside a
    validation would go on in the middle of it.

    Args:
        loops: as Lightning collected them.
        validating: saved in a validation between batches.
    """
    fit = loops["fit_loop"]
    progress, validation = fit["epoch_loop.batch_progress"], fit["epoch_loop.val_loop.batch_progress"]
    for part in (validation["total"], validation["current"]):
        part |= dict.fromkeys(part, 0)
    done = progress["total"]["processed"]
    in_flight = progress["total"]["ready"] > done
    if not in_flight and not (validating and done):
        return
    for part in (progress["total"], progress["current"]):
        part |= {"ready": part["processed"], "started": part["processed"], "completed": part["processed"] - bool(done)}
    if in_flight:
        progress["is_last_batch"] = False
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] -= bool(done)  # loading adds one


def count_epoch(trainer: Any) -> None:
    """What Lightning's counters get wrong where a run goes on: at an epoch's end it forgets the next one, and so ends a later
    one too late; without a finished batch it counts one."""
    loop = trainer.fit_loop
    if loop.restarted_mid_epoch:
        for part in (loop.epoch_progress.total, loop.epoch_progress.current):
            part.ready = part.started = part.processed + 1
    if not loop.epoch_loop.batch_progress.total.processed:
        loop.epoch_loop.restarting = False
