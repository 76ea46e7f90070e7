"""Sharding over ranks with torch's FSDP2 (``fully_shard``) and FSDP1: layer by layer, the wrapper as root.

``placement`` turns Lightning's strategy into a function that shards one ``ScoringModel``; student and teacher are sharded
separately. For a rollout the student's weights are gathered once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp._runtime_utils import _reshard  # no public name frees what FSDP1's root keeps

from lit_opd.errors import InputError

Placement = Callable[..., Any]  # (policy, *, trained, offload=False) -> the module to use in its place
WHOLE_SHAPES = "whole_shapes"  # attribute of an FSDP1 wrapper: shapes of the weights before they were cut, by name
FSDP2_FLAGS = "--trainer.strategy.data_parallel_size RANKS --trainer.strategy.tensor_parallel_size 1"


def transformer_layers(model: Any) -> list[nn.Module]:
    """The repeated blocks of a transformers model, found by the class names it says must not be split; FSDP2 derives its own."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if names & {base.__name__ for base in type(module).__mro__}]
    if not layers:
        raise InputError(f"`{type(model).__name__}` names no blocks to shard (its `_no_split_modules` is empty)")
    return layers


def compile_layers(policy: Any) -> None:
    """Compile every transformer block of a ``ScoringModel`` in place, before it is sharded; names and weights stay.

    Raises:
        InputError: a model on the CPU without a C++ compiler.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise InputError(
            "`model.student.compile` must be false without a C++ compiler, got true; install g++, or leave it out"
        )
    for layer in transformer_layers(policy.causal_lm):
        layer.compile(dynamic=True)


def shards(strategy: Strategy) -> bool:
    """True for a strategy under which weights are spread over the ranks."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def placement(strategy: Strategy, mesh: Any) -> Placement | None:
    """How a strategy shards a model; None where every rank holds all of it.

    ``offload`` keeps FSDP2's shards in host memory (pinned where CUDA is) and copies a unit to the device when it runs.

    Args:
        strategy: Lightning's.
        mesh: the device mesh that ``ModelParallelStrategy`` made, else None.
    """
    half = str(getattr(strategy.precision_plugin, "precision", "")) == "bf16-mixed"
    if mesh is not None:
        return lambda policy, *, trained, offload=False: _fully_shard(
            policy, mesh["data_parallel"], half=half and trained, offload=offload
        )
    if isinstance(strategy, FSDPStrategy):
        return lambda policy, *, trained, offload=False: _wrap(policy, strategy, half=half and trained, offload=offload)
    return None


def _fully_shard(policy: Any, mesh: Any, *, half: bool = False, offload: bool = False) -> Any:
    """FSDP2, in place; scoring and generation stay the model's own methods."""
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else None
    settings: dict[str, Any] = {"mesh": mesh} | ({"mp_policy": precision} if precision else {})
    if offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for layer in transformer_layers(policy.causal_lm):
        fully_shard(layer, **settings)
    fully_shard(policy, **settings)
    register_fsdp_forward_method(policy, "generate")
    register_fsdp_forward_method(policy, "run")
    register_fsdp_forward_method(policy, "head")
    return policy


def _wrap(policy: Any, strategy: FSDPStrategy, *, half: bool, offload: bool) -> Any:
    """FSDP1 with the strategy's own settings; the result passes attributes on to the model inside.

    Raises:
        InputError: ``offload``.
    """
    if offload:
        raise InputError(
            "`LocalTeacher.offload` must be false under FSDPStrategy (FSDP1), got true; use ModelParallelStrategy (FSDP2) "
            f"{FSDP2_FLAGS}"
        )
    precision = strategy.mixed_precision
    if precision is None and half:  # Lightning's would round the rotary tables and the reduced gradients too
        precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    settings = {
        **strategy.kwargs,
        "sharding_strategy": strategy.sharding_strategy,
        "mixed_precision": precision,
        "device_id": strategy.root_device,
    }
    layers = set(transformer_layers(policy.causal_lm))
    shapes = {name: value.shape for name, value in policy.named_parameters()}
    for parent in list(policy.modules()):
        for name, child in parent.named_children():
            if child in layers:
                setattr(parent, name, FullyShardedDataParallel(child, **settings))
    wrapped = FullyShardedDataParallel(policy, **settings)
    setattr(wrapped, WHOLE_SHAPES, shapes)
    return wrapped


