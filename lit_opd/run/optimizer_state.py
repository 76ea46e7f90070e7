"""Optimizer state in checkpoints by parameter name.

A plain optimizer numbers its own parameters; Lightning's FSDP strategies number those of the whole module, the frozen
teacher's included. Names mean the same in both, so a checkpoint of two processes goes on in one, and the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_opd.errors import InputError

FSDP1_WRAPPER = "_fsdp_wrapped_module."

OptimizerFactory = Callable[[Iterable], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


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
