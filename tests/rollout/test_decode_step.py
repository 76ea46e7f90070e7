"""The decode step as CUDA runs it, on a CPU: shapes in buckets, replayed operations, 16-bit weights; against ``generate`` and
the model's own forward."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_opd.models import sharding
from lit_opd.rollout import DecodeSampler, RatioStop, TransformersSampler
from lit_opd.rollout.decoding import buckets, drawing, graphs, plain_decoder
from lit_opd.rollout.decoding import sampler as decode
from lit_opd.rollout.decoding.buckets import Buckets
from lit_opd.scoring.model import ScoringModel
from tests.helpers import tiny
from tests.helpers.recorded import Operations, Recorder, tensors
from tests.rollout.test_decode import flat, policy_of, prompts, qwen3, require_same, settings
from tests.rollout.test_plain_decoder import qwen2

CPU, BF16 = torch.device("cpu"), torch.bfloat16
ours, reference = DecodeSampler(max_new_tokens=12), TransformersSampler(max_new_tokens=12)


@pytest.fixture(scope="module")
def policy() -> ScoringModel:
    return policy_of(qwen3())


@pytest.fixture
def as_on_cuda(monkeypatch) -> Recorder:
    """Buckets as on a device, so small that a short response meets several; steps recorded and replayed; SDPA's kernels."""
    monkeypatch.setattr(Buckets, "of", lambda device: Buckets(fixed=True))
    monkeypatch.setattr(buckets, "COLUMNS", 4)
    monkeypatch.setattr(buckets, "ALIGNED", 2)
    monkeypatch.setattr(plain_decoder, "_takes_products", lambda weight, half: False)
    recorder = Recorder()
    monkeypatch.setattr(graphs, "capture_on", lambda device: recorder)
    return recorder


