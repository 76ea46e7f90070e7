"""A teacher with another tokenizer on two ranks: weights, denominators, the share and its bound are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import aligned, aligned_ranks

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 600  # seconds
SIZE = 2 + len(aligned.LETTERS) + len(aligned.MERGES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """A student of letters, and a teacher with merges and other ids."""
    folder = tmp_path_factory.mktemp("models")
    order = [(7 * place + 3) % SIZE for place in range(SIZE)]
    return (
        aligned.save(aligned.model(1, SIZE - 3), folder / "student", aligned.tokenizer([])),
        aligned.save(aligned.model(2, SIZE), folder / "teacher", aligned.tokenizer(aligned.MERGES, order=order)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_are_one_process(folders, tmp_path, strategy):
    out = tmp_path / "out.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.helpers.aligned_ranks", str(out), *folders, strategy]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert out.exists(), done.stdout[-2000:] + done.stderr[-6000:]
    found = torch.load(out, weights_only=True)
    for name in aligned_ranks.CASES:
        one, two = aligned_ranks.run(folders, name), found[name]
        assert one.keys() == two.keys(), (name, one, two)
        if "error" in one:
            assert one == two and "0.394 (13 of 33), got 0.5" in one["error"]
            continue
        assert one["share"] == pytest.approx(two["share"], abs=1e-12)
        for key, value in one["weights"].items():
            assert torch.allclose(two["weights"][key], value, atol=1e-9, rtol=0), (name, key)
