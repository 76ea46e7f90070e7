"""Options of the optimizer that were changed between a checkpoint and the run that goes on from it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

Options = dict[str, Any]
SCALARS = bool | int | float | str | None
BASE = "initial_lr"  # torch's name for the learning rate that a schedule starts from
RATES = frozenset({"base_lrs", "_last_lr"})  # of a schedule, which follow the optimizer's


def configured(optimizer: Optimizer, scheduler: Any | None) -> dict[str, Any]:
    """What the config says, read before a first step; goes into the checkpoint.

    Args:
        optimizer: new.
        scheduler: new, None where the rate is constant.
    Returns:
        {"groups": plain options of each parameter group, "schedule": plain settings of the scheduler}.
    """
    groups = [
        _plain({name: value for name, value in group.items() if name != "params"}) for group in optimizer.param_groups
    ]
    for group in groups:
        if BASE in group:
            group["lr"] = group[BASE]  # the rate in force is the schedule's
    schedule = {} if scheduler is None else _plain(scheduler.state_dict())
    return {"groups": groups, "schedule": {name: schedule[name] for name in sorted(schedule.keys() - RATES)}}


def _plain(values: Options) -> Options:
    """Numbers, texts and lists of them, which every checkpoint can hold."""
    return {name: value for name, value in values.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(part, SCALARS) for part in value)
    return isinstance(value, SCALARS)


def apply_changes(saved: dict[str, Any], now: dict[str, Any], optimizer: Optimizer, scheduler: Any | None) -> None:
    """Let an optimizer that was restored from a checkpoint have the options that the config changed since; warn of each.

    What did not change is left as restored: schedules and optimizers keep counters among their options. A schedule goes on
    with its own settings, of which only the learning rate it started from follows the config.

    Args:
        saved: ``configured`` of the run that wrote the checkpoint.
        now: ``configured`` of this run.
        optimizer: restored.
        scheduler: restored, None where the rate is constant.
    """
    told = []
    for place, (before, after) in enumerate(zip(saved["groups"], now["groups"], strict=False)):
        for name in sorted(before.keys() & after.keys() - {BASE}):
            if before[name] != after[name]:
                told.append(f"{name} {after[name]} instead of {before[name]}")
                _change(place, name, after[name], before[name], optimizer, scheduler)
    if told:
        rank_zero_warn(
            f"`model.optimizer` was changed since the checkpoint; the run goes on with {', '.join(dict.fromkeys(told))}"
        )
    kept = [name for name, value in saved["schedule"].items() if now["schedule"].get(name, value) != value]
    if kept:
        values = ", ".join(f"{name} {saved['schedule'][name]}, not {now['schedule'][name]}" for name in sorted(kept))
        rank_zero_warn(
            f"`model.lr_scheduler` was changed since the checkpoint, which has no effect: it goes on with {values}"
        )


def _change(place: int, name: str, new: Any, old: Any, optimizer: Optimizer, scheduler: Any | None) -> None:
    group = optimizer.param_groups[place]
    if name != "lr":
        group[name] = new
        return
    scale = new / old if old else None
    group["lr"] = group["lr"] * scale if BASE in group and scale is not None else new
    if BASE in group:
        group[BASE] = new
    for part in (scheduler, *getattr(scheduler, "_schedulers", ())):  # a sequence has others inside
        if hasattr(part, "base_lrs"):
            part.base_lrs[place] = new
        if hasattr(part, "_last_lr"):
            part._last_lr[place] = group["lr"]
