"""One run of ``python_tool.PythonTool``: this file run as a script, with the standard library alone.

Before the code runs, the process leaves the machine's network, process and file system views (Linux namespaces), makes an empty
folder its root, gives up every capability and bounds memory, processor time, open files and written bytes. Where any of this
cannot be done, nothing is run.
"""

from __future__ import annotations

import ast
import ctypes
import os
import resource
import signal
import sys

# what the code may import: nothing can be read once the root is empty
import bisect, cmath, collections, datetime, decimal, fractions, functools, heapq, itertools, json, math  # noqa: E401, F401  # isort: skip
import operator, random, re, statistics, string  # noqa: E401, F401  # isort: skip

MIB = 1 << 20
READY = b"ready\n"
_NEW_USER, _NEW_NET, _NEW_PID, _NEW_MOUNTS, _NEW_IPC = 0x10000000, 0x40000000, 0x20000000, 0x00020000, 0x08000000
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES = 1, 38  # of prctl
_CAPABILITIES_VERSION = 0x20080522
_OPEN_FILES = 3  # the standard ones


def main() -> None:
    """Arguments: seconds of processor time, MiB of memory, an empty folder; the code on standard input."""
    seconds, memory_mib, root = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    code = sys.stdin.buffer.read().decode()
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_NEW_USER | _NEW_NET | _NEW_PID | _NEW_MOUNTS | _NEW_IPC), "namespaces")
    child = os.fork()  # the first process of the new view; all others end with it
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else 128 - status)
    _check(libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0), "prctl")
    os.chroot(root)
    os.chdir("/")
    _check(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    _drop_capabilities(libc)
    for kind, most in (
        (resource.RLIMIT_AS, memory_mib * MIB), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, _OPEN_FILES),
    ):  # fmt: skip
        resource.setrlimit(kind, (most, most))
    os.write(1, READY)
    _run(code)


def _check(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    none = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice 32 bits
    _check(libc.capset(header, none), "capset")


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
