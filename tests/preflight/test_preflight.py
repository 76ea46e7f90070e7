"""Preflight: what it finds and what it leaves, the memory budget against real models and real fits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from transformers import Qwen3Config, Qwen3MoeConfig

from callbacks import EarlyAIMEEvaluation, default_callbacks
from lit_opd.cli.command import main
from lit_opd.evaluation import SampledBatch
from lit_opd.models.student import LoraSettings, StudentSettings, build_student
from lit_opd.module import OPDModule, default_optimizer
from lit_opd.preflight import estimate, read_plan
from lit_opd.preflight.memory import ACCURACY, FLOAT32, Held, Rank, Workload
from lit_opd.preflight.sizes import NotEstimated, model_size, optimizer_bytes
from lit_opd.rollout import DecodeSampler, RatioStop, SamplingSettings, TransformersSampler
from lit_opd.rollout.decoding import layers as decoder_layers
from lit_opd.rollout.decoding.buckets import Buckets
from lit_opd.rollout.decoding.plain_decoder import PlainDecoder
from lit_opd.scoring.model import ScoringModel
from lit_opd.teacher import LocalTeacher
from lit_opd.types import PromptBatch
from tests.helpers import fake_vllm as fake
from tests.helpers import tiny
from tests.helpers.memory_fit import Shape, build

ROOT = Path(__file__).resolve().parents[2]
FEW: Any = SimpleNamespace(
    prompt_batch=4, samples_per_prompt=1, longest_prompt=4, val=None, val_fraction=None, val_batch=1
)
CPU = read_plan({"accelerator": "cpu", "devices": 1}, strategy="auto", memory_gb=1.0)
SMALL = Shape("qwen3", 64, 48, 80, 2, 4, 2, prompt=4, response=6, batch=3, steps=1)


# -- the budget against real models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "llama", "lora"])
def test_sizes_on_the_meta_device_are_those_of_the_real_model(name):
    from lit_opd.models.student import LoraSettings, _with_lora

    lora = LoraSettings(rank=4) if name == "lora" else None
    model = build(replace(SMALL, family="llama" if name == "llama" else "qwen3", tied=True), 1)
    size = model_size(model.config, lora=lora)
    if lora is not None:
        model = _with_lora(model, lora)
    weights = list(model.parameters())
    assert size.parameters == sum(weight.numel() for weight in weights)
    assert size.num_trainable == sum(weight.numel() for weight in weights if weight.requires_grad)
    assert size.trains_head == (lora is None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_adapters_count_as_they_are_kept(tmp_path, dtype):
    """In float32 on a base in 16 bits; weights, gradients and optimizer state of a real student after a step."""
    student, teacher = tiny.pair(tmp_path)
    settings = StudentSettings(student, dtype=dtype, lora=LoraSettings(rank=4))
    module = OPDModule(
        settings, LocalTeacher(teacher), TransformersSampler(6), optimizer=partial(torch.optim.AdamW, lr=1e-3)
    )
    found = estimate(module, FEW, CPU)
    model = build_student(settings)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    optimizer.step()
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    assert found.always["weights of the student"] == sum(weight.nbytes for weight in model.parameters())
    assert found.always["optimizer state"] == sum(value.nbytes for value in state)
    assert found.phases["optimizer"]["gradients"] == sum(weight.grad.nbytes for weight in trained)
    assert found.phases["optimizer"]["temporaries"] == 2 * max(weight.nbytes for weight in trained)


@pytest.mark.parametrize(("ranks", "batch", "rows"), [(1, 64, 15), (2, 64, 8), (1, 4, 4)])
def test_the_batch_of_an_evaluation_is_counted(tmp_path, ranks, batch, rows):
    """Five problems, three samples each, responses longer than in training: the cache that a real model leaves."""
    student, teacher = tiny.pair(tmp_path)
    lines = [json.dumps({"problem": f"{number} + 1 =", "answer": str(number + 1)}) for number in range(5)]
    (tmp_path / "aime.jsonl").write_text("\n".join(lines))
    given = {"samples": 3, "max_new_tokens": 20, "prompt_suffix": None, "batch": batch}
    evaluation = EarlyAIMEEvaluation(str(tmp_path / "aime.jsonl"), **given)
    module = OPDModule(StudentSettings(student), LocalTeacher(teacher), TransformersSampler(6))
    module.trainer = Trainer(accelerator="cpu", callbacks=[evaluation], logger=False, enable_checkpointing=False)
    assert "evaluation" not in estimate(module, FEW, CPU).phases
    evaluation.check(module, None)
    found = estimate(module, FEW, replace(CPU, local_ranks=ranks))
    prompt = evaluation.sampled_batch(module, ranks=ranks).prompt
    with torch.no_grad():
        cache = build_student(module.student_settings)(torch.ones(rows, prompt + 20, dtype=torch.int64)).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found.phases["evaluation"]["key/value cache"] == real


def test_the_remedy_is_of_the_phase_that_needs_most():
    """Fewer prompts a step would leave a validation or an evaluation as large as it is."""
    size = model_size(build(SMALL, 1).config)

    def remedy(rows: int = 1, **more: Any) -> str:
        work = Workload(rows=rows, prompt=4, response=50, token_budget=64, **more)
        return Rank(Held(size, FLOAT32), work, CPU).budget().remedy

    assert remedy(val_rows=3000, val_response=50) == "lower data.val_batch or model.validation.max_new_tokens"
    assert "EarlyAIMEEvaluation.batch" in remedy(sampled=(SampledBatch(3000, 4, 50),))
    assert "data.prompt_batch" in remedy(rows=3000)


def kept_bytes(model: torch.nn.Module, *, autocast: bool) -> int:
    """Bytes that the decoder's forward pass really saves for its backward pass, weights aside."""
    ids = torch.arange(SMALL.batch * 10).reshape(SMALL.batch, 10) % 60
    attention = torch.ones_like(ids)
    attention[0, :2] = 0
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: list[torch.Tensor] = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept.append(value)
        return value

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False),
    ):
        model.get_decoder()(input_ids=ids, attention_mask=attention, use_cache=False)
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in kept}
    return sum(size for pointer, size in storages.items() if pointer not in weights)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_activations_are_what_autograd_saves(family, checkpointing, autocast):
    """The difference of three blocks and one, so that embedding and last norm drop out."""
    saved = []
    for layers in (3, 1):
        model = build(replace(SMALL, family=family, layers=layers), 1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        saved.append(kept_bytes(model, autocast=autocast))
        size = model_size(model.config)
    work = Workload(rows=SMALL.batch, prompt=4, response=6, checkpointing=checkpointing)
    plan = replace(CPU, precision="bf16-mixed") if autocast else CPU
    rank = Rank(Held(size, FLOAT32), work, plan)
    assert rank._kept(gradients=0.0)["activations"] == pytest.approx((saved[0] - saved[1]) / 2, rel=0.02)


def test_the_teachers_cache_is_what_reading_along_leaves():
    """3 rows, prompts of 4 and 6 tokens written, read in two chunks."""
    model = build(SMALL, 1).eval()
    size = model_size(model.config)
    teacher = ScoringModel(model, vocabulary=size.vocabulary)
    ids = torch.arange(12).reshape(3, 4)
    prompts = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(3), ("0", "1", "2"))
    settings = SamplingSettings(max_new_tokens=6, stop_ids=(), pad_id=0, vocabulary=size.vocabulary)
    watch = RatioStop(chunk=3).watching(teacher)(prompts, settings)
    for columns in (3, 6):
        watch.collapsed(torch.arange(3), torch.ones(3, 6, dtype=torch.int64), torch.zeros(3, 6), columns)
    real = sum(held.nbytes for layer in watch.teacher.layers for held in layer.held)
    work = Workload(rows=3, prompt=4, response=6, read_along=True)
    rank = Rank(Held(size, FLOAT32), work, CPU, frozen=[Held(size, FLOAT32)])
    assert rank.budget().phases["rollout"]["teacher's key/value cache"] == real