VARIANTS: dict[str, dict[str, Any]] = {
    "sampled": {},
    "nucleus": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    "greedy": {"greedy": True, "stop_ids": (1,)},
    "no stop": {"stop_ids": ()},
    "one token": {"max_new_tokens": 1},
    "cut vocabulary": {"vocabulary": 30},
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("build", [qwen3, qwen2, lambda: tiny.llama(seed=4).double()], ids=["qwen3", "qwen2", "tied"])
def test_replayed_steps_draw_the_tokens_of_generate(as_on_cuda, monkeypatch, build, variant):
    """Ragged prompts, 11 rows of a bucket of 16, rows that leave, several buckets of columns; float64."""
    monkeypatch.setattr(decode, "CHECK_EVERY_ON_CPU", 3)
    model, wanted = policy_of(build()), settings(**VARIANTS[variant])
    require_same(
        ours.sample(model, prompts(11), wanted).trimmed(), reference.sample(model, prompts(11), wanted).trimmed()
    )
    assert as_on_cuda.replayed or variant == "one token"


def test_a_row_that_is_alone_and_rows_that_share_a_prompt(as_on_cuda, policy):
    for batch in (prompts(1), prompts(3, ragged=False), prompts(2, repeat=5)):
        require_same(ours.sample(policy, batch, settings()), reference.sample(policy, batch, settings()))


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_captures_are_as_few_as_buckets(as_on_cuda, monkeypatch, policy, share):
    """11 rows are a bucket of 16. A bucket is met once: rows only become fewer, columns only more; its first step is eager."""
    monkeypatch.setattr(decode, "ENDED_SHARE", share)
    shapes: list[tuple[int, int]] = []
    advance = decode._PlainWriter.advance
    monkeypatch.setattr(
        decode._PlainWriter, "advance", lambda self: (advance(self), shapes.append(self.fixed.shape))[0]
    )
    ours.sample(policy, prompts(11), settings(stop_ids=(1, 9, 20, 33, 47)))
    assert {rows for rows, _ in shapes} <= {16, 8, 4, 2, 1} and shapes[-1][0] < 16
    assert {columns for _, columns in shapes} <= set(range(4, 19, 2))
    assert as_on_cuda.eager == len(set(shapes)) >= 3
    assert 1 <= len(as_on_cuda.recorded) <= as_on_cuda.eager
    assert as_on_cuda.eager + as_on_cuda.replayed == len(shapes)


def logged_steps(monkeypatch: Any, sample: Any) -> list[tuple[int, Operations]]:
    """What runs in each step of ``sample()``, beside the version of the buffers."""
    seen: list[tuple[int, Operations]] = []
    step = decode._PlainWriter._step

    def noted(self: Any) -> None:
        with Operations() as operations:
            step(self)
        seen.append((self.fixed.version, operations))

    monkeypatch.setattr(graphs, "capture_on", lambda device: None)
    monkeypatch.setattr(decode._PlainWriter, "_step", noted)
    sample()
    return seen


STEPS = {
    "float64": {},
    "bf16": {},
    "nucleus": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    "greedy": {"greedy": True},
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_in_a_bucket_read_nothing_and_change_no_shape(as_on_cuda, monkeypatch, name):
    """Every operation of a step with the shapes it reads and writes, step by step, from the first token to the last; a
    vocabulary in blocks, with rows that name no token."""
    model = tiny.qwen3(seed=1, rows=drawing.SMALL + 77)
    policy = ScoringModel(model if name == "bf16" else model.double(), vocabulary=drawing.SMALL + 70, unused=(5, 7))
    wanted = settings(max_new_tokens=12, stop_ids=(), vocabulary=drawing.SMALL + 70, **STEPS[name])
    with torch.autocast("cpu", dtype=BF16, enabled=name == "bf16"):
        assert decode._runs_plain(policy, CPU)
        seen = logged_steps(monkeypatch, lambda: ours.sample(policy, prompts(5), wanted))
    logs: dict[int, list[Any]] = {}
    for version, operations in seen:
        assert not operations.host
        logs.setdefault(version, []).append(operations.log)
    assert [len(found) for found in logs.values()] == [2, 4, 4, 1]  # behind 6 columns: up to 8, 12, 16, 18
    assert all(log == found[0] for found in logs.values() for log in found)
    assert all(len(log) > 50 for found in logs.values() for log in found)


def test_host_reads_and_numbers_of_the_host_would_be_seen():
    with Operations() as operations:
        assert int(torch.ones(2).sum()) == 2
        torch.where(torch.ones(2) > 0, torch.ones(2), 0.0)
    assert {"_local_scalar_dense", "scalar_tensor"} <= set(operations.host)


def test_what_python_computes_in_a_step_would_show(as_on_cuda, policy, monkeypatch):
    """The replay really is frozen: a column counted in Python makes other tokens."""
    monkeypatch.setattr(decode.FixedRows, "column", property(lambda self: self.filled - 1))
    found = ours.sample(policy, prompts(8), settings(stop_ids=()))
    assert not torch.equal(found.response_ids, reference.sample(policy, prompts(8), settings(stop_ids=())).response_ids)


@pytest.mark.parametrize("chunk", [1, 3])
def test_rows_given_up_by_the_teacher_leave_buckets_too(monkeypatch, policy, chunk):
    judge = policy_of(flat(tiny.qwen3(seed=5))).eval().requires_grad_(False)
    wanted = settings(stop=RatioStop(0.3, chunk=chunk).watching(judge))
    exact = ours.sample(policy, prompts(11), wanted)
    monkeypatch.setattr(Buckets, "of", lambda device: Buckets(fixed=True))
    recorder = Recorder()
    monkeypatch.setattr(graphs, "capture_on", lambda device: recorder)
    found = ours.sample(policy, prompts(11), wanted)
    require_same(exact, found)
    torch.testing.assert_close(exact.teacher_logprobs, found.teacher_logprobs, rtol=0, atol=1e-9)
    assert recorder.replayed


def test_a_capture_that_fails_is_said_once_and_costs_no_token(as_on_cuda, monkeypatch, policy):
    monkeypatch.setattr(graphs, "_REFUSED", set())
    as_on_cuda.fails = "operation not permitted when stream is capturing"
    with pytest.warns(UserWarning, match="one by one, which is slower: no CUDA graph .* not permitted") as said:
        found = ours.sample(policy, prompts(8), settings())
    assert len([one for one in said if "CUDA graph" in str(one.message)]) == 1
    require_same(found, reference.sample(policy, prompts(8), settings()))
    assert graphs._REFUSED == {"cpu"}


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (17, 32), (32, 32), (33, 64), (100, 128)])
def test_row_buckets(rows, bucket):
    assert Buckets(fixed=True).rows(rows) == bucket
    assert Buckets(fixed=False).rows(rows) == rows


def test_column_buckets_hold_what_is_written_and_end_at_the_longest_response():
    for filled in range(1, 1001):
        for kind in (Buckets(fixed=True), Buckets(fixed=False)):
            held = kind.columns(filled, most=1000)
            assert filled <= held <= 1008
    assert {Buckets(fixed=True).columns(filled, most=1000) for filled in range(1, 1001)} == {256, 512, 768, 1008}


# -- 16-bit weights ------------------------------------------------------------------------------------------------------


