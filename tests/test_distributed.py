"""Two gloo processes, started by torchrun, against one process: gradients in float64, and a fit that ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_opd.step import micro_batches, row_lengths
from tests import cases, fixed, tiny

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT = 240  # seconds; a hang is a failure


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def one_process(folders):
    return {
        key: fixed.gradient(fixed.module(folders, cases.rollout(), **settings), cases.rollout().prompts)
        for key, settings in cases.gradient_cases().items()
    }


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two_processes(request, folders, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.two_ranks", str(out), request.param, *folders]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [torch.load(out / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_the_ranks_have_different_numbers_of_micro_batches():
    lengths = row_lengths(cases.rollout())
    counts = [len(micro_batches(lengths[rank::2], token_budget=cases.BUDGET)) for rank in (0, 1)]
    assert counts[0] != counts[1]


@pytest.mark.parametrize("case", sorted(cases.gradient_cases()))
def test_gradient_of_two_ranks_equals_one_process(one_process, two_processes, case):
    loss, gradient = one_process[case]
    for rank in two_processes:
        other_loss, other = rank["gradients"][case]
        assert other_loss == pytest.approx(loss, rel=1e-10)
        assert fixed.relative_gap(other, gradient) < 1e-10


def test_a_fit_with_sampling_inside_ends_on_both_ranks_with_one_loss(two_processes):
    first, second = (rank["fit"] for rank in two_processes)
    assert first[:3] == second[:3]
    assert first[3:] != second[3:]  # the ranks sampled different rows
