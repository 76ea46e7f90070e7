"""Two gloo processes against one process: gradients in float64, and a fit that ends."""

from __future__ import annotations

import re
import runpy
import sys
from functools import cache, partial

import pytest
import torch
from lightning.pytorch.plugins import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_opd.errors import InputError
from lit_opd.preflight.plan import read_plan
from lit_opd.preflight.strategy_checks import check_dtypes, check_ranks, check_strategy
from lit_opd.rollout import TransformersSampler
from lit_opd.run.checkpoint_kinds import CONSOLIDATE, check_checkpoint
from lit_opd.run.shard_index import read_index
from lit_opd.step.micro_batches import micro_batches
from tests.helpers import cases, fixed, forks, tiny, two_ranks

FSDP2 = partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1)
TIME_LIMIT = 600  # seconds; a hang is a failure, a busy machine is none
# DDP is also what the two ranks of test_resume.py and test_metric_values.py train with
WHOLE = [pytest.param((name, "whole"), id=name, marks=pytest.mark.slow) for name in ("ddp", "fsdp1", "fsdp2")]
FEW = pytest.param(("fsdp2", "few"), id="fsdp2-few")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def one_process(folders):
    """Loss and gradient of a case."""

    @cache
    def found(case):
        settings = cases.gradient_cases()[case]
        return fixed.gradient(fixed.module(folders, cases.rollout_of(settings), **settings), cases.rollout().prompts)

    return found


def one_process_fit(folders, steps: int, **paths):
    """Weights of the run that is interrupted, and its optimizer's momenta in order."""
    trained = fixed.module(folders, cases.rollout(), optimizer=cases.momentum, token_budget=cases.BUDGET)
    fixed.fit(trained, cases.rollout().prompts, steps=steps, **paths)
    return fixed.weights(trained)


@pytest.fixture(scope="module")
def uninterrupted(folders):
    return one_process_fit(folders, cases.STEPS)


@pytest.fixture(scope="module", params=[*WHOLE, FEW])
def extent(request):
    """A strategy's name, and "whole" or "few"."""
    return request.param


@pytest.fixture(scope="module")
def strategy_name(extent):
    return extent[0]


