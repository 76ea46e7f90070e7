"""All that is read or changed of Lightning behind its public names."""

from __future__ import annotations

from typing import Any


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
