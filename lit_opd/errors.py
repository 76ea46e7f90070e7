"""What the user is told when something cannot go on: the errors, and how they are raised."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from signal import Signals
from typing import Any


class InputError(ValueError):
    """Something the user gave is wrong; the message names the field, the value and the remedy.

    ``on_every_rank`` is True where all ranks raise it at the same place, so that collectives still match; ``torn`` where an
    update was cut short, so that some weights are of the step before and some of the one after.
    """

    on_every_rank = False
    torn = False


class ServerError(RuntimeError):
    """A server failed for good; the message names its address, what happened and the remedy.

    ``on_every_rank`` is True where all ranks raise it at the same place, so that collectives still match.
    """

    on_every_rank = False


class Stopped(SystemExit):
    """A signal asked the run to stop, and it stopped between two batches' updates; ends the process with its exit status.

    Args:
        signum: the signal.
        code: exit status.
        requeue: a SLURM job that is queued again.
    """

    on_every_rank = True

    def __init__(self, signum: int, code: int = 0, *, requeue: bool = False) -> None:
        super().__init__(code)
        self.signum, self.requeue = signum, requeue

    def __str__(self) -> str:
        return f"stopped by {Signals(self.signum).name}"


CPU_ALLOCATOR = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


def require(holds: bool, field: str, allowed: str, value: object, remedy: str = "") -> None:
    """Refuse a setting that is out of its range.

    Args:
        holds: whether the value is allowed.
        field: as the user writes it, "Class.field" or "--option".
        allowed: what it must be.
        value: what it is.
        remedy: for the user, where ``allowed`` does not say it.
    Raises:
        InputError: ``holds`` is False.
    """
    if not holds:
        raise InputError(f"`{field}` must be {allowed}, got {value!r}" + (f"; {remedy}" if remedy else ""))


def is_integer(value: Any) -> bool:
    """An int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """A real number other than NaN and the infinities; no bool in disguise."""
    return (is_integer(value) or isinstance(value, float)) and math.isfinite(value)


def first_line(error: BaseException) -> str:
    """What an exception says, without the page that may follow; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# -- a stop waits for what must be put back ----------------------------------------------------------------------------

_exchanges = 0  # blocks of `put_back_first` that run
_waiting: list[Callable[[], Any]] = []  # stops that came meanwhile


@contextmanager
def put_back_first() -> Iterator[None]:
    """While the block runs, the state is not what a checkpoint may hold (other values are in the student's weights, say): a
    signal's stop waits until the block has put it back. So the block is short, one micro-batch, and puts back what it changed.

    Raises:
        Stopped: at the end, where a signal came meanwhile.
    """
    global _exchanges
    _exchanges += 1
    try:
        yield
    finally:
        _exchanges -= 1
        while _waiting and not _exchanges:
            _waiting.pop()()


def stop_when_put_back(stop: Callable[[], Any]) -> None:
    """Call ``stop``, which raises ``Stopped``: now, or at the end of the block of ``put_back_first`` that a signal came in."""
    if _exchanges:
        _waiting.append(stop)
    else:
        stop()


# -- memory that runs out ----------------------------------------------------------------------------------------------


def out_of_memory(error: BaseException) -> bool:
    """True for what torch raises when a device or the machine has no memory left."""
    import torch  # where it is needed: commands that only print must not wait seconds for it

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in CPU_ALLOCATOR)


@contextmanager
def memory_for(what: str, remedy: str, *, torn: bool = False) -> Iterator[None]:
    """Memory that runs out while the block runs is an error that names the setting.

    Args:
        what: the block does.
        remedy: for the user.
        torn: the block changes weights, and leaves some of them changed where it ends early.
    Raises:
        InputError: it did.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        failed = InputError(f"out of memory while {what}; {remedy} ({first_line(error)})")
        failed.torn = torn
        raise failed from error