@pytest.mark.parametrize("autocast", [False, True])
def test_the_cache_is_what_generation_leaves(autocast):
    model = build(SMALL, 1).eval()
    ids = torch.arange(30).reshape(3, 10)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        cache = model(ids).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    plan = replace(CPU, precision="bf16-mixed") if autocast else CPU
    work = Workload(rows=3, prompt=4, response=6)
    assert Rank(Held(model_size(model.config), FLOAT32), work, plan).rollout(3, 6)["key/value cache"] == real


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_the_cache_and_the_cast_weights_are_what_the_decode_loop_holds(monkeypatch, fixed, autocast):
    """At the last step, in buckets as on a GPU and without; 3 rows are a bucket of 4."""
    model = build(replace(SMALL, tied=True), 1).eval()
    policy = ScoringModel(model, vocabulary=64)
    monkeypatch.setattr(Buckets, "of", lambda device: Buckets(fixed=fixed))
    held, cast, weight = [], [], decoder_layers._weight

    def note(decoder: Any, ids: Any, positions: Any, column: Any, caches: Any, columns: Any, bias: Any) -> Any:
        held.append(sum(value.nbytes for pair in caches for value in pair))
        return states(decoder, ids, positions, column, caches, columns, bias)

    def noted(*given: Any) -> torch.Tensor:
        cast.append(weight(*given))
        return cast[-1]

    states = PlainDecoder.states
    ids = torch.arange(12).reshape(3, 4)
    prompts = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(3), ("0", "1", "2"))
    settings = SamplingSettings(max_new_tokens=6, stop_ids=(), pad_id=0, vocabulary=64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        DecodeSampler().sample(policy, prompts, settings)  # the first time a probe runs too
        monkeypatch.setattr(PlainDecoder, "states", note)
        monkeypatch.setattr(decoder_layers, "_weight", noted)
        DecodeSampler().sample(policy, prompts, settings)
    plan = replace(CPU, accelerator="gpu" if fixed else "cpu", precision="bf16-mixed" if autocast else "32-true")
    work = Workload(rows=3, prompt=4, response=6, decodes=True)
    found = Rank(Held(model_size(model.config), FLOAT32), work, plan).rollout(3, 6)
    assert found["key/value cache"] == held[-1]
    assert found.get("weights cast to 16 bits", 0) == pytest.approx(
        autocast * sum(w.nbytes for w in cast), rel=0.01
    )  # norms


def test_fsdp2_gathers_bf16_and_casts_nothing_more():
    size, work = model_size(build(SMALL, 1).config), Workload(rows=4, prompt=4, response=6, decodes=True)
    strategies = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), "fsdp"
    two, one = (
        Rank(Held(size, 4), work, replace(CPU, shards=2, strategy=s, precision="bf16-mixed")).rollout(4, 6)
        for s in strategies
    )
    assert size.lookup == 64 * 48  # embedding and head are two
    assert two["whole student"] == 2 * size.parameters and "weights cast to 16 bits" not in two
    assert one["whole student"] == 4 * size.parameters
    assert one["weights cast to 16 bits"] == 2 * (size.parameters - 64 * 48)