def is_sharded(policy: nn.Module) -> bool:
    """True for what a placement returned."""
    return isinstance(policy, FSDPModule | FullyShardedDataParallel)


def holds_shards(scorer: nn.Module) -> bool:
    """True when a model inside ``scorer`` is sharded; an offloaded one is no submodule, only an attribute ``policy``."""
    policies = (getattr(part, "policy", None) for part in scorer.modules())
    return any(isinstance(policy, nn.Module) and is_sharded(policy) for policy in policies)


@contextmanager
def gathered(policy: nn.Module, *, blocks: bool = True) -> Iterator[None]:
    """Hold the full weights while the block runs: one gather for a whole rollout instead of one a token.

    Under FSDP1 call methods of the model inside, not the model itself: its forward would free the weights.

    Args:
        policy: a sharded ``ScoringModel``.
        blocks: False for what is outside the repeated blocks only: embedding, last norm and head.
    """
    if isinstance(policy, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(policy, recurse=blocks, writeback=False), ExitStack() as stack:
            if blocks:
                stack.enter_context(_bare(policy))
            yield
        return
    units = [module for module in policy.modules() if isinstance(module, FSDPModule) and (blocks or module is policy)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


@contextmanager
def _bare(policy: FullyShardedDataParallel) -> Iterator[None]:
    """The layers without their FSDP1 wrappers, whose hooks would free gathered weights after each forward."""
    wrapped = [
        (parent, name, child)
        for parent in policy.modules()
        for name, child in parent.named_children()
        if isinstance(child, FullyShardedDataParallel)
    ]
    for parent, name, child in wrapped:
        setattr(parent, name, child.module)
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)


def forget_gathered(policy: nn.Module) -> None:
    """Free the whole weights that FSDP keeps after a forward pass: the shards have other values now."""
    for part in policy.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
        elif isinstance(part, FullyShardedDataParallel) and part._is_root is not None:  # None before the first forward
            handle = part._handle
            if handle is not None and handle.uses_sharded_strategy and not handle.needs_unshard():
                _reshard(part, handle, True)


def sync_gradients(policy: nn.Module, enabled: bool) -> None:
    """Reduce gradients over ranks at the next backward, or only accumulate them.

    FSDP1 reduces at every backward: ``no_sync`` would hold whole gradients, in the dtype of the gathered weights.
    """
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(enabled)


def clip_gradients(policy: nn.Module, parameters: list[nn.Parameter], bound: float) -> Tensor:
    """Scale the gradients of ``parameters`` to a global norm of at most ``bound``; returns the norm before, scalar.

    FSDP1's own ``clip_grad_norm_`` computes norms in float32; here they keep the gradients' dtype.
    """
    like = parameters[0]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), dtype=like.dtype, device=like.device)
    if isinstance(policy, FullyShardedDataParallel) and policy.sharding_strategy is not ShardingStrategy.NO_SHARD:
        square = norm.square()
        dist.all_reduce(square, group=policy.process_group)
        norm = square.sqrt()
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    nn.utils.clip_grads_with_norm_(parameters, bound, norm)
    return norm


def full_state(policy: Any) -> dict[str, Any]:
    """Full weights of the wrapped model by name, on the CPU of rank 0 (empty elsewhere)."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    on_cpu = next(policy.parameters()).device.type == "cpu"  # torch frees what it "moves" from the CPU to the CPU
    options = StateDictOptions(full_state_dict=True, cpu_offload=not on_cpu)
    state = get_model_state_dict(policy, options=options)
    return {name.removeprefix("model."): value for name, value in state.items()}
