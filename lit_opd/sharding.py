"""Sharding with torch's ``fully_shard`` (FSDP2): layer by layer and the wrapper as root; whole for the rollout phase."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from lit_opd.types import InputError


def transformer_layers(model: Any) -> list[nn.Module]:
    """The repeated blocks of a transformers model, found by the class names it says must not be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise InputError(f"`{type(model).__name__}` names no blocks to shard (its `_no_split_modules` is empty)")
    return layers


def check_strategy(strategy: Any) -> None:
    """Refuse what would fail, or train other sums, deep inside a run.

    Raises:
        InputError: FSDP1, or FSDP2 with ranks that are not all data-parallel.
    """
    wanted = "--trainer.strategy.data_parallel_size RANKS --trainer.strategy.tensor_parallel_size 1"
    if isinstance(strategy, FSDPStrategy):
        raise InputError(
            "`trainer.strategy` must be ddp or ModelParallelStrategy (FSDP2), got FSDPStrategy (FSDP1), which is not "
            f"supported; use --trainer.strategy ModelParallelStrategy {wanted}"
        )
    if isinstance(strategy, ModelParallelStrategy) and strategy._tensor_parallel_size != 1:
        raise InputError(
            "`trainer.strategy.tensor_parallel_size` must be 1: models are sharded over the data-parallel ranks only, got "
            f"{strategy._tensor_parallel_size!r} (Lightning's default makes the GPUs of a node tensor-parallel); give {wanted}"
        )


def shard(policy: Any, mesh: Any) -> None:
    """Shard a ``ScoringModel`` in place over ``mesh``; scoring and generation stay its own methods."""
    for layer in transformer_layers(policy.causal_lm):
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    register_fsdp_forward_method(policy, "generate")
    register_fsdp_forward_method(policy, "run")
    register_fsdp_forward_method(policy, "head")


def is_sharded(policy: nn.Module) -> bool:
    """True when ``shard`` was applied."""
    return isinstance(policy, FSDPModule)


@contextmanager
def gathered(policy: nn.Module, *, blocks: bool = True) -> Iterator[None]:
    """Hold the full weights while the block runs: one gather for a whole rollout instead of one a token.

    Args:
        policy: a sharded ``ScoringModel``.
        blocks: False for what is outside the repeated blocks only: embedding, last norm and head.
    """
    units = [module for module in policy.modules() if isinstance(module, FSDPModule) and (blocks or module is policy)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


def sync_gradients(policy: nn.Module, enabled: bool) -> None:
    """Reduce gradients over ranks at the next backward, or only accumulate them."""
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(enabled)


def full_state(policy: Any) -> dict[str, Any]:
    """Full weights of the wrapped model by name, on the CPU of rank 0 (empty elsewhere)."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(policy.model, options=options)