def test_an_engine_that_sleeps_counts_while_it_samples_and_another_always():
    size = model_size(build(SMALL, 1).config)
    totals = {}
    for sleeps in (True, False):
        work = Workload(rows=3, prompt=4, response=6, local_sampler=False, engine=1e6, engine_sleeps=sleeps)
        found = Rank(Held(size, 4), work, CPU).budget()
        none = Rank(Held(size, 4), replace(work, engine=0.0), CPU).budget()
        totals[sleeps] = {name: found.total(name) - none.total(name) for name in found.phases}
    assert totals[True] == {name: 1e6 * (name == "rollout") for name in totals[True]}
    assert set(totals[False].values()) == {1e6}


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.SGD, default_optimizer])
def test_optimizer_state_is_that_of_a_real_step(optimizer):
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 7), (11,))]
    real = optimizer(weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    real.step()
    expected = sum(v.nbytes for state in real.state.values() for v in state.values() if torch.is_tensor(v))
    assert optimizer_bytes(optimizer, ((5, 7), (11,)), torch.float32) == expected


SLOW = pytest.mark.slow
FITS = [pytest.param("wide", marks=SLOW), pytest.param("deep", marks=SLOW), pytest.param("long", marks=SLOW)]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize("name", FITS)
def test_the_budget_is_within_20_percent_of_a_real_fit(name, tmp_path):
    """Deep with AdamW; a wide tied vocabulary in two micro-batches; long responses, checkpointing and SGD."""
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment = os.environ | settings | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.helpers.memory_fit", str(tmp_path), name]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "memory.json").read_text())
    for part, real in result["measured"].items():
        assert abs(result["predicted"][part] - real) <= ACCURACY * real, (part, result)


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_sharding_divides_what_is_kept_and_not_what_is_gathered():
    size = model_size(build(SMALL, 1).config)
    work = Workload(rows=4, prompt=4, response=6)
    plans = [CPU, replace(CPU, local_ranks=4, shards=4)]
    one, four = (Rank(Held(size, 4), work, p, frozen=[Held(size, 2)], state_bytes=800).budget() for p in plans)
    assert {part: value / 4 for part, value in one.always.items()} == four.always
    assert four.phases["rollout"]["whole student"] == 4 * size.parameters
    assert four.phases["rollout"]["key/value cache"] == one.phases["rollout"]["key/value cache"]


@pytest.mark.parametrize(
    ("asked", "ranks"),
    [
        ({"accelerator": "gpu", "devices": 8, "num_nodes": 4}, 32),
        ({"accelerator": "gpu", "devices": "0,1"}, 2),
        ({"accelerator": "cpu", "devices": "auto"}, 1),
        ({"accelerator": "cpu", "devices": [0, 1, 2]}, 3),
    ],
)
def test_ranks_are_read_from_the_config(asked, ranks):
    assert read_plan(asked, strategy="ddp", memory_gb=80.0).ranks == ranks


@pytest.mark.parametrize(
    ("how", "shards"),
    [
        ({"sharding_strategy": "FULL_SHARD"}, 32),
        ({"sharding_strategy": "SHARD_GRAD_OP"}, 32),
        ({"sharding_strategy": "NO_SHARD"}, 1),
        ({"sharding_strategy": "HYBRID_SHARD", "process_group": (None, None)}, 8),
        ({"sharding_strategy": "HYBRID_SHARD", "device_mesh": (8, 4)}, 4),
    ],
)
def test_ranks_that_share_the_weights_follow_from_the_strategy_of_fsdp1(how, shards):
    """Four nodes of eight: torch's own hybrid shares inside a node."""
    asked = {"accelerator": "gpu", "devices": 8, "num_nodes": 4}
    assert read_plan(asked, strategy=FSDPStrategy(**how), memory_gb=80.0).shards == shards


def test_models_that_cannot_be_told_are_not_estimated():
    config = build(SMALL, 1).config
    with pytest.raises(NotEstimated, match="code of its own"):
        model_size(config, trust_remote_code=True)
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(NotEstimated, match="quantised"):
        model_size(config)
    from transformers import CLIPConfig

    with pytest.raises(NotEstimated, match="CLIPConfig"):
        model_size(CLIPConfig())


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, prompts and a config that names them."""
    folder = tmp_path_factory.mktemp("world")
    student, teacher = tiny.pair(folder)
    rows = [{"id": f"p{i}", "prompt": f"{i} + {i} =", "answer": str(2 * i), "level": i % 2} for i in range(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "num_threads": 1,
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 2},
        "model": {
            "student": {"path": student},
            "teacher": {"class_path": "lit_opd.teacher.LocalTeacher", "init_args": {"path": teacher}},
            "sampler": {"class_path": "lit_opd.rollout.TransformersSampler", "init_args": {"max_new_tokens": 8}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
        "data": {
            "train": str(folder / "train.jsonl"),
            "prompt_batch": 8,
            "max_prompt_tokens": 24,
            "filter": "level == 1",
        },
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(config))
    return folder


def preflight(config: Path, *overrides: str) -> int:
    """The exit status of the command."""
    try:
        main(default_callbacks, ["preflight", "--config", str(config), *overrides])
    except SystemExit as stopped:
        assert isinstance(stopped.code, int)
        return stopped.code
    return 0


def rows_of(text: str) -> dict[str, str]:
    """Check -> the rest of its row, folded lines joined."""
    found: dict[str, str] = {}
    name = ""
    for line in text[text.index("preflight\n") if "preflight\n" in text else text.index("preflight ") :].splitlines():
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            name = cells[0] or name
            found[name] = " ".join([found.get(name, ""), *cells[1:]]).strip()
    return {name: " ".join(row.split()) for name, row in found.items()}


@pytest.mark.parametrize(("given", "told"), [("cuda", "triton, tiles, got 'cuda'"), ("triton", "kernels are for cuda")])
def test_a_wrong_choice_of_the_heads_code_is_an_error_before_a_run(world, tmp_path, capsys, monkeypatch, given, told):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the tests' own, which lets kernels run on a CPU
    monkeypatch.setenv("LIT_OPD_HEAD", given)
    assert preflight(world / "base.yaml", "--run_dir", str(tmp_path / "run")) == 2
    assert "LIT_OPD_HEAD" in (row := rows_of(capsys.readouterr().out)["trainer"]) and told in row


def test_a_good_run_passes_and_nothing_is_written(world, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in [*world.rglob("*"), *tmp_path.rglob("*")]}
    assert preflight(world / "base.yaml", "--run_dir", str(tmp_path / "run")) == 0
    rows = rows_of(capsys.readouterr().out)
    assert {"config", "data", "stop ids", "memory", "disk", "run folder", "W&B"} <= rows.keys()
    assert all(row.startswith("ok") for row in rows.values())
    assert "12 of 24 rows kept" in rows["data"] and "12 training" in rows["data"]
    assert before == {path: path.stat().st_mtime_ns for path in [*world.rglob("*"), *tmp_path.rglob("*")]}


def test_one_run_shows_every_error_and_nothing_is_written(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old.txt").write_text("kept")
    overrides = {
        "--run_dir": str(tmp_path / "run"),
        "--model.token_budget": "10",
        "--model.sampler.max_new_tokens": "60",
        "--trainer.devices": "3",
        "--trainer.gradient_clip_val": "1",
        "--wandb.mode": "online",
        "--memory_gb": "0.0001",
        "--data.train": str(tmp_path / "nowhere.jsonl"),
    }
    assert preflight(world / "base.yaml", *(word for pair in overrides.items() for word in pair)) == 2
    rows = rows_of(capsys.readouterr().out)
    wrong = {name for name, row in rows.items() if row.startswith("error")}
    assert wrong == {"data", "trainer", "batch", "context window", "token budget", "run folder", "W&B", "memory"}
    assert "gradient_clip_norm" in rows["trainer"] and "3 ranks" in rows["batch"] and "offline" in rows["W&B"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["old.txt"]


def test_answers_of_the_validation_fit_into_the_context_too(world, tmp_path, capsys):
    words = ["--run_dir", str(tmp_path / "run"), "--model.validation.max_new_tokens", "60"]
    assert preflight(world / "base.yaml", *words) == 2
    row = rows_of(capsys.readouterr().out)["context window"]
    assert row.startswith("error") and "`model.validation.max_new_tokens` must leave room" in row


def test_an_unknown_strategy_is_an_error(world, tmp_path, capsys):
    assert preflight(world / "base.yaml", "--run_dir", str(tmp_path / "run"), "--trainer.strategy", "fsdp9") == 2
    assert "fsdp9" in rows_of(capsys.readouterr().out)["trainer"]


def test_a_server_that_does_not_answer_is_one_row(world, tmp_path, capsys):
    overlay = tmp_path / "remote.yaml"
    teacher = {"urls": ["http://127.0.0.1:9"], "tokenizer_path": str(world / "teacher")}
    teacher |= {"retry_seconds": 0.1, "start_seconds": 0.1}
    remote = {"class_path": "lit_opd.teacher.RemoteTeacher", "init_args": teacher}
    overlay.write_text(yaml.safe_dump({"model": {"teacher": remote}}))
    assert preflight(world / "base.yaml", "--config", str(overlay), "--run_dir", str(tmp_path / "run")) == 2
    rows = rows_of(capsys.readouterr().out)
    assert rows["servers"].startswith("error") and "127.0.0.1:9" in rows["servers"].replace(" ", "")
    assert rows["memory"].startswith("ok")


def test_servers_that_answer_are_named(world, tmp_path, capsys):
    with fake.serving(str(world / "teacher")) as server:
        teacher = {"urls": [server.url], "tokenizer_path": str(world / "teacher"), "retry_seconds": 0.1}
        remote = {"class_path": "lit_opd.teacher.RemoteTeacher", "init_args": teacher}
        overlay = tmp_path / "remote.yaml"
        overlay.write_text(yaml.safe_dump({"model": {"teacher": remote}}))
        assert preflight(world / "base.yaml", "--config", str(overlay), "--run_dir", str(tmp_path / "run")) == 0
    row = rows_of(capsys.readouterr().out)["servers"]
    assert row.startswith("ok") and server.url.replace(" ", "") in row.replace(" ", "")


def instruct_teacher(folder: Path) -> str:
    """Its answers end at <assistant> (3), those of the student at <eos> (1); its template is another."""
    tokenizer = tiny.tokenizer(rows=64)
    tokenizer.eos_token, tokenizer.chat_template = tiny.ASSISTANT, "{{ messages[0].content }}"
    path = tiny.save(tiny.qwen3(seed=3), folder / "instruct", with_tokenizer=tokenizer)
    generation = folder / "instruct" / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": 3}))
    return path


def test_other_stop_tokens_and_templates_are_warnings_that_name_both(world, tmp_path, capsys):
    teacher = instruct_teacher(tmp_path)
    assert preflight(world / "base.yaml", "--run_dir", str(tmp_path / "run"), "--model.teacher.path", teacher) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["stop ids"].startswith("warning") and rows["chat template"].startswith("warning")
    assert "'<eos>' (1)" in rows["stop ids"] and "'<assistant>' (3)" in rows["stop ids"]


def test_fit_warns_about_stop_tokens_too(world, tmp_path):
    overrides = ["--model.teacher.path", instruct_teacher(tmp_path), "--wandb.mode", "disabled"]
    with pytest.warns(UserWarning, match=r"'<eos>' \(1\).*'<assistant>' \(3\)"):
        main(args=["fit", "--config", str(world / "base.yaml"), "--run_dir", str(tmp_path / "run"), *overrides])


def test_the_same_stop_tokens_warn_of_nothing(world, tmp_path, recwarn):
    config = str(world / "base.yaml")
    main(args=["fit", "--config", config, "--run_dir", str(tmp_path / "run"), "--wandb.mode", "disabled"])
    assert not [warning for warning in recwarn if "stops at" in str(warning.message)]


def test_fit_refuses_what_cannot_fit_and_can_be_told_to_run(world, tmp_path, capsys):
    options = ["--run_dir", str(tmp_path / "run"), "--wandb.mode", "disabled", "--memory_gb", "0.0001"]
    with pytest.raises(SystemExit) as stopped:
        main(args=["fit", "--config", str(world / "base.yaml"), *options])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "preflight" in message and "--memory_check false" in message
    assert not (tmp_path / "run").exists()
    main(args=["fit", "--config", str(world / "base.yaml"), *options, "--memory_check", "false"])
    assert (tmp_path / "run" / "config.yaml").exists()


def test_a_config_that_a_fit_wrote_can_be_checked(world, tmp_path, capsys):
    config = str(world / "base.yaml")
    main(args=["fit", "--config", config, "--run_dir", str(tmp_path / "run"), "--wandb.mode", "disabled"])
    assert preflight(tmp_path / "run" / "config.yaml", "--run_dir", str(tmp_path / "again")) == 0


# -- the experiments ---------------------------------------------------------------------------------------------------


def qwen3(hidden: int, inner: int, layers: int, heads: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=hidden < 4096, max_position_embeddings=40960,
    )  # fmt: skip


CONFIGS: dict[str, Any] = {
    "Qwen/Qwen3-1.7B": qwen3(2048, 6144, 28, 16),
    "Qwen/Qwen3-4B": qwen3(2560, 9728, 36, 32),
    "Qwen/Qwen3-8B": qwen3(4096, 12288, 36, 32),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, max_position_embeddings=262144,
    ),
}  # fmt: skip
BILLIONS = {
    "Qwen/Qwen3-1.7B": 1.72,
    "Qwen/Qwen3-4B": 4.02,
    "Qwen/Qwen3-8B": 8.19,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": 30.5,
}


# they sample with vLLM, which is not installed where the tests run
WITH_VLLM = (
    "qwen3_1.7b_from_4b_1gpu",
    "qwen3_1.7b_from_8b_8gpu_fsdp",
    "iw_opd_qwen3_4b_from_30b_a3b_32gpu",
    "qwen3_4b_from_30b_a3b_own_data",
)
MISSING = dict.fromkeys(WITH_VLLM, {"servers"})


def folder_of(name: str, parent: Path) -> str:
    """Configuration and a tiny tokenizer in a folder, no weights: more would not be read."""
    folder = parent / name.replace("/", "--")
    config = CONFIGS.get(name)
    if config is None:
        return tiny.save(tiny.qwen3(seed=1, window=512), folder)
    config.eos_token_id, config.pad_token_id = 1, 0
    config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_parameter_counts_are_the_published_ones(name):
    assert model_size(CONFIGS[name]).parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_is_checked_without_its_machine_or_weights(path, tmp_path, capsys, monkeypatch):
    """The planned ranks and devices stay; models are configurations of the real sizes."""
    monkeypatch.chdir(ROOT)
    settings = yaml.safe_load(path.read_text())
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{i} + {i} =", "answer": str(2 * i), "difficulty": 7} for i in range(1100)]
    longest = settings["data"]["max_prompt_tokens"] - 2  # the template adds two tokens
    rows.append({"prompt": "a" * longest, "answer": "1", "difficulty": 9})
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["--run_dir", str(tmp_path / "run"), "--data.train", str(prompts), "--memory_gb", "80"]
    if str(settings["data"].get("val")).startswith("/"):  # a place on the user's machine
        overrides += ["--data.val", str(prompts)]
    if path.stem != "quickstart":
        models = settings["model"]
        teacher = models["teacher"]["init_args"]["path"]
        overrides += ["--model.student.path", folder_of(models["student"]["path"], tmp_path)]
        overrides += ["--model.teacher.path", folder_of(teacher, tmp_path)]
    preflight(path, *overrides)
    out = capsys.readouterr().out
    found = rows_of(out)
    ranks = settings["trainer"]["devices"] * settings["trainer"].get("num_nodes", 1)
    assert f"{ranks} {settings['trainer']['accelerator']} rank(s)" in out and "total" in out
    wrong = {name for name, row in found.items() if row.startswith("error")} - {
        "disk"
    }  # this machine's disk is not the run's
    assert wrong == MISSING.get(path.stem, set())
    if path.stem in WITH_VLLM:  # its engine is a part of the rollout's sum
        part = float(re.search(r"sampling engine[^\d\n]+([\d.]+)", out).group(1))
        assert part == pytest.approx(80 * settings["model"]["sampler"]["init_args"]["memory_fraction"], abs=0.1)
    assert not (tmp_path / "run").exists()
