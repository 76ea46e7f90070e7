"""Why an engine failed, from what its processes print."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lit_opd.rollout.engine_output import Output, reason, remedy, root_cause

POINTER = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
# lines of vLLM 0.32 on a CPU, frames left out
TOO_MUCH = """\
(MainProcess pid=11) WARNING 11-26 21:05:01 [cpu.py:224] Triton is not installed. triton-cpu is expected on x86 CPUs.
(Worker pid=51) ERROR 11-26 21:07:06 [multiproc_executor.py:1063] WorkerProc hit an exception.
(Worker pid=51) ERROR 11-26 21:07:06 [multiproc_executor.py:1063] Traceback (most recent call last):
(Worker pid=51) ERROR 11-26 21:07:06 [multiproc_executor.py:1063]     raise ValueError(
(Worker pid=51) ERROR 11-26 21:07:06 [multiproc_executor.py:1063] ValueError: Available memory on node 0 (21.2/23.5 GiB) on kv \
cache allocation is less than requested memory for kv (100000.0 GiB). Decrease VLLM_CPU_KVCACHE_SPACE.
(EngineCore pid=48) ERROR 11-26 21:07:06 [core.py:1510] EngineCore failed to start.
(EngineCore pid=48) ERROR 11-26 21:07:06 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=48) ERROR 11-26 21:07:06 [core.py:1510]     raise RuntimeError(
(EngineCore pid=48) ERROR 11-26 21:07:06 [core.py:1510] RuntimeError: Worker failed with error 'Available memory on node 0', \
please check the stack trace above for the root cause
(EngineCore pid=48) ERROR 11-26 21:07:12 [multiproc_executor.py:315] Worker proc VllmWorker-0 died unexpectedly
"""
TOO_LITTLE = """\
(EngineCore pid=26) ERROR 11-26 21:05:56 [core.py:1510]     raise ValueError(
(EngineCore pid=26) ERROR 11-26 21:05:56 [core.py:1510] ValueError: To serve at least one request with the model's max seq len \
(4000000), (1.91 GiB KV cache is needed, which is larger than the available KV cache memory (1.0 GiB).
"""
ON_A_GPU = """\
\x1b[1;36m(EngineCore_DP0 pid=7)\x1b[0;0m ERROR 11-26 10:00:00 [core.py:800] ValueError: No available memory for the cache \
blocks. Try increasing `gpu_memory_utilization` when initializing the engine.
"""
DAMAGED = """\
(Worker pid=97) ERROR 11-26 21:10:21 [multiproc_executor.py:953] safetensors._safetensors_rust.SafetensorError: Error while \
deserializing header: invalid header length
"""
PLAIN = """\
Process EngineCore:
Traceback (most recent call last):
  File "core.py", line 1514, in run_engine_core
    raise e
KeyError: 'model.layers.0.mlp'

During handling of the above exception, another exception occurred:

torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.
"""


@pytest.mark.parametrize(
    ("text", "why", "help"),
    [
        (TOO_MUCH, "ValueError: Available memory on node 0 (21.2/23.5 GiB)", "lower `memory_fraction`"),
        (TOO_LITTLE, "ValueError: To serve at least one request", "raise `memory_fraction`"),
        (ON_A_GPU, "ValueError: No available memory for the cache blocks.", "raise `memory_fraction`"),
        (DAMAGED, "safetensors._safetensors_rust.SafetensorError: Error while deserializing header", None),
        (PLAIN, "torch.OutOfMemoryError: CUDA out of memory.", "lower `memory_fraction`"),
        (PLAIN + TOO_LITTLE, "ValueError: To serve at least one request", "raise `memory_fraction`"),
    ],
)
def test_the_first_error_that_was_logged_is_the_reason(text, why, help):
    found = reason(POINTER, text)
    assert found.startswith(why) and "\n" not in found
    assert remedy(found) is None if help is None else remedy(found).startswith(help)


def test_an_exception_that_says_it_itself_is_believed():
    page = (
        "1 validation error for ModelConfig\n  Value error, User-specified max_model_len (100) is greater than the derived "
        "max_model_len (64) [type=value_error]\n    For further information visit https://errors.pydantic.dev"
    )
    assert reason(ValueError(page), TOO_MUCH).startswith("User-specified max_model_len (100) is greater")
    assert "max_model_len" in (remedy(reason(ValueError(page), "")) or "")
    unknown = TypeError("EngineArgs.__init__() got an unexpected keyword argument 'no_such'")
    assert reason(unknown, TOO_MUCH) == str(unknown) and remedy(str(unknown)) == "correct `engine_options`"


def test_without_any_reason_the_pointer_is_what_is_left():
    assert reason(POINTER, "INFO nothing here\n") == str(POINTER) and root_cause("") is None
    assert reason(RuntimeError(), "") == "RuntimeError"


def test_what_a_child_writes_is_passed_on_and_kept(capfd):
    """The child outlives the block, as an engine does; what this process writes afterwards is its own again."""
    output = Output()
    code = (
        "import sys, time; print('begun', flush=True); sys.stdin.readline(); print('ValueError: gone', file=sys.stderr)"
    )
    with output.shared():
        os.write(1, b"while it starts\n")
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True)
    os.write(1, b"ours\n")
    child.communicate("go\n", timeout=30)
    assert "begun" in output.text and "while it starts" in output.text and "ours" not in output.text
    assert root_cause(output.text) == "ValueError: gone"
    out, err = capfd.readouterr()
    assert "begun" in out and "while it starts" in out and out.count("ours") == 1 and err == "ValueError: gone\n"
    output.forget()
    assert root_cause(output.text) is None