@pytest.fixture(scope="module")
def two_processes_folder(extent, folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("-".join(extent))
    one_process_fit(folders, cases.STEPS // 2, save=out / "one.ckpt")
    fixed.fit(cases.adapted(folders), cases.rollout().prompts, steps=cases.STEPS // 2, save=out / "adapters-one.ckpt")
    forks.succeed("tests.helpers.two_ranks", str(out), *extent, *folders, logs=out, timeout=TIME_LIMIT)
    return out


def part(results, name):
    """What one case found; a test of a case that ``few`` leaves out is none."""
    if name not in results:
        pytest.skip("in make test-slow")
    return results[name]


@pytest.fixture(scope="module")
def two_processes(two_processes_folder):
    return [torch.load(two_processes_folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_the_ranks_have_different_numbers_of_micro_batches():
    lengths = cases.rollout().layout.row_lengths
    counts = [len(micro_batches(lengths[rank::2], token_budget=cases.BUDGET)) for rank in (0, 1)]
    assert counts[0] != counts[1]


@pytest.mark.parametrize("case", sorted(cases.gradient_cases()))
def test_gradient_of_two_ranks_equals_one_process(one_process, two_processes, case):
    part(two_processes[0]["gradients"], case)
    loss, gradient = one_process(case)
    for rank in two_processes:
        other_loss, other = rank["gradients"][case]
        assert other_loss == pytest.approx(loss, rel=1e-10)
        assert fixed.relative_gap(other, gradient) < 1e-10


@pytest.mark.parametrize("case", two_ranks.OLDER_CASES)
def test_gradient_is_the_same_where_fsdp2_opens_no_dataclass_as_before_torch_2_13(
    one_process, two_processes, strategy_name, case
):
    if strategy_name != "fsdp2" or not two_processes[0]["older hooks"]:
        pytest.skip("only FSDP2 of a torch that opens dataclasses")
    for rank in two_processes:
        other_loss, other = rank["older hooks"][case]
        assert other_loss == pytest.approx(one_process(case)[0], rel=1e-10)
        assert fixed.relative_gap(other, one_process(case)[1]) < 1e-10


def test_a_fit_with_sampling_inside_ends_on_both_ranks_with_one_loss(two_processes):
    (first, first_gap), (second, second_gap) = (rank["fit"] for rank in two_processes)
    assert first[:3] == second[:3]
    assert first[3:] != second[3:]  # the ranks sampled different rows
    assert max(first_gap, second_gap) < 1e-4  # nats: sampled from the weights that are trained, gathered


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


def test_conversations_of_two_ranks_are_those_of_one_process(folders, two_processes):
    """One rank speaks three times where the other speaks once, and both make the same collectives."""
    sampler, prompts = cases.conversing()
    trained = fixed.module(folders, cases.rollout(), sampler=sampler, token_budget=60)
    records = fixed.fit(trained, prompts, steps=2).records
    for rank, results in enumerate(two_processes):
        for record, (ids, read, turns) in zip(records, results["talked"], strict=True):
            rollout = record.rollout.rows(torch.arange(rank, len(prompts), 2))
            assert torch.equal(ids[read], rollout.response_ids[rollout.read]) and torch.equal(turns, rollout.num_turns)
    assert int(two_processes[0]["talked"][0][2].max()) == 3 and int(two_processes[1]["talked"][0][2].max()) == 1


@pytest.mark.parametrize("case", sorted(cases.fit_cases()))
def test_three_clipped_steps_of_two_ranks_equal_one_process(folders, two_processes, case):
    part(two_processes[0]["fits"], case)
    whole = cases.fit_rollout(case)
    trained = fixed.module(folders, whole, **cases.fit_cases()[case])
    records = fixed.fit(trained, whole.prompts, steps=3).records
    norms = [float(record.grad_norm) for record in records]
    assert min(norms) > 2 * cases.fit_cases()[case]["gradient_clip_norm"]  # clipping was active
    for rank in two_processes:
        other_norms, other = rank["fits"][case]
        assert other_norms == pytest.approx(norms, rel=1e-9)
        assert fixed.relative_gap(other, fixed.weights(trained)) < 1e-9


def test_the_strategys_time_out_holds_in_every_process_group(two_processes):
    for rank in two_processes:
        assert set(rank["timeouts"]) == {two_ranks.TIMEOUT.total_seconds()}


def test_recomputed_activations_leave_the_gradient_alone(one_process, two_processes):
    _, gradient = one_process("sequence-mean/sequence")  # the same settings but for the recomputation
    for rank in two_processes:
        assert fixed.relative_gap(rank["gradients"]["recomputed"][1], gradient) < 1e-10
        assert rank["layer calls"] == [1, 2]  # a second forward in the backward pass


def test_bf16_compute_gathers_bf16_and_keeps_float32_masters_and_gradients(strategy_name, two_processes):
    for rank in two_processes:
        half, whole = (rank["half precision"][precision] for precision in ("bf16-mixed", "32-true"))
        gathered = "torch.float32" if strategy_name == "ddp" else "torch.bfloat16"  # DDP gathers nothing: autocast only
        assert half["dtypes"] == [[gathered], ["torch.float32"], ["torch.float32"]]
        assert half["loss"] == pytest.approx(whole["loss"], rel=5e-3)
        assert half["norm"] == pytest.approx(whole["norm"], rel=2e-2)
        assert half["loss"] != whole["loss"]


@pytest.mark.parametrize("path", ["two in two", "one in two", "shards in two"])
def test_two_processes_go_on_from_a_checkpoint_as_if_never_stopped(uninterrupted, two_processes, strategy_name, path):
    if strategy_name == "ddp" and path == "shards in two":
        pytest.skip("DDP writes no shards")
    for rank in two_processes:
        assert fixed.relative_gap(rank["interrupted"][path], uninterrupted) < 1e-9


def test_one_process_goes_on_from_a_checkpoint_of_two(folders, uninterrupted, two_processes_folder):
    resumed = one_process_fit(folders, cases.STEPS, load=two_processes_folder / "two.ckpt")
    assert fixed.relative_gap(resumed, uninterrupted) < 1e-9


@pytest.mark.parametrize("path", ["two in two", "one in two", "shards in two"])
def test_adapters_go_on_in_two_processes_as_if_never_stopped(folders, two_processes, strategy_name, path):
    if strategy_name == "ddp" and path == "shards in two":
        pytest.skip("DDP writes no shards")
    part(two_processes[0]["adapters"], path)
    never_stopped = cases.adapted(folders)
    fixed.fit(never_stopped, cases.rollout().prompts, steps=cases.STEPS)
    expected = fixed.weights(never_stopped)
    for rank in two_processes:
        assert fixed.relative_gap(rank["adapters"][path], expected) < 1e-9
    fresh = cases.adapted(folders)
    fresh.configure_model()
    assert fixed.relative_gap(fixed.weights(fresh), expected) > 1e-3


def test_two_processes_save_adapters_and_no_base(two_processes_folder, strategy_name):
    saved = torch.load(two_processes_folder / "adapters-two.ckpt", weights_only=True)["state_dict"]
    assert saved and all("lora_" in name for name in saved)
    if (two_processes_folder / "adapters-shards.ckpt").exists():
        index = read_index(two_processes_folder / "adapters-shards.ckpt")
        named = [name for name in index.state_dict_metadata if name.split(".")[0] in ("model", "state_dict")]
        assert named and all("lora_" in name for name in named)


def consolidate(command, monkeypatch):
    """Run "-m module path" as ``python`` would, in this process, which has it loaded."""
    _, module, path = command.split()
    monkeypatch.setattr(sys, "argv", [module, path])
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def test_shards_are_refused_in_one_process_with_the_command_that_makes_them_one_file(
    folders, uninterrupted, two_processes_folder, strategy_name, monkeypatch
):
    shards = two_processes_folder / "shards.ckpt"
    if strategy_name == "ddp":
        pytest.skip("DDP writes no shards")
    with pytest.raises(InputError, match="--ckpt_path.*consolidate_checkpoint") as refused:
        check_checkpoint(shards, SingleDeviceStrategy(), training=True)
    (command,) = re.findall("`python (-m .*?)`", str(refused.value))
    consolidate(command, monkeypatch)
    resumed = one_process_fit(folders, cases.STEPS, load=f"{shards}.consolidated")
    assert fixed.relative_gap(resumed, uninterrupted) < 1e-9


def test_shards_of_another_strategy_and_consolidated_ones_are_refused(two_processes_folder, strategy_name, monkeypatch):
    shards, consolidated = (two_processes_folder / f"shards.ckpt{end}" for end in ("", ".consolidated"))
    other = {"fsdp1": FSDP2, "fsdp2": FSDPStrategy}.get(strategy_name)
    if other is None:
        pytest.skip("DDP writes no shards")
    with pytest.raises(InputError, match="the same kind of strategy"):
        check_checkpoint(shards, other(), training=True)
    own = {"fsdp1": FSDPStrategy, "fsdp2": FSDP2}[strategy_name]()
    check_checkpoint(shards, own, training=True)
    if not consolidated.exists():  # the test above makes it
        consolidate(f"{CONSOLIDATE.removeprefix('python ')} {shards}", monkeypatch)
    with pytest.raises(InputError, match="must be the folder itself"):
        check_checkpoint(consolidated, own, training=True)


@pytest.mark.parametrize("strategy", [FSDPStrategy, FSDP2], ids=["fsdp1", "fsdp2"])
def test_an_optimizer_without_state_is_refused_where_lightning_cannot_load_it(folders, tmp_path, strategy):
    for name, optimizer in (("plain", lambda p: torch.optim.SGD(p, lr=0.1)), ("momentum", cases.momentum)):
        trained = fixed.module(folders, cases.rollout(), optimizer=optimizer)
        fixed.fit(trained, cases.rollout().prompts, save=tmp_path / name)
    with pytest.raises(InputError, match=r"`model\.optimizer` must have state"):
        check_checkpoint(tmp_path / "plain", strategy(), training=True)
    check_checkpoint(tmp_path / "plain", strategy(), training=False)
    check_checkpoint(tmp_path / "plain", SingleDeviceStrategy(), training=True)
    check_checkpoint(tmp_path / "momentum", strategy(), training=True)


def test_the_divergence_from_the_teacher_is_that_of_one_process(folders, two_processes_folder):
    trained = fixed.module(folders, cases.rollout(), optimizer=cases.momentum, token_budget=cases.BUDGET)
    fixed.fit(trained, cases.rollout().prompts, steps=cases.STEPS)
    expected = trained.student_signal(cases.rollout()).token_kl
    assert float(expected.max()) > 0.1  # nats
    for rank in (0, 1):
        found = torch.load(two_processes_folder / f"divergence-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_exported_student_has_the_whole_weights(two_processes, two_processes_folder):
    exported = AutoModelForCausalLM.from_pretrained(two_processes_folder / "exported", dtype="auto")
    weights = two_processes[0]["interrupted"]["two in two"]
    assert {name: value.dtype for name, value in exported.named_parameters()} == dict.fromkeys(weights, torch.float64)
    assert fixed.relative_gap(dict(exported.named_parameters()), weights) == 0.0


def test_units_are_handed_over_whole_on_every_rank_and_one_at_a_time(strategy_name, two_processes_folder):
    """What an engine is sent equals the exported file, and a rank never holds a second unit beside its shards."""
    name, folder = strategy_name, two_processes_folder
    (file,) = (folder / "exported").glob("*.safetensors")
    exported = load_file(file)
    for rank in (0, 1):
        found = torch.load(folder / f"units-{rank}.pt", weights_only=True)
        whole = {key: value for unit in found["units"] for key, value in unit.items()}
        assert sum(map(len, found["units"])) == len(whole) and whole.keys() == exported.keys()
        assert all(torch.equal(whole[key], exported[key]) for key in exported)
        assert max(map(len, found["units"])) < len(whole) / 2
        assert found["left over"] == 0 and found["gathered"] == (len(whole) if name == "fsdp2" else 0)
        assert found["whole"] == (1 if name == "fsdp1" else 0)


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
    ("strategy", "named"),
    [
        (lambda: ModelParallelStrategy(), "tensor_parallel_size 1"),
        (lambda: FSDPStrategy(cpu_offload=True), "cpu_offload"),
        (lambda: FSDPStrategy(use_orig_params=False), "use_orig_params"),
        (lambda: FSDPStrategy(auto_wrap_policy={torch.nn.Linear}), "auto_wrap_policy"),
        (
            lambda: FSDPStrategy(activation_checkpointing_policy={torch.nn.Linear}),
            "model.student.gradient_checkpointing",
        ),
    ],
    ids=["tensor-parallel default", "offload", "flat parameters", "wrap policy", "checkpointing policy"],
)
def test_a_strategy_that_cannot_work_is_refused_with_what_does(strategy, named):
    with pytest.raises(InputError, match=named):
        check_strategy(strategy())


@pytest.mark.parametrize(
    ("given", "devices", "nodes"), [(32, 8, 1), (8, 8, 4), (2, 1, 1), ("auto", 2, 1), ("auto", 4, 2)]
)
def test_a_mesh_that_does_not_cover_the_ranks_is_refused(given, devices, nodes):
    """Lightning says so after all processes have started; a plan would divide the weights by the wrong number."""
    strategy = ModelParallelStrategy(data_parallel_size=given, tensor_parallel_size=1)
    with pytest.raises(
        InputError, match=rf"data_parallel_size` .* {devices} device.* = {devices * nodes}, got {given!r}"
    ):
        check_ranks(strategy, local_ranks=devices, nodes=nodes)
    plan = read_plan({"accelerator": "gpu", "devices": devices, "num_nodes": nodes}, strategy=strategy, memory_gb=80)
    with pytest.raises(InputError, match="data_parallel_size"):
        check_ranks(plan.strategy, local_ranks=plan.local_ranks, nodes=plan.nodes)


def test_a_mesh_of_all_ranks_is_accepted():
    for given, devices, nodes in ((32, 8, 4), (1, 1, 1), ("auto", 1, 2)):
        check_ranks(ModelParallelStrategy(given, 1), local_ranks=devices, nodes=nodes)
    check_ranks("ddp", local_ranks=8, nodes=4)


def test_fsdp1_as_lightning_builds_it_is_accepted():
    check_strategy(FSDPStrategy())


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_fsdp1_refuses_to_cast_the_teacher_to_float32(dtype):
    with pytest.raises(InputError, match="bf16-mixed"):
        check_dtypes(FSDPStrategy(), {"float32", dtype})
    check_dtypes(FSDPStrategy(precision_plugin=FSDPPrecision("bf16-mixed")), {"float32", dtype})
    check_dtypes(SingleDeviceStrategy(), {"float32", dtype})
