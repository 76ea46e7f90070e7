"""Code that a student wrote: what it prints comes back, and nothing else of the machine is reached."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_opd.errors import InputError
from lit_opd.turns.python_tool import PythonTool
from lit_opd.turns.tools import ToolError


@pytest.fixture(scope="module")
def tool() -> PythonTool:
    found = PythonTool(seconds=1)
    try:
        found.check()
    except InputError as error:
        pytest.skip(str(error))
    return found


def test_what_is_printed_and_the_last_value_come_back(tool):
    assert tool.call("import math\nprint(math.comb(5, 2))\nx = 3\nx * 2") == "10\n6"


def test_failures_of_the_code_are_its_output(tool):
    assert tool.call("1 / 0") == "ZeroDivisionError: division by zero"
    assert tool.call("x = (").startswith("SyntaxError")


def test_neither_files_network_nor_processes_are_reached(tool, tmp_path: Path):
    secret = tmp_path / "secret.txt"
    secret.write_text("hidden")
    code = f"""
import os
for attempt in (
    lambda: open({str(secret)!r}).read(),
    lambda: open("/made", "w"),
    lambda: os.mkdir("/made"),
    lambda: os.listdir("/"),
    lambda: os.chroot("/"),
    lambda: os.kill({__import__("os").getpid()}, 0),
    lambda: __import__("socket").create_connection(("127.0.0.1", 80), 1),
):
    try:
        print("reached", attempt())
    except Exception as error:
        print(type(error).__name__)
"""
    found = tool.call(code).splitlines()
    assert len(found) == 7 and not [line for line in found if line.startswith("reached") and line != "reached []"]
    assert "hidden" not in "".join(found)


def test_time_memory_and_output_are_bounded(tool):
    began = time.monotonic()
    with pytest.raises(ToolError, match="within (1 s of processor time|6 s)"):
        tool.call("while True: pass")
    assert time.monotonic() - began < 10
    assert tool.call("x = bytearray(1 << 30)") == "MemoryError: "
    assert len(PythonTool(seconds=1, characters=50).call("while True: print('a' * 1000)")) == 50


def test_the_code_starts_no_process_and_no_thread(tool):
    """Each would have bounds of its own."""
    code = "import os, _thread\nfor start in (os.fork, lambda: _thread.start_new_thread(print, ())):\n"
    code += (
        "    try: print('started', start())\n    except (OSError, RuntimeError) as error: print(type(error).__name__)"
    )
    assert tool.call(code) == "PermissionError\nRuntimeError"


def test_what_nobody_reads_holds_nothing_up_and_a_crash_is_no_time_out(tool):
    assert tool.call("import sys\nfor _ in range(20000): sys.stderr.write('a warning')\nprint('done')") == "done"
    with pytest.raises(ToolError, match=f"ended with exit status {128 + signal.SIGSEGV}"):
        tool.call("import ctypes\nctypes.string_at(0)")
    with pytest.raises(ToolError, match="no result within 6 s$"):
        tool.call("import time\ntime.sleep(60)")


def left(memory_mib: int) -> int:
    """Workers with this bound on memory that still run 5 seconds later."""
    wanted = f"\0{memory_mib}\0".encode()
    for _ in range(50):
        lines = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                lines.append(path.read_bytes())
            except OSError:  # it ended
                continue
        if not (found := sum(b"python_worker.py" in line and wanted in line for line in lines)):
            return 0
        time.sleep(0.1)
    return found


def test_code_that_leaves_its_session_ends_with_the_call(tool):
    code = "import ctypes, os, time\nos.setsid()\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\ntime.sleep(600)"
    with pytest.raises(ToolError, match="within 6 s"):
        PythonTool(seconds=1, memory_mib=97).call(code)
    assert left(97) == 0


@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), 9)"])
def test_code_ends_with_a_trainer_that_does_not_wait_for_it(tool, end):
    script = f"""
import os, threading, time
from lit_opd.turns import python_tool
call = python_tool.PythonTool(seconds=60, memory_mib=98).call
threading.Thread(target=call, args=("import time\\ntime.sleep(600)",), daemon=True).start()
time.sleep(3)
{end}
"""
    subprocess.run([sys.executable, "-c", script], check=False, timeout=120)
    assert left(98) == 0


def test_settings_out_of_range_are_named():
    for wrong in ({"seconds": 0}, {"memory_mib": 1}, {"characters": 0}, {"seconds": 1.5}):
        with pytest.raises(InputError, match=f"PythonTool.{next(iter(wrong))}"):
            PythonTool(**wrong)  # type: ignore[arg-type]
