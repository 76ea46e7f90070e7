"""New weights for an engine on the same CUDA device, without a disk: vLLM's weight transfer by CUDA IPC.

vLLM's own trainer side assumes one engine for all ranks and lets only rank 0 send; here every rank has an engine. So its worker
side is spoken to directly, as vLLM documents it (training/weight_transfer, backend "ipc"); 0.23 to 0.32 differ in one word:
`init_weight_transfer_engine`, then for each new version `start_weight_update`, `update_weights` for each chunk and
`finish_weight_update`. A chunk is one buffer of bytes with the weights of a unit side by side ("packed"). vLLM copies them
out of it before the call returns, so that the buffer can be used again.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from lit_opd.rollout.weights import PACKED_AT_INIT, StudentWeights, Unit, release

IPC_ENVIRONMENT = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"
}  # handles are pickled; they pass between us and our own child only
IPC_CONFIG = {"backend": "ipc"}  # of `weight_transfer_config`
COLLECTS = (0, 28)  # from here on a buffer can be freed after its transfer; before, one is kept for all of them

Handle = Callable[[Tensor], dict[str, tuple[Any, ...]]]  # how another process opens a tensor, by the name of the device


def cuda_handle(buffer: Tensor) -> dict[str, tuple[Any, ...]]:
    """What a process that sees the same device needs to open ``buffer`` [n], by the device's UUID."""
    _, arguments = reduce_tensor(buffer)
    return {str(torch.cuda.get_device_properties(buffer.device).uuid): arguments}


class IPCTransfer:
    """Sends a student's weights to one ``vllm.LLM`` that was started with ``weight_transfer_config`` of backend "ipc".

    Args:
        llm: the engine.
        version: of vLLM.
        handle: how a buffer is opened by the engine's process, default ``cuda_handle``.
    """

    def __init__(self, llm: Any, version: str, handle: Handle | None = None) -> None:
        self.llm, self.handle = llm, handle or cuda_handle
        self.said_once, self.collects = release(version) >= PACKED_AT_INIT, release(version) >= COLLECTS
        self.sent, self.met = _Sent(self), False

    def send(self, student: StudentWeights) -> None:
        """All weights, unit after unit; returns when the engine samples from them. Whatever fails, ``student`` hears of it while
        it gives a unit, so that it can go on with the other ranks.

        Raises:
            Exception: whatever vLLM raises; the engine's weights are then of no version.
        """
        self.sent.units = 0
        student.each_unit(self.sent)
        if not self.sent.units:
            raise RuntimeError("the student has no weights to send")
        self.llm.finish_weight_update()
        if self.collects:
            self.sent.forget()

    def begin(self) -> None:
        """Open an update, after the two sides have met once."""
        if not self.met:
            self.llm.init_weight_transfer_engine({"init_info": {"packed": True} if self.said_once else {}})
            self.met = True
        self.llm.start_weight_update()

    def update(self, unit: Unit, buffer: Tensor, sizes: list[int], handles: dict[str, tuple[Any, ...]]) -> None:
        """Tell the engine of one chunk.

        Args:
            unit: names and weights of the chunk.
            buffer: uint8 [n], their bytes one after the other.
            sizes: bytes of each weight.
            handles: how the engine's process opens the buffer.
        """
        info: dict[str, Any] = {
            "names": [name for name, _ in unit],
            "dtype_names": [str(value.dtype).removeprefix("torch.") for _, value in unit],
            "shapes": [list(value.shape) for _, value in unit],
            "tensor_sizes": sizes,
            "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
        }
        if not self.said_once:
            info["packed"] = True
        if buffer.is_cuda:
            torch.cuda.current_stream(buffer.device).synchronize()  # the other process reads without our stream
        self.llm.update_weights({"update_info": info})


class _Sent:
    """Puts units into one buffer that grows to the largest of them, and sends it."""

    def __init__(self, transfer: IPCTransfer) -> None:
        self.transfer, self.units = transfer, 0
        self.buffer: Tensor | None = None
        self.handles: dict[str, tuple[Any, ...]] = {}

    def forget(self) -> None:
        """Give the buffer back."""
        on_cuda = self.buffer is not None and self.buffer.is_cuda
        self.buffer, self.handles = None, {}
        if on_cuda:
            torch.cuda.ipc_collect()

    def __call__(self, unit: Unit) -> None:
        if not self.units:
            self.transfer.begin()
        unit = sorted(
            unit, key=lambda named: -named[1].itemsize
        )  # a place in the buffer is a multiple of the item's size
        sizes = [value.nbytes for _, value in unit]
        buffer = self._room(sum(sizes), unit[0][1])
        start = 0
        for (_, value), size in zip(unit, sizes, strict=True):
            buffer[start : start + size].copy_(value.contiguous().flatten().view(torch.uint8))
            start += size
        self.transfer.update(unit, buffer, sizes, self.handles)
        self.units += 1

    def _room(self, needed: int, like: Tensor) -> Tensor:
        """The buffer, of at least ``needed`` bytes; another one is announced to the engine by another handle."""
        if self.buffer is None or len(self.buffer) < needed:
            self.buffer = None
            self.buffer = torch.empty(needed, dtype=torch.uint8, device=like.device)
            self.handles = self.transfer.handle(self.buffer)
        return self.buffer
