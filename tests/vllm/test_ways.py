"""The ways of new weights into a real engine, and the error of one that cannot start; see ``ways``."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny
from tests.vllm import servers

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4  # nats
TIME_LIMIT = 900  # seconds


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("pair"), hidden=64)


def found(way: str, folders: tuple[str, str], folder: Path) -> tuple[dict, str]:
    """What ``ways`` wrote, and its output."""
    environment = os.environ | servers.ENVIRONMENT | {"PYTHONPATH": str(servers.ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(servers.PYTHON), "-m", "tests.vllm.ways", way, *folders, str(folder / "found.pt")]
    options = {"capture_output": True, "text": True, "timeout": TIME_LIMIT}
    done = subprocess.run(command, cwd=servers.ROOT, env=environment, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return torch.load(folder / "found.pt", weights_only=True), done.stdout + done.stderr


@pytest.mark.parametrize("way", ["ipc", "adapter"])
def test_the_engine_samples_from_each_version(way, folders, tmp_path):
    """No weight is on the disk by IPC, only the adapter's otherwise; an engine of random or older weights is nats away."""
    results, said = found(way, folders, tmp_path)
    assert f"takes the student's weights by way of: {way}" in said
    first, second = results["drawn"]
    assert [first["version"], second["version"]] == [0, 1] and not torch.equal(first["ids"], second["ids"])
    assert max(first["gap"], second["gap"]) < TOLERANCE
    written = [name for name in results["written"] if name.endswith(".safetensors")]
    assert written == ([] if way == "ipc" else ["adapter_model.safetensors"])
    assert results["seconds"]["engine_start"] > results["seconds"]["weights"] > 0


def test_an_engine_that_cannot_start_says_why(folders, tmp_path):
    """More cache than the machine has: the reason is told in the child's output only."""
    results, said = found("cache", folders, tmp_path)
    error = results["error"]
    assert "\n" not in error and "root cause" not in error
    assert "could not be started: ValueError: Available memory on node 0" in error
    assert "lower `memory_fraction` (on a CPU VLLM_CPU_KVCACHE_SPACE)" in error
    assert "EngineCore failed to start" in said  # the whole of it is passed on
