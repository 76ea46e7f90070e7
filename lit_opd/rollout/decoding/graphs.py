"""Replaying a decode step: one CUDA graph for the shapes a step has now.

Rows only become fewer and columns only more, so shapes that were left do not come back within a rollout: one graph is held, and
the next one takes over its memory. Between rollouts weights, or their 16-bit copies, may stand elsewhere, so nothing is kept: a
capture costs about as much of the processor's time as two steps without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import torch

Step = Callable[[], None]

_REFUSED: set[str] = set()  # kinds of device where a capture failed


class Capture(Protocol):
    """How a step is repeated without Python."""

    def warm_up(self, step: Step) -> None:
        """Run ``step`` once, as it has to be before it is captured."""

    def captured(self, step: Step) -> Step:
        """What repeats ``step``, which is not run.

        Raises:
            RuntimeError: an operation, the driver or a lack of memory forbids it.
        """


class CudaCapture:
    """Captures in CUDA graphs that share a memory pool, which is given back when this object goes.

    Calls ``CUDAGraph`` itself: torch's context manager empties the allocator's cache before every capture.
    """

    def __init__(self, device: torch.device) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None  # before its pool: what is set first goes first
        with torch.cuda.device(device):
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.MemPool()

    def warm_up(self, step: Step) -> None:
        """On the stream that captures: libraries allocate their workspaces there."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            step()
        current.wait_stream(self.stream)

    def captured(self, step: Step) -> Step:
        """See ``Capture``. Other threads, such as NCCL's watchdog, may use the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.stream.device)
        with torch.cuda.stream(self.stream):
            graph.capture_begin(self.pool.id, "thread_local")  # type: ignore[arg-type]
            try:
                step()
            finally:
                graph.capture_end()
        self.graph = graph  # the one before goes now: this one had its memory to take over
        return graph.replay


def capture_on(device: torch.device) -> Capture | None:
    """What captures steps on a device; None where they are run as they are."""
    return CudaCapture(device) if device.type == "cuda" and device.type not in _REFUSED else None


class StepGraphs:
    """Runs steps whose shapes stay for a while: the first one eagerly, the others captured and replayed.

    A step changes tensors in place and nothing of Python's, and reads nothing back to the host.

    Args:
        device: where it runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.replay: Step | None = None  # before the pool of its graph
        self.kind, self.capture, self.version = device.type, capture_on(device), -1

    def run(self, step: Step, version: int) -> None:
        """One step.

        Args:
            step: what to run.
            version: another number whenever a shape or an address has changed that the step reads or writes.
        """
        if self.capture is None:
            step()
        elif self.version != version:
            self.version, self.replay = version, None
            self.capture.warm_up(step)
        else:
            self.replay = self.replay or self._captured(self.capture, step)
            (self.replay or step)()

    def _captured(self, capture: Capture, step: Step) -> Step | None:
        try:
            return capture.captured(step)
        except RuntimeError as error:
            _REFUSED.add(self.kind)
            self.capture = None
            warnings.warn(
                "DecodeSampler starts the operations of a decode step one by one, which is slower: no CUDA graph of it could be "
                f"captured ({error})",
                stacklevel=2,
            )
            return None
