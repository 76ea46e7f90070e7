"""A rank that dies or hangs in the middle of a step: the other ends with an error inside the time-out, nothing is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import tiny

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 120  # seconds; a hang is a failure
MODULE = "tests.helpers.stopped_rank"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny.pair(tmp_path_factory.mktemp("models"))


def environment(**extra: object) -> dict[str, str]:
    """Of a rank on one thread, without a launcher's variables but ``extra``."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in extra.items()}}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def kill(*processes: subprocess.Popen) -> None:
    """End what is left, stopped processes too."""
    for process in processes:
        process.kill()
        process.wait()


def running(pid: int) -> bool:
    """True unless the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pair(tmp_path: Path, folders: tuple[str, str], name: str, signum: int) -> list[subprocess.Popen]:
    """Both ranks as torchrun would start them, but without its agent, which would end them itself."""
    port = free_port()
    started = []
    for rank in (0, 1):
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
            "GROUP_RANK": 0,
        }
        own = {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "False"}
        command = [sys.executable, "-m", MODULE, str(tmp_path), name, str(int(signum)), *folders]
        log = (tmp_path / f"log-{rank}").open("w")
        started.append(
            subprocess.Popen(command, cwd=ROOT, env=environment(**shared, **own), stdout=log, stderr=subprocess.STDOUT)
        )
    return started


TWO_CASES = "test_the_other_rank_ends_with_an_error"
CASES = {"killed": ("ddp", signal.SIGKILL, "connection"), "hanging": ("fsdp2", signal.SIGSTOP, "timed out")}


@pytest.fixture(scope="module")
def pairs(request, tmp_path_factory, folders):
    """Every case that is asked for at once: they wait more than they compute."""
    asked = {item.callspec.params["case"] for item in request.session.items if TWO_CASES in item.nodeid}
    started = {}
    for case in sorted(asked):
        name, signum, _ = CASES[case]
        out = tmp_path_factory.mktemp(case)
        started[case] = (out, pair(out, folders, name, signum))
    yield started
    for _, processes in started.values():
        kill(*processes)


@pytest.mark.parametrize("case", ["killed", pytest.param("hanging", marks=pytest.mark.slow)])
def test_the_other_rank_ends_with_an_error(pairs, case):
    out, (waiting, victim) = pairs[case]
    status = waiting.wait(TIME_LIMIT)
    log = (out / "log-0").read_text()
    assert status == 1, log[-3000:]
    assert CASES[case][2] in log.lower(), log[-3000:]
    assert victim.poll() == (-signal.SIGKILL if case == "killed" else None)  # the hanging one never went on


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "Lightning"])
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_launcher_ends_every_rank_after_one_was_killed(tmp_path, folders, launcher, name):
    command = [sys.executable]
    if launcher == "torchrun":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", MODULE, str(tmp_path), name, str(int(signal.SIGKILL)), *folders]
    with (tmp_path / "log").open("w") as log:
        parent = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        try:
            assert parent.wait(TIME_LIMIT) != 0
        finally:
            kill(parent)
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
    deadline = time.monotonic() + 10
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in pids if running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