def large() -> ScoringModel:
    """Float32, a tied head, wide enough that bf16 rounds visibly."""
    torch.manual_seed(0)
    model = tiny.llama(seed=3, hidden=64, layers=3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(3.0 if weight.ndim > 1 and "embed" not in name else 1.0)
    return ScoringModel(model, vocabulary=64)


class Casts(TorchDispatchMode):
    """Shapes of float32 matrices that are cast to 16 bits, and how many 16-bit elements are alive."""

    def __init__(self, weights: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.weights, self.cast = weights, []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if "copy" in function._schema.name or function._schema.name == "aten::to":
            for tensor in tensors(out):
                source = tensors(args)[0]
                if tensor.dtype == BF16 and source.dtype == torch.float32 and tuple(source.shape) in self.weights:
                    self.cast.append(tuple(source.shape))
        return out


def test_under_autocast_a_weight_is_cast_once_for_its_steps_and_once_for_the_prompts():
    policy = large()
    with torch.autocast("cpu", dtype=BF16, cache_enabled=False):
        assert decode._runs_plain(policy, CPU)
        matrices = [tuple(w.shape) for n, w in policy.causal_lm.named_parameters() if w.ndim == 2 and "embed" not in n]
        head = tuple(policy.causal_lm.lm_head.weight.shape)
        counts = []
        for steps in (3, 12):
            with Casts({*matrices, head}) as casts:
                ours.sample(policy, prompts(4), settings(max_new_tokens=steps, stop_ids=()))
            counts.append(sorted(casts.cast))
    assert counts[0] == counts[1] == sorted([*matrices, *matrices, head])  # prompts need no head of their own


def test_the_16_bit_weights_go_with_the_rollout():
    policy = large()
    with torch.autocast("cpu", dtype=BF16, cache_enabled=False):
        ours.sample(policy, prompts(4), settings())
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alive = [value for value in gc.get_objects() if isinstance(value, Tensor) and value.dtype == BF16]
    assert not [tuple(value.shape) for value in alive if value.numel() >= 64 * 64]


def gaps(policy: ScoringModel, sampler: Any) -> Tensor:
    """|sampler - scorer| of 64 x 12 tokens under autocast, nats."""
    with torch.autocast("cpu", dtype=BF16), torch.no_grad():
        rollout = sampler.sample(policy, prompts(8, repeat=8), settings(stop_ids=()))
        return (rollout.sampler_logprobs - policy(rollout).logprobs).abs()


@pytest.mark.parametrize("build", ["llama", "qwen3"])
def test_the_plain_decoders_gap_is_no_larger_than_that_of_transformers_forward(build):
    """Its arithmetic is autocast's: float32 residuals, norms and rotations; products and attention in bf16."""
    policy = large() if build == "llama" else ScoringModel(tiny.qwen3(seed=1, hidden=64, layers=3), vocabulary=64)
    with torch.autocast("cpu", dtype=BF16):
        assert decode._runs_plain(policy, CPU)
    found, own = gaps(policy, ours), gaps(policy, reference)
    assert 0 < float(found.mean()) < 1.1 * float(own.mean())


@pytest.mark.parametrize("build", ["llama", "qwen3"])
def test_a_plain_step_under_autocast_is_the_models_own(build):
    """One step, layer by layer the same roundings: far nearer to the model's own step than that is to float32's."""
    policy = large() if build == "llama" else ScoringModel(tiny.qwen3(seed=1, hidden=64, layers=3), vocabulary=64)
    wanted = settings(max_new_tokens=2, stop_ids=())
    with torch.no_grad():
        exact = decode._probed(decode.OwnWriter, policy, prompts(8), wanted)
        with torch.autocast("cpu", dtype=BF16):
            own, plain = (
                decode._probed(kind, policy, prompts(8), wanted) for kind in (decode.OwnWriter, decode._PlainWriter)
            )
    assert float((plain - own).abs().mean()) < 0.2 * float((own - exact).abs().mean())


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    dist.destroy_process_group()


@pytest.mark.parametrize("half", [False, True])
def test_gathered_units_of_fsdp2_take_plain_steps(one_rank, monkeypatch, half):
    """On the gathered weights, which under bf16-mixed are bf16 already: no weight is cast. They are shards again afterwards."""
    policy, wanted = large(), settings(stop_ids=())
    with torch.autocast("cpu", dtype=BF16, enabled=half), torch.no_grad():
        whole = ours.sample(policy, prompts(8), wanted)
    sharded = sharding._fully_shard(policy, one_rank["data_parallel"], half=half)
    steps: list[Any] = []
    step = decode._PlainWriter._step
    monkeypatch.setattr(decode._PlainWriter, "_step", lambda self: (steps.append(self.decoder), step(self)))
    shapes = {tuple(weight.shape) for weight in sharded.parameters() if weight.ndim == 2}
    with torch.autocast("cpu", dtype=BF16, enabled=half), sharding.gathered(sharded):
        ours.sample(sharded, prompts(8), wanted)  # compares the decoder with the model's forward, once
        steps.clear()
        with Casts(shapes) as casts:
            found = ours.sample(sharded, prompts(8), wanted)
    assert len(steps) == 11
    assert half or torch.equal(found.response_ids, whole.response_ids)
    assert not half or steps[0].embedding.dtype == BF16
    assert not casts.cast
    assert all(isinstance(weight, DTensor) for weight in sharded.parameters())
    with torch.autocast("cpu", dtype=BF16, enabled=half), torch.no_grad():
        assert float((found.sampler_logprobs - sharded(found).logprobs).abs().max()) < (0.05 if half else 1e-5)


def test_shards_that_nobody_gathered_keep_the_models_own_forward(one_rank):
    sharded = sharding._fully_shard(large(), one_rank["data_parallel"])
    assert not decode._runs_plain(sharded, CPU)


def test_a_wrong_step_is_found_out_under_autocast_too():
    policy = large()
    policy.causal_lm.model.layers[1].self_attn.scaling *= 30
    with torch.autocast("cpu", dtype=BF16), pytest.warns(UserWarning, match="own forward, which is slower"):
        assert not decode._runs_plain(policy, CPU)
    policy.causal_lm.model.layers[1].self_attn.scaling /= 30
    assert decode._runs_plain(policy, CPU)  # each dtype is compared for itself
