"""One run of ``python_tool.PythonTool``: this file run as a script, with the standard library alone.

Before the code runs, the process leaves the machine's network, process and file system views (Linux namespaces), makes an empty
folder its root, gives up every capability and the calls that start processes and threads, and bounds memory, processor time, open
files and written bytes. Where any of this cannot be done, nothing is run.

The code is the first process of its own view. Its parent stays outside, out of its reach, and kills it when it is told to
(SIGTERM) and when the trainer's thread that waits for it is gone.
"""

from __future__ import annotations

import ast
import ctypes
import os
import platform
import resource
import signal
import sys
from typing import Any

# what the code may import: nothing can be read once the root is empty
import bisect, cmath, collections, datetime, decimal, fractions, functools, heapq, itertools, json, math  # noqa: E401, F401  # isort: skip
import operator, random, re, statistics, string  # noqa: E401, F401  # isort: skip

MIB = 1 << 20
READY = b"ready\n"
_NEW_USER, _NEW_NET, _NEW_PID, _NEW_MOUNTS, _NEW_IPC = 0x10000000, 0x40000000, 0x20000000, 0x00020000, 0x08000000
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES = 1, 38  # of prctl
_CAPABILITIES_VERSION = 0x20080522
_OPEN_FILES = 3  # the standard ones

# of seccomp: the filter's instructions, its answers, and by machine its number and those of clone, clone3, fork and vfork
_FILTERED, _LOAD, _EQUAL, _AT_LEAST, _RETURN = 2, 0x20, 0x15, 0x35, 0x06
_ALLOW, _NOT_PERMITTED = 0x7FFF0000, 0x00050001
_SET_SECCOMP, _CALL, _MACHINE, _OTHER_ABI = 22, 0, 4, 0x40000000
_STARTS = {
    "x86_64": (0xC000003E, (56, 435, 57, 58)), "aarch64": (0xC00000B7, (220, 435)), "riscv64": (0xC00000F3, (220, 435)),
}  # fmt: skip


def main() -> None:
    """Arguments: seconds of processor time, MiB of memory, an empty folder, the trainer's process; the code on standard input."""
    seconds, memory_mib, root, trainer = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(_DIE_WITH_PARENT, signal.SIGTERM, 0, 0, 0), "prctl")
    if os.getppid() != trainer:  # it went before we asked to be told
        os._exit(1)
    code = sys.stdin.buffer.read().decode()
    _check(libc.unshare(_NEW_USER | _NEW_NET | _NEW_PID | _NEW_MOUNTS | _NEW_IPC), "namespaces")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    child = os.fork()  # the first process of the new view; all others end with it
    if child:
        _guard(child)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    _check(libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0), "prctl")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.chroot(root)
    os.chdir("/")
    _check(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    _drop_capabilities(libc)
    for kind, most in (
        (resource.RLIMIT_AS, memory_mib * MIB), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, _OPEN_FILES),
    ):  # fmt: skip
        resource.setrlimit(kind, (most, most))
    _start_nothing(libc)
    os.dup2(nowhere, 2)  # nobody reads what the code says there, and a full pipe would hold it up
    os.close(nowhere)
    os.write(1, READY)
    _run(code)


def _guard(child: int) -> None:
    """Wait for the code's process and end as it did; kill it where this one is told to end."""

    def kill(*_: Any) -> None:
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGTERM, kill)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def _check(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    none = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice 32 bits
    _check(libc.capset(header, none), "capset")


def _start_nothing(libc: ctypes.CDLL) -> None:
    """From here on no process and no thread can be started: each would have bounds of its own."""
    if platform.machine() not in _STARTS:
        raise OSError(f"seccomp: must be on {', '.join(_STARTS)}, got {platform.machine()}")
    machine, calls = _STARTS[platform.machine()]
    refused = 5 + len(calls)  # the last line, which refuses; the one before it allows
    lines = [(_LOAD, 0, 0, _MACHINE), (_EQUAL, 0, refused - 2, machine)]
    lines += [(_LOAD, 0, 0, _CALL), (_AT_LEAST, refused - 4, 0, _OTHER_ABI)]
    lines += [(_EQUAL, refused - 5 - place, 0, call) for place, call in enumerate(calls)]
    lines += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _NOT_PERMITTED)]
    program = (_Instruction * len(lines))(*(_Instruction(*line) for line in lines))
    _check(libc.prctl(_SET_SECCOMP, _FILTERED, ctypes.byref(_Program(len(lines), program)), 0, 0), "seccomp")


class _Instruction(ctypes.Structure):
    """Of the filter: what to do, how many lines to go on after true and after false, a number."""

    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("number", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("lines", ctypes.c_uint16), ("first", ctypes.POINTER(_Instruction)))


def _run(code: str) -> None:
    """The code, and the value of its last line where that is an expression; an exception as its last line."""
    names = {"__name__": "__main__"}
    try:
        tree = ast.parse(code)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<code>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<code>", "eval"), names)  # type: ignore[attr-defined]
            if value is not None:
                print(repr(value))
    except BaseException as error:  # of the code, SystemExit too
        print(f"{type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
