"""A SelfTeacher on two ranks: the same weights and average as in one process, gone on from a checkpoint bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import self_ranks, tiny

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 900  # seconds


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp1"])
def test_two_ranks_are_one_process(folders, tmp_path, strategy):
    out = tmp_path / "out.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.helpers.self_ranks", str(out), *folders, strategy]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert out.exists(), done.stdout[-2000:] + done.stderr[-6000:]
    compare(torch.load(out, weights_only=True), folders, tmp_path)


def compare(found, folders, folder: Path) -> None:
    """What two ranks gave by case with one process."""
    for name in self_ranks.CASES:
        one, two = self_ranks.run(folders, name, folder), found[name]
        assert not isinstance(two, str), (name, two)
        assert one["whole"].keys() == two["whole"].keys()
        for key, value in one["whole"].items():
            assert torch.allclose(two["whole"][key], value, atol=1e-9, rtol=0), (name, key)
            assert torch.equal(two["again"][key], two["whole"][key]), (name, key)
        for ours, theirs in zip(two["whole logprobs"], one["whole logprobs"], strict=True):
            width = min(len(ours), len(theirs))
            assert torch.allclose(ours[:width], theirs[:width], atol=1e-9, rtol=0), name
