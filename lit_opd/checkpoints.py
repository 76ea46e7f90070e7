"""Optimizer state in checkpoints by parameter name, and what a strategy cannot go on from.

A plain optimizer numbers its own parameters; Lightning's FSDP strategies number those of the whole module, the frozen
teacher's included. Names mean the same in both, so a checkpoint of two processes goes on in one, and the other way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.optim import Optimizer

from lit_opd.shard_index import read_index
from lit_opd.types import InputError

# not the command of the same name in lightning.pytorch, which fails on the shards of FSDP2
CONSOLIDATE = "python -m lightning.fabric.utilities.consolidate_checkpoint"
FSDP1_WRAPPER = "_fsdp_wrapped_module."


def plain_name(name: str) -> str:
    """A parameter's name without what FSDP1's wrappers add to it."""
    return name.replace(FSDP1_WRAPPER, "")


def _order(module: nn.Module, optimizer: Optimizer) -> list[str]:
    """Parameter names in the optimizer's own numbering."""
    names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _renamed(state: dict[str, Any], new: Any) -> dict[str, Any]:
    """``state`` with ``new(key)`` for every parameter key; other entries of the groups are kept."""
    groups = [{**group, "params": [new(key) for key in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": {new(key): value for key, value in state["state"].items()}, "param_groups": groups}


def by_name(state: dict[str, Any], module: nn.Module, optimizer: Optimizer, *, whole: bool) -> dict[str, Any]:
    """An optimizer's state keyed by parameter names.

    Args:
        state: as Lightning collected it; keys are numbers, or names already.
        module: names the parameters.
        optimizer: whose state it is.
        whole: True where the numbers count all parameters of ``module``, as under FSDP1 and FSDP2.
    """
    if "param_groups" not in state:  # a rank that does not write
        return state
    order = [plain_name(name) for name, _ in module.named_parameters()] if whole else _order(module, optimizer)
    return _renamed(state, lambda key: order[key] if isinstance(key, int) else key)


def by_number(state: dict[str, Any], module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The reverse, in the numbering of a plain optimizer.

    Raises:
        InputError: the optimizer trains other parameters than the saved one.
    """
    number = {name: index for index, name in enumerate(_order(module, optimizer))}
    saved = [key for group in state["param_groups"] for key in group["params"]]
    if any(isinstance(key, int) for key in saved):
        return state
    if set(saved) != number.keys():
        differing = sorted(set(saved) ^ number.keys())
        raise InputError(
            f"`--ckpt_path` must be a checkpoint of the same trained parameters, but {len(differing)} differ: "
            f"{', '.join(differing[:5])}; give the config the run was started with"
        )
    return _renamed(state, lambda key: number[key])


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


def check_checkpoint(path: str | Path, strategy: Any, *, training: bool) -> None:
    """Refuse, before weights load, what Lightning's strategies cannot read.

    Args:
        path: a checkpoint, one file or a folder of shards.
        strategy: what would load it.
        training: True where the optimizer goes on too.
    Raises:
        InputError: a folder where one file is read, or written by another kind of strategy; a consolidated file under a sharded
            strategy; an optimizer without state under a sharded strategy.
    """
    sharded = isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
    if Path(path).is_dir():
        _check_folder(Path(path), strategy, sharded=sharded, training=training)
        return
    if not sharded:
        return
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if "optimizer_0" in saved:
        raise InputError(
            f"`--ckpt_path` must be the folder itself under {type(strategy).__name__}, got the consolidated file {path}; give "
            "the folder it was made from"
        )
    if training and any(not state["state"] for state in saved.get("optimizer_states", [])):
        raise _stateless(path, strategy)


def _check_folder(path: Path, strategy: Any, *, sharded: bool, training: bool) -> None:
    names = read_index(path).state_dict_metadata  # first: the advised command reads a folder without any check
    if not sharded:
        raise InputError(
            f"`--ckpt_path` must be one file under {type(strategy).__name__}, got the folder of shards {path}; make it one with "
            f"`{CONSOLIDATE} {path}` and give {path}.consolidated"
        )
    fsdp1 = isinstance(strategy, FSDPStrategy)
    if not any(name.startswith("model." if fsdp1 else "state_dict.") for name in names):
        other = "ModelParallelStrategy" if fsdp1 else "FSDPStrategy"
        raise InputError(
            f"`--ckpt_path` must be of the same kind of strategy, but the shards in {path} are {other}'s; go on with that, or "
            f"in one process or ddp after `{CONSOLIDATE} {path}`"
        )
    if fsdp1 and training and not any(name.startswith("optimizer_0.state.") for name in names):
        raise _stateless(path, strategy)


def _stateless(path: str | Path, strategy: Any) -> InputError:
    return InputError(
        f"`model.optimizer` must have state to go on under {type(strategy).__name__}, but {path} holds none (SGD without "
        "momentum?), and Lightning cannot load that; go on in one process or with ddp, or start with momentum"
    )


def from_consolidated(checkpoint: dict[str, Any]) -> None:
    """Rename what the consolidation of shards wrote to the names of a plain checkpoint, in place."""
    if "model" in checkpoint:
        checkpoint["state_dict"] = checkpoint.pop("model")
    if "optimizer_0" in checkpoint:
        checkpoint["optimizer_states"] = [checkpoint.pop("optimizer_0")]
