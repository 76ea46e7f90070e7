"""A CUDA graph without CUDA: operations of a step, recorded with the very tensors they read and wrote, and run again on those.

What Python computed while recording is frozen, as in a graph: an index, a shape or a tensor made anew would show as wrong
results. Recording runs the step, which capturing does not, so what it changed is put back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique", "_unique2"}
HOST_WRITES = {
    "scalar_tensor",
    "lift_fresh",
    "arange",
    "full",
}  # numbers of the host as tensors: some are sent to the device


def tensors(value: Any) -> list[Tensor]:
    """All tensors in it."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Operations(TorchDispatchMode):
    """What runs: name, shapes of what is read and written; and the operations themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, tuple[tuple[int, ...], ...]]] = []
        self.calls: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what stood in changed tensors that the step did not make
        self.made: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and note."""
        kwargs, inputs = kwargs or {}, tensors((args, kwargs))
        read = {_storage(tensor) for tensor in inputs}
        changes = function._schema.is_mutable
        if changes and isinstance(args[0], Tensor) and _storage(args[0]) not in self.made | self.before.keys():
            whole = args[0].as_strided((args[0].untyped_storage().nbytes() // args[0].itemsize,), (1,), 0)
            self.before[_storage(args[0])] = whole, whole.clone()
        out = function(*args, **kwargs)
        outputs = tensors(out)
        alias = bool(outputs) and all(_storage(tensor) in read for tensor in outputs)
        self.made |= {_storage(tensor) for tensor in outputs} - read
        name = function._schema.name.removeprefix("aten::")
        self.log.append((name, tuple(tuple(tensor.shape) for tensor in [*inputs, *outputs])))
        if changes or not alias:
            self.calls.append((function, args, kwargs, [] if alias else outputs))
        return out

    @property
    def host(self) -> list[str]:
        """Operations that wait for the device or send it something."""
        return [name for name, _ in self.log if name in HOST_READS | HOST_WRITES]

    def undo(self) -> None:
        """Put back what was changed."""
        for whole, before in self.before.values():
            whole.copy_(before)

    def replay(self) -> None:
        """The same operations on the same tensors."""
        for function, args, kwargs, held in self.calls:
            new = function(*args, **kwargs)
            for there, value in zip(held, tensors(new) if held else [], strict=True):
                there.copy_(value)


class Recorder:
    """A ``Capture`` (lit_opd.rollout.decoding.graphs) on a CPU.

    Args:
        fails: why nothing can be captured, None where it can.
    """

    def __init__(self, fails: str | None = None) -> None:
        self.fails, self.eager, self.recorded, self.replayed = fails, 0, [], 0

    def warm_up(self, step: Callable[[], None]) -> None:
        """Run it."""
        self.eager += 1
        step()

    def captured(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record it."""
        if self.fails is not None:
            raise RuntimeError(self.fails)
        operations = Operations()
        with operations:
            step()
        operations.undo()
        self.recorded.append(operations)

        def replay() -> None:
            self.replayed += 1
            operations.replay()

        return replay
