"""The machine a config asks for, read from the ``trainer`` section, whatever machine reads it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lit_opd.errors import InputError
from lit_opd.run.lightning import data_parallel_size

GIB = 2**30
CGROUP_LIMIT = "/sys/fs/cgroup/memory.max"


@dataclass(frozen=True)
class Plan:
    """Where the run is meant to run.

    Args:
        accelerator: "cpu" or "gpu" (any device with memory of its own).
        local_ranks: processes a node.
        nodes: machines.
        shards: ranks that share one copy of the weights, 1 without sharding.
        strategy: the configured strategy, an object or a name.
        precision: Lightning's name of it, such as "bf16-mixed".
        memory: bytes a rank may use, None where they are not known here.
        memory_source: where ``memory`` comes from, in words.
    """

    accelerator: Literal["cpu", "gpu"]
    local_ranks: int
    nodes: int
    shards: int
    strategy: Any
    precision: str
    memory: int | None
    memory_source: str

    @property
    def ranks(self) -> int:
        """Processes of the whole run."""
        return self.local_ranks * self.nodes

    @property
    def replicated(self) -> bool:
        """True under DDP: every rank holds everything, and gradients are reduced in buckets."""
        return self.ranks > 1 and self.shards == 1

    @property
    def autocast(self) -> bool:
        """True where operations run in bfloat16 on float32 weights."""
        return self.precision == "bf16-mixed"

    @property
    def gathers_half(self) -> bool:
        """True where sharded weights are gathered in bfloat16: FSDP2 under bf16-mixed."""
        return self.autocast and self.shards > 1 and isinstance(self.strategy, ModelParallelStrategy)

    def describe(self) -> str:
        """The plan in one line."""
        sharding = f"weights sharded over {self.shards}" if self.shards > 1 else "whole weights on each"
        return f"{self.ranks} {self.accelerator} rank(s) on {self.nodes} node(s), {sharding}, {self.precision}"


def read_plan(trainer: Mapping[str, Any], *, strategy: Any, memory_gb: float | None) -> Plan:
    """The plan of a run.

    Args:
        trainer: the ``trainer`` section of the config.
        strategy: its strategy, an object or a name.
        memory_gb: GiB of memory a rank has; None asks this machine.
    Raises:
        InputError: ``memory_gb`` is not above 0.
    """
    if memory_gb is not None and not memory_gb > 0:
        raise InputError(f"`--memory_gb` must be above 0, got {memory_gb}")
    accelerator: Literal["cpu", "gpu"] = "cpu" if _on_cpu(str(trainer.get("accelerator") or "auto")) else "gpu"
    local, nodes = _devices(trainer.get("devices"), accelerator), int(trainer.get("num_nodes") or 1)
    memory, source = _memory(accelerator, local) if memory_gb is None else (int(memory_gb * GIB), "--memory_gb")
    return Plan(
        accelerator=accelerator,
        local_ranks=local,
        nodes=nodes,
        shards=_shards(strategy, local * nodes, nodes),
        strategy=strategy,
        precision=str(trainer.get("precision") or "32-true"),
        memory=memory,
        memory_source=source,
    )


def _on_cpu(accelerator: str) -> bool:
    return accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())


def _devices(devices: Any, accelerator: str) -> int:
    """Processes a node: a count, a list of devices, or all there are."""
    everything = 1 if accelerator == "cpu" else max(1, torch.cuda.device_count())
    if isinstance(devices, list | tuple):
        return len(devices)
    text = str(devices if devices is not None else "auto")
    if text in ("auto", "-1"):
        return everything
    return len([part for part in text.split(",") if part]) if "," in text else int(text)


def _shards(strategy: Any, ranks: int, nodes: int) -> int:
    if isinstance(strategy, ModelParallelStrategy):
        size = data_parallel_size(strategy)
        return nodes if size == "auto" else int(size)
    if isinstance(strategy, FSDPStrategy):
        return _fsdp1_shards(strategy, ranks, nodes)
    named = strategy if isinstance(strategy, str) else ""
    return ranks if named.startswith("fsdp") else 1


def _fsdp1_shards(strategy: FSDPStrategy, ranks: int, nodes: int) -> int:
    """NO_SHARD keeps all on each rank; the hybrid ones share over the second dimension of a mesh, by default over a node."""
    name, mesh = strategy.sharding_strategy.name, strategy.kwargs.get("device_mesh")
    if name == "NO_SHARD":
        return 1
    if "HYBRID" not in name:
        return ranks
    return int(mesh[1]) if isinstance(mesh, tuple | list) else ranks // nodes


def _memory(accelerator: str, local_ranks: int) -> tuple[int | None, str]:
    """Bytes a rank may use on this machine, and where the number comes from."""
    if accelerator == "cpu":
        return host_memory() // local_ranks, f"this machine's memory over {local_ranks} rank(s)"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return int(properties.total_memory), str(properties.name)
    return None, "no GPU on this machine"


def host_memory() -> int:
    """Bytes of memory this process may use: the machine's, or the container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open(CGROUP_LIMIT) as file:
            text = file.read().strip()
    except OSError:
        return total
    return min(total, int(text)) if text.isdigit() else total
