"""New weights for vLLM servers on other devices, without a disk: vLLM's weight transfer by NCCL.

Rank 0 and all workers of all servers form one NCCL group, in which rank 0 is number 0. The servers are spoken to as vLLM's page
on weight transfer has it (backend "nccl"; the same in 0.23 to 0.32): `/init_weight_transfer_engine` once, then for each
version `/start_weight_update`, `/update_weights` with names, dtypes and shapes of a unit while that unit is broadcast, weight
by weight, and `/finish_weight_update`.
"""

from __future__ import annotations

import importlib
import importlib.util
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from itertools import accumulate
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from lit_opd.distributed import is_rank_zero
from lit_opd.errors import InputError, ServerError, first_line, require
from lit_opd.rollout.sync import WeightSync
from lit_opd.rollout.weights import PACKAGE, StudentWeights, Unit, installed_version, why_no_transfer
from lit_opd.servers.client import Servers

OTHERWISE = "use ReloadEndpoint, which reads a folder"
_LOOK = 0.005  # seconds between two looks at a transfer
_TRANSFERS = f"{PACKAGE}.distributed.weight_transfer"


class Group(Protocol):
    """vLLM's NCCL communicator."""

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> Any:
        """Send a contiguous tensor [...] from ``src`` to all others; returns when that is queued."""


Join = Callable[[str, int, int], Group]  # host, port, number of members


def join_group(host: str, port: int, members: int) -> Group:
    """This process as number 0 of a NCCL group of vLLM's; blocks until all members are there.

    Raises:
        RuntimeError: vLLM found no NCCL here; its broadcasts would do nothing.
    """
    try:
        join = importlib.import_module(f"{_TRANSFERS}.nccl_common").trainer_init
    except ImportError:  # before 0.25
        join = importlib.import_module(f"{_TRANSFERS}.nccl_engine").NCCLWeightTransferEngine.trainer_init
    group: Any = join({"master_address": host, "master_port": port, "world_size": members})
    if getattr(group, "disabled", False):
        raise RuntimeError("vLLM found no NCCL library in the trainer's environment")
    return group  # type: ignore[no-any-return]


