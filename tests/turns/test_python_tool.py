"""Code that a student wrote: what it prints comes back, and nothing else of the machine is reached."""

from __future__ import annotations

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
    with pytest.raises(ToolError, match="within 1 s"):
        tool.call("while True: pass")
    assert time.monotonic() - began < 10
    assert tool.call("x = bytearray(1 << 30)") == "MemoryError: "
    assert len(PythonTool(seconds=1, characters=50).call("while True: print('a' * 1000)")) == 50


def test_settings_out_of_range_are_named():
    for wrong in ({"seconds": 0}, {"memory_mib": 1}, {"characters": 0}, {"seconds": 1.5}):
        with pytest.raises(InputError, match=f"PythonTool.{next(iter(wrong))}"):
            PythonTool(**wrong)  # type: ignore[arg-type]
