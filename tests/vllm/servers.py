"""Real vLLM servers on the CPU, in processes that can be killed and restarted.

    python -m tests.vllm.servers PORT FOLDER PID_FILE

stops the server whose process id the file holds and starts one of the model in FOLDER: what ``RestartCommand`` runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
START_SECONDS = 900.0  # a busy machine takes more than five minutes
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "PYTHONPATH": "",
}
# a prompt cut in two by chunked prefill breaks the seeded generators of vLLM 0.32 on a CPU
FLAGS = ["--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"]


def free_port() -> int:
    """One that nothing listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class RealServer:
    """One server, started and killed as often as a test likes.

    Args:
        model: folder it serves, under the name "student".
        log: file for its output.
        port: where; default a free one.
        flags: further ones.
    """

    def __init__(self, model: str, log: Path, *, port: int | None = None, flags: Sequence[str] = ()) -> None:
        self.model, self.log, self.port, self.flags = model, log, port or free_port(), flags
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it; it answers some 30 to 60 seconds later."""
        command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, *FLAGS]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "student"]
        command += ["--max-logprobs", "64", *self.flags]
        with self.log.open("a") as output:
            environment = os.environ | ENVIRONMENT
            options = {"stdout": output, "stderr": output, "cwd": self.log.parent, "start_new_session": True}
            self.process = subprocess.Popen(command, env=environment, **options)  # type: ignore[call-overload]

    def kill(self) -> None:
        """kill -9 of the server and its engine processes."""
        assert self.process is not None
        end(self.process.pid)
        self.process.wait(60)


def end(group: int) -> None:
    """kill -9 of a server's process group; returns when its first process is gone or a zombie."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    for _ in range(600):
        state = Path(f"/proc/{group}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise TimeoutError(f"process {group} does not end")


def restart(port: int, folder: str, pid_file: Path) -> None:
    """End the old server, start a new one."""
    if pid_file.exists():
        end(int(pid_file.read_text()))
    server = RealServer(folder, pid_file.with_suffix(".log"), port=port)
    server.start()
    assert server.process is not None
    pid_file.write_text(str(server.process.pid))


if __name__ == "__main__":
    restart(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
