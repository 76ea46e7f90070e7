"""What a rank of FSDP1 holds of each weight: a flat slice, maybe empty. Slices in the order of the ranks are the whole weight.

So values beside the weights, such as an average of them, can be kept by slices too, put together and cut again, without a look
into torch's flat parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from lit_opd.models.sharding import WHOLE_SHAPES


def in_slices(policy: Any) -> TypeGuard[FullyShardedDataParallel]:
    """True where ranks hold slices: not with NO_SHARD, which is what one rank makes of every strategy."""
    return isinstance(policy, FullyShardedDataParallel) and policy.sharding_strategy is not ShardingStrategy.NO_SHARD


def whole_shapes(policy: FullyShardedDataParallel) -> dict[str, torch.Size]:
    """Shapes of the weights before they were cut, by name."""
    return getattr(policy, WHOLE_SHAPES)  # type: ignore[no-any-return]


def put_together(policy: FullyShardedDataParallel, slices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole values on the CPU of every rank. A collective.

    Args:
        policy: whose ranks hold the slices.
        slices: this rank's, [n] each, by the names of the weights; the same names on every rank.
    Returns:
        by name, of the shapes that ``whole_shapes`` gives.
    """
    shapes, counts = whole_shapes(policy), _counts(policy, slices)
    whole: dict[str, Tensor] = {}
    for column, (name, own) in enumerate(slices.items()):
        sizes = counts[:, column].tolist()
        room = own.new_zeros(max(sizes))
        room[: own.numel()] = own.flatten()
        parts = [torch.empty_like(room) for _ in sizes]
        dist.all_gather(parts, room, group=policy.process_group)
        flat = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        whole[name] = flat.view(shapes[name]).cpu()
    return whole


def cut(
    policy: FullyShardedDataParallel, whole: Mapping[str, Tensor], slices: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """This rank's slices of whole values, on the devices of its slices of the weights. A collective.

    Args:
        policy: whose ranks hold the slices.
        whole: values by name, of the shapes that ``whole_shapes`` gives.
        slices: this rank's of the weights, [n] each, by name.
    Returns:
        copies, [n] each, by name.
    """
    counts, rank = _counts(policy, slices), dist.get_rank(policy.process_group)
    starts = counts[:rank].sum(0).tolist()
    found = {}
    for start, (name, own) in zip(starts, slices.items(), strict=True):
        found[name] = whole[name].flatten()[start : start + own.numel()].to(own.device, copy=True)
    return found


def _counts(policy: FullyShardedDataParallel, slices: Mapping[str, Tensor]) -> Tensor:
    """int64 [ranks, slices] on the host: elements of each rank's slices."""
    device = next(iter(slices.values())).device
    own = torch.tensor([value.numel() for value in slices.values()], device=device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(policy.process_group))]
    dist.all_gather(found, own, group=policy.process_group)
    return torch.stack(found).cpu()
