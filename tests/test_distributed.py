"""Two gloo processes, started by torchrun, against one process: gradients in float64, and a fit that ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lit_opd.rollout import TransformersSampler
from lit_opd.sharding import check_strategy
from lit_opd.step import micro_batches, row_lengths
from lit_opd.types import InputError
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


def one_process_fit(folders, steps: int, **paths):
    """Weights of the run that is interrupted, and its optimizer's momenta in order."""
    trained = fixed.module(folders, cases.rollout(), optimizer=cases.momentum, token_budget=cases.BUDGET)
    fixed.fit(trained, cases.rollout().prompts, steps=steps, **paths)
    return fixed.weights(trained)


@pytest.fixture(scope="module")
def uninterrupted(folders):
    return one_process_fit(folders, cases.STEPS)


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two_processes_folder(request, folders, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    one_process_fit(folders, cases.STEPS // 2, save=out / "one.ckpt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.two_ranks", str(out), request.param, *folders]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return out


@pytest.fixture(scope="module")
def two_processes(two_processes_folder):
    return [torch.load(two_processes_folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


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


def test_decode_loops_of_two_ranks_sample_the_tokens_generate_samples_in_one_process(folders, two_processes):
    """Three steps in float64; the weights of steps two and three follow from the tokens before them."""
    whole = cases.rollout()
    trained = fixed.module(folders, whole, sampler=TransformersSampler(**cases.SHORT), token_budget=60)
    records = fixed.fit(trained, whole.prompts, steps=3).records
    for rank, results in enumerate(two_processes):
        for record, (ids, mask) in zip(records, results["decoded"], strict=True):
            rollout = record.rollout.rows(torch.arange(rank, len(whole.prompts), 2))
            assert torch.equal(ids[mask], rollout.response_ids[rollout.mask])
            assert torch.equal(mask.sum(-1), rollout.lengths)
    lengths = [results["decoded"][0][1].shape[1] for results in two_processes]
    assert lengths[0] != lengths[1]  # the ranks ran different numbers of steps


@pytest.mark.parametrize("case", sorted(cases.fit_cases()))
def test_three_clipped_steps_of_two_ranks_equal_one_process(folders, two_processes, case):
    whole = cases.fit_rollout(case)
    trained = fixed.module(folders, whole, **cases.fit_cases()[case])
    records = fixed.fit(trained, whole.prompts, steps=3).records
    norms = [float(record.grad_norm) for record in records]
    assert min(norms) > 2 * cases.fit_cases()[case]["gradient_clip_norm"]  # clipping was active
    for rank in two_processes:
        other_norms, other = rank["fits"][case]
        assert other_norms == pytest.approx(norms, rel=1e-9)
        assert fixed.relative_gap(other, fixed.weights(trained)) < 1e-9


@pytest.mark.parametrize("path", ["two in two", "one in two"])
def test_two_processes_go_on_from_a_checkpoint_as_if_never_stopped(uninterrupted, two_processes, path):
    for rank in two_processes:
        assert fixed.relative_gap(rank["interrupted"][path], uninterrupted) < 1e-9


def test_one_process_goes_on_from_a_checkpoint_of_two(folders, uninterrupted, two_processes_folder):
    resumed = one_process_fit(folders, cases.STEPS, load=two_processes_folder / "two.ckpt")
    assert fixed.relative_gap(resumed, uninterrupted) < 1e-9


def test_a_checkpoint_holds_the_student_only_and_its_optimizer_state_by_name(folders, two_processes_folder):
    saved = torch.load(two_processes_folder / "two.ckpt", weights_only=True)
    own = {f"student.model.{name}" for name, _ in tiny.qwen3(seed=1).named_parameters()}
    assert set(saved["state_dict"]) == own
    (state,) = saved["optimizer_states"]
    assert set(state["state"]) == own
    assert {name for group in state["param_groups"] for name in group["params"]} == own
    for name, value in saved["state_dict"].items():
        assert state["state"][name]["momentum_buffer"].shape == value.shape


@pytest.mark.parametrize(
    "strategy", [FSDPStrategy(), ModelParallelStrategy()], ids=["FSDP1", "tensor-parallel default"]
)
def test_a_strategy_that_cannot_work_is_refused_with_the_flags_that_do(strategy):
    with pytest.raises(InputError, match="tensor_parallel_size 1"):
        check_strategy(strategy)
