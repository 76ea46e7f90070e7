"""The few collectives the package needs; every one is the identity on a single process."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_opd.types import InputError, ServerError


def is_distributed() -> bool:
    """True when a process group with more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def is_rank_zero() -> bool:
    """True on the rank that writes files, also before a process group is up (launchers set the rank in the environment)."""
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


def check_master_port() -> None:
    """Where Lightning is to start the ranks on a port the user chose, that port must be free here.

    Raises:
        InputError: something listens on MASTER_PORT.
    """
    port = os.environ.get("MASTER_PORT")
    launched = "TORCHELASTIC_RUN_ID" in os.environ or dist.is_initialized()  # torchrun's own store listens there
    if port is None or launched or not is_rank_zero():
        return
    try:
        with socket.create_server(("", int(port))):
            pass
    except (OSError, OverflowError, ValueError) as error:
        raise InputError(
            f"`MASTER_PORT` must be a free port for the ranks to meet at, got {port} ({error}); choose another, or unset it"
        ) from error


def _reduced(values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    if not is_distributed():
        return values
    values = values.detach().clone()
    dist.all_reduce(values, op=op)
    return values


def all_sum(values: Tensor) -> Tensor:
    """Elementwise sum over the ranks of a tensor of any shape, the same on each, scalars included."""
    return _reduced(values, dist.ReduceOp.SUM)


def all_max(values: Tensor) -> Tensor:
    """Elementwise maximum over the ranks of a tensor of any shape, the same on each, scalars included."""
    return _reduced(values, dist.ReduceOp.MAX)


def all_min(values: Tensor) -> Tensor:
    """Elementwise minimum over the ranks of a tensor of any shape, the same on each, scalars included."""
    return _reduced(values, dist.ReduceOp.MIN)


def gather_rows(values: Tensor) -> Tensor:
    """Concatenation over ranks, in rank order, along dim 0; ranks may hold different numbers of rows.

    Args:
        values: [N, ...] with the same trailing shape on every rank.
    Returns:
        [sum of N, ...].
    """
    if not is_distributed():
        return values
    counts = torch.zeros(world_size(), dtype=torch.int64, device=values.device)
    counts[rank()] = len(values)
    counts = all_sum(counts)
    padded = values.new_zeros((int(counts.max()), *values.shape[1:]))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def gather_objects(values: list[Any]) -> list[Any]:
    """Concatenation over ranks, in rank order, of lists of picklable objects."""
    if not is_distributed():
        return values
    parts: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


@contextmanager
def shared_failure() -> Iterator[None]:
    """An InputError or ServerError of one rank becomes every rank's, so that none waits for it in a later collective.

    Every rank must enter, and the block itself must hold no collective that a failing rank would leave out.
    """
    own: InputError | ServerError | None = None
    try:
        yield
    except (InputError, ServerError) as error:
        own = error
    kind = None if own is None else (isinstance(own, ServerError), str(own))
    failures = [failure for failure in gather_objects([kind]) if failure is not None]
    if failures:
        from_server, text = failures[0]
        failed: InputError | ServerError = own or (ServerError(text) if from_server else InputError(text))
        failed.on_every_rank = True
        raise failed