class NCCLTransfer(WeightSync):
    """vLLM's weight transfer by NCCL, from rank 0's GPU to those of the servers, a block at a time and without a folder. The
    servers must run with VLLM_SERVER_DEV_MODE=1 and ``--weight-transfer-config '{"backend": "nccl"}'``, on a network you trust;
    they and the trainer's environment need vLLM 0.23 to 0.32. Not for a student with LoRA.

    Args:
        host: address of rank 0's machine at which the servers reach it; None for the one it reaches the first server from.
        port: a free port of it, 0 for any.
        seconds: how long the servers may take to join, and for each unit.
    """

    def __init__(self, host: str | None = None, port: int = 0, seconds: float = 300.0) -> None:
        require(0 <= port < 2**16, "NCCLTransfer.port", "from 0 to 65535", port)
        require(seconds > 0, "NCCLTransfer.seconds", "> 0", seconds)
        self.host, self.port, self.seconds = host, port, seconds
        self.join: Join = join_group
        self._group: Group | None = None
        self._met_after = 0  # connections lost when the group was formed: a server that restarts is not in it
        self._stream: Any = None

    def check(self, servers: Servers) -> None:
        """vLLM of a known release here and at every server.

        Raises:
            InputError: another one, or none.
        """
        if importlib.util.find_spec(PACKAGE) is None:
            raise InputError(
                f"`NCCLTransfer` needs vllm in the trainer's environment too (pip install -e .[vllm]), got none; {OTHERWISE}"
            )
        found = [str(answer.get("version")) for answer in servers.get_each("/version")]
        for where, version in [
            ("the trainer's environment", installed_version()),
            *zip(servers.urls, found, strict=True),
        ]:
            unknown = why_no_transfer(version)
            if unknown is not None:
                raise InputError(f"`NCCLTransfer` cannot reach {where}: {unknown}; {OTHERWISE}")
        require(
            servers.max_concurrency >= len(servers.urls),
            f"{servers.field}.max_concurrency",
            f">= {len(servers.urls)} for NCCLTransfer, which all servers take part in at once",
            servers.max_concurrency,
        )

    def check_student(self, adapter_rank: int | None) -> None:
        """Raises InputError for a student with LoRA."""
        if adapter_rank is not None:
            raise InputError(
                f"`NCCLTransfer` sends whole weights, got a student with LoRA; {OTHERWISE}, adapter merged"
            )

    def write(self, student: StudentWeights) -> None:
        """Nothing: no file is read."""

    def push(self, servers: Servers) -> None:
        """There is no folder to read; see ``bring``."""
        raise NotImplementedError

    def bring(self, student: StudentWeights, servers: Servers) -> None:
        """Rank 0 sends, in step with the other ranks, whose shards are needed."""
        if not is_rank_zero():
            student.each_unit(lambda unit: None)
            return
        sending = _Sending(self, servers)
        try:
            student.each_unit(sending)
            sending.end()
        except BaseException:
            self._group = None  # some member may be waiting in a broadcast for ever
            raise

    def group(self, servers: Servers) -> Group:
        """The group with all workers of all servers; a new one where a connection was lost."""
        if self._group is None or self._met_after != servers.num_lost:
            self._met_after = servers.num_lost
            self._group = self._joined(servers)
        return self._group

    def _joined(self, servers: Servers) -> Group:
        sizes = [int(answer["world_size"]) for answer in servers.get_each("/get_world_size")]
        host, port = self.host or _own_address(servers.urls[0]), self.port or _free_port()
        members = 1 + sum(sizes)
        infos = [
            {"master_address": host, "master_port": port, "rank_offset": first, "world_size": members}
            for first in list(accumulate(sizes, initial=1))[: len(sizes)]
        ]
        ours = _in_thread(lambda: self.join(host, port, members))
        theirs = servers.posting("/init_weight_transfer_engine", [{"init_info": info} for info in infos])
        self.wait(servers, "join its NCCL group", theirs, ours)
        return ours.result()

    def wait(self, servers: Servers, what: str, *parts: Future[Any]) -> None:
        """Until all parts are done; the first that fails is raised at once, the others may wait for it for ever.

        Raises:
            ServerError: that, or the time is over.
        """
        end = time.monotonic() + self.seconds
        waiting = list(parts)
        while waiting:
            for part in [part for part in waiting if part.done()]:
                try:
                    part.result()
                except ServerError:
                    raise
                except RuntimeError as error:
                    raise servers.error(f"did not {what}: {first_line(error)}") from error
                waiting.remove(part)
            if waiting and time.monotonic() > end:
                raise servers.error(f"did not {what} within {self.seconds:g} s")
            time.sleep(_LOOK if waiting else 0)

    def broadcast(self, group: Group, unit: Unit) -> list[Tensor]:
        """Queue a unit's weights on a stream of its own, so that a transfer that never ends holds nothing else up.

        Returns:
            the tensors sent, each [...] as its weight, which must live until ``settle``.
        """
        sent = [value.contiguous() for _, value in unit]
        if sent[0].is_cuda:
            self._stream = self._stream or torch.cuda.Stream(sent[0].device)
            self._stream.wait_stream(torch.cuda.current_stream(sent[0].device))
        for value in sent:
            group.broadcast(value, src=0, stream=self._stream)
        return sent

    def settle(self) -> None:
        """Until what was queued has left."""
        if self._stream is not None:
            self._stream.synchronize()


class _Sending:
    """One version of the weights on its way to all servers."""

    def __init__(self, transfer: NCCLTransfer, servers: Servers) -> None:
        self.transfer, self.servers = transfer, servers
        self.group: Group | None = None

    def __call__(self, unit: Unit) -> None:
        if self.group is None:
            self.group = self.transfer.group(self.servers)
            self._all("/start_weight_update", {}, "start a weight update")
        info = {
            "names": [name for name, _ in unit],
            "dtype_names": [str(value.dtype).removeprefix("torch.") for _, value in unit],
            "shapes": [list(value.shape) for _, value in unit],
        }
        received = self.servers.posting("/update_weights", [{"update_info": info}] * len(self.servers.urls))
        sent = self.transfer.broadcast(self.group, unit)
        self.transfer.wait(self.servers, f"take {unit[0][0]}", received)
        self.transfer.settle()
        del sent

    def end(self) -> None:
        """The servers sample from it, and from no cached key or value of another."""
        self._all("/finish_weight_update", {}, "finish a weight update")
        self.servers.post_to_all("/reset_prefix_cache", {})

    def _all(self, path: str, body: dict[str, Any], what: str) -> None:
        posts = self.servers.posting(path, [body] * len(self.servers.urls))
        self.transfer.wait(self.servers, what, posts)


def _in_thread(work: Callable[[], Any]) -> Future[Any]:
    """``work`` in a thread that the process does not wait for at its end, on this thread's CUDA device."""
    done: Future[Any] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        """Do the work; its result, or a RuntimeError with what it raised, is ``done``'s."""
        try:
            if device is not None:
                torch.cuda.set_device(device)
            done.set_result(work())
        except BaseException as error:
            done.set_exception(RuntimeError(f"{type(error).__name__}: {first_line(error)}"))

    threading.Thread(target=run, name="nccl", daemon=True).start()
    return done


def _own_address(url: str) -> str:
    """Of this machine, as the machine of ``url`` sees it; nothing is sent."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect((parts.hostname, parts.port or 80))
        return str(asked.getsockname()[0])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])
