"""Weights read by shards: the same as ``from_pretrained``'s, about half of the bytes on each of two ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HrmTextConfig,
    HrmTextForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lit_opd.errors import InputError
from lit_opd.models.lazy import fill
from lit_opd.models.loading import empty_causal_lm
from lit_opd.module import OPDModule
from lit_opd.objective import Divergence
from lit_opd.scoring.model import ScoringModel
from lit_opd.teacher import LocalTeacher
from tests.helpers import cases, fixed, tiny

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 240  # seconds; a hang is a failure
ODD_ROWS = 67  # does not divide by the ranks
EXPERTS = 11  # more than ten: names sort by number

SHARED: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def mixture() -> Qwen3MoeForCausalLM:
    """Files hold the experts one by one, the model stacked."""
    config = Qwen3MoeConfig(
        **SHARED,
        vocab_size=ODD_ROWS,
        num_hidden_layers=2,
        num_key_value_heads=1,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        decoder_sparse_step=1,
    )
    return Qwen3MoeForCausalLM(config)


def fused() -> HrmTextForCausalLM:
    """Files hold gate and up projection in one tensor, likewise queries, keys and values; the model holds them apart."""
    config = HrmTextConfig(
        **SHARED, vocab_size=ODD_ROWS, num_layers_per_stack=1, H_cycles=1, L_cycles=1, L_bp_cycles=[1]
    )
    return HrmTextForCausalLM(config)


def scaled() -> GraniteForCausalLM:
    """Its logits are not the head's product alone."""
    config = GraniteConfig(
        **SHARED, num_key_value_heads=1, vocab_size=ODD_ROWS, num_hidden_layers=2, logits_scaling=0.2
    )
    return GraniteForCausalLM(config)


def tied() -> Qwen3ForCausalLM:
    """A Qwen3 with tied embeddings."""
    config = Qwen3Config(
        **SHARED, vocab_size=ODD_ROWS, num_hidden_layers=2, num_key_value_heads=1, tie_word_embeddings=True
    )
    return Qwen3ForCausalLM(config)


def big() -> Qwen3ForCausalLM:
    """185 MB in float32; the largest weight is 17 MB."""
    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=9,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config)


MODELS = {
    "qwen3": ("float32", lambda: tiny.qwen3(seed=3, rows=ODD_ROWS)),
    "qwen3 tied": ("float32", tied),
    "llama tied in float64": ("float64", lambda: tiny.llama(seed=4, rows=ODD_ROWS)),
    "llama tied in bfloat16": ("bfloat16", lambda: tiny.llama(seed=4, rows=ODD_ROWS)),
    "mixture": ("float32", mixture),
    "mixture in bfloat16": ("bfloat16", mixture),
    "fused": ("float32", fused),
    "scaled": ("float32", scaled),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every model in several files."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, (_, build) in MODELS.items():
        build().save_pretrained(root / name, max_shard_size="6KB")
    large = big().bfloat16()
    large.save_pretrained(root / "big", max_shard_size="25MB")  # and read as float32
    large.save_pretrained(root / "one file")
    return {name: root / name for name in ("big", *MODELS)}


def in_hub_cache(folder: Path, home: Path) -> str:
    """The folder as a hub id that was downloaded before; returns the id."""
    owner = home / "hub" / "models--someone--tiny"
    (owner / "refs").mkdir(parents=True)
    (owner / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, owner / "snapshots" / ("0" * 40))
    return "someone/tiny"


@pytest.fixture(scope="module")
def ranks(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.helpers.lazy_ranks", str(out)]
    command += [f"one file=bfloat16={folders['big'].parent / 'one file'}"]
    command += [f"{name}={MODELS.get(name, ('float32',))[0]}={folder}" for name, folder in folders.items()]
    command += [f"hub id=float32={in_hub_cache(folders['mixture'], out / 'home')}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HOME": str(out / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [torch.load(out / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


def stored(folder: Path) -> dict[str, int]:
    """Bytes of every stored tensor, from the files themselves."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name).nbytes for name in file.keys()}
    return found


def test_the_files_are_many_and_some_hold_another_layout_than_the_model(folders):
    for folder in folders.values():
        assert len(list(folder.glob("*.safetensors"))) > 2
    assert "model.layers.0.mlp.experts.10.gate_proj.weight" in stored(folders["mixture"])
    assert "model.layers.0.mlp.experts.gate_up_proj" in dict(mixture().named_parameters())
    assert not stored(folders["fused"]).keys() >= dict(fused().named_parameters()).keys()
    assert "lm_head.weight" not in stored(folders["qwen3 tied"])


def in_one_process(folder: Path, dtype: str) -> LocalTeacher:
    whole = LocalTeacher(str(folder), dtype=dtype)  # type: ignore[arg-type]
    whole.load(vocabulary=60)
    return whole


def assert_same_scores(logprobs: torch.Tensor, whole: LocalTeacher) -> None:
    torch.testing.assert_close(logprobs, whole.score(cases.rollout()).logprobs, rtol=1e-6, atol=1e-6)


SOURCES = {name: name for name in MODELS} | {"offloaded": "qwen3", "not lazy": "qwen3", "hub id": "mixture"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_every_weight_and_buffer_and_score_equals_from_pretrained(folders, ranks, name):
    source = SOURCES[name]
    dtype = MODELS[source][0]
    whole = in_one_process(folders[source], dtype)
    model = whole.policy.causal_lm
    weights = dict(model.named_parameters(remove_duplicate=False))
    for rank in ranks:
        found = rank[name]
        assert found["weights"].keys() == weights.keys()
        for key, value in weights.items():
            assert found["weights"][key].dtype == value.dtype == getattr(torch, dtype), key
            assert torch.equal(found["weights"][key], value), key
        assert all(torch.equal(found["buffers"][key], value) for key, value in model.named_buffers())
        assert found["tied"] == ("tied" in name)
        assert found["plain"] == whole.policy.full_logits == (name == "scaled")  # the probe ran on real weights
        assert_same_scores(found["logprobs"], whole)
        head = whole.full_head(cases.rollout()).weight
        assert (head is None and found["head"] is None) or torch.equal(found["head"], head)


@pytest.mark.slow
def test_teachers_that_no_row_of_a_rank_names_take_part_in_its_collectives(folders, ranks):
    """Otherwise the ranks would hang."""
    for rank, name in zip(ranks, list(MODELS)[:2], strict=True):
        assert_same_scores(rank["routed"], in_one_process(folders[name], "float32"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["big", "qwen3", "qwen3 tied", "mixture"])
def test_the_ranks_together_read_every_stored_byte_once(folders, ranks, name):
    size = sum(stored(folders[name]).values())
    growth = 2 if name == "big" else 1  # from bfloat16 to float32
    counts = [rank["counts"][name] for rank in ranks]
    assert sum(count["read"] for count in counts) == size
    assert sum(count["kept"] for count in counts) == growth * size
    half = 0.56 if name == "mixture" else 0.52  # six of eleven experts are more
    assert max(count["read"] for count in counts) < half * size


@pytest.mark.slow
def test_beyond_its_shards_a_rank_holds_its_part_of_one_parameter(folders, ranks):
    largest = 2 * max(stored(folders["big"]).values())  # in float32
    stacked = 6 * 2 * 8 * 16 * 4  # gate and up projections of six experts
    for rank in ranks:
        count = rank["counts"]["big"]
        assert count["kept"] < count["most_held"] <= count["kept"] + largest / 2
        count = rank["counts"]["mixture"]
        assert count["most_held"] <= count["kept"] + 2 * stacked  # read one by one, then joined


@pytest.mark.slow
def test_the_process_itself_grows_by_half_the_model_where_a_whole_load_takes_all(folders, ranks):
    """Peak resident memory as the kernel counts it, mapped files included; the allocator keeps some of what was freed."""
    size = 2 * sum(stored(folders["big"]).values())
    for rank in ranks:
        assert rank["lazy growth"] < 0.75 * size
        assert rank["whole growth"] > 0.95 * size


@pytest.mark.slow
def test_pages_of_a_file_that_were_copied_are_let_go_of(folders, ranks):
    """Else a rank holds its shards and a mapping of all it read; both are half of one file here."""
    size = sum(stored(folders["big"]).values())
    assert all(rank["one file growth"] < 0.75 * size for rank in ranks)


# -- in one process, without a mesh, every parameter is this rank's own ------------------------------------------------


def filled(folder: Path, dtype: str = "float32") -> ScoringModel:
    policy = ScoringModel(empty_causal_lm(str(folder), "model.teacher.path", dtype=dtype), vocabulary=60)
    fill(policy, policy.causal_lm, path=str(folder), setting="model.teacher.path")
    return policy


# with persistent buffers and float32 islands, another naming of experts, half precision, renamings
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": (
        "bfloat16",
        {
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": 8,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
    ),
    "mixtral": ("float32", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "gpt2": ("float16", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
    "gpt_neox": ("float32", {}),
}


@pytest.mark.parametrize("name", MORE)
def test_more_layouts_equal_from_pretrained(tmp_path, name):
    dtype, settings = MORE[name]
    sizes = {"vocab_size": ODD_ROWS, "num_hidden_layers": 2, "num_key_value_heads": 2} | settings
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(SHARED | sizes)))
    with torch.no_grad():
        for value in model.state_dict(keep_vars=True).values():
            value.uniform_(-1, 1)  # buffers too, which start as zeros
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    found, expected = filled(tmp_path, dtype).causal_lm.state_dict(), whole.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def test_a_filled_mixture_is_saved_in_the_layout_it_was_read_in(folders, tmp_path):
    filled(folders["mixture"]).causal_lm.save_pretrained(tmp_path)
    read = {name: value for path in folders["mixture"].glob("*.safetensors") for name, value in load_file(path).items()}
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == read.keys() and all(torch.equal(saved[name], value) for name, value in read.items())


@pytest.mark.parametrize("name", ["qwen3", "mixture"])
def test_files_that_the_index_does_not_name_are_not_read(folders, tmp_path, name):
    """An earlier save's shards, say, or the author's own layout beside transformers'."""
    folder = shutil.copytree(folders[name], tmp_path / "model")
    expected = filled(folder).causal_lm.state_dict()
    for part in sorted(folder.glob("*.safetensors")):
        other = {key: value + 1 for key, value in load_file(part).items()}
        save_file(other | {"extra": torch.zeros(2)}, folder / part.name.replace("model", "stale"))
    found = filled(folder).causal_lm.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


# -- bad files ---------------------------------------------------------------------------------------------------------


def changed(tmp_path: Path, change: Any, model: Any = None) -> Path:
    """A saved model whose stored tensors went through ``change``."""
    tiny.save(model or tiny.qwen3(seed=1), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_an_empty_model_has_no_weights_and_exact_buffers(tmp_path):
    folder = tiny.save(tiny.qwen3(seed=1), tmp_path)
    empty = empty_causal_lm(folder, "path", dtype="bfloat16")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert all(value.is_meta and value.dtype == torch.bfloat16 for value in empty.parameters())
    for (name, value), (other, expected) in zip(empty.named_buffers(), whole.named_buffers(), strict=True):
        assert name == other and value.dtype == expected.dtype and torch.equal(value, expected)
    assert not torch.nn.Linear(2, 2).weight.is_meta  # modules built afterwards have memory again


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("model.norm.weight"),
            "lacks weights of the model, 1 of them: model.norm.weight; set `model.teacher.l",
        ),
        (
            lambda w: w.update(extra=torch.zeros(2)),
            "holds weights that the model has not, 1 of them: extra.*RemoteTeacher",
        ),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight as \(16,\), got \(3,\)"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(16, dtype=torch.int8)}), "norm.weight as torch.int8"),
    ],
    ids=["missing", "left over", "shape", "integers"],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, change, message):
    folder = changed(tmp_path, change)
    with pytest.raises(InputError, match=f"model.teacher.path.*{message}"):
        filled(folder)


def test_tied_weights_stored_twice_must_agree(tmp_path):
    def twice(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    def apart(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1

    policy = filled(changed(tmp_path / "twice", twice, tiny.llama(seed=1)))
    assert policy.causal_lm.lm_head.weight is policy.causal_lm.model.embed_tokens.weight
    with pytest.raises(InputError, match=r"lm_head.weight and|and lm_head.weight.*tie_word_embeddings"):
        filled(changed(tmp_path / "apart", apart, tiny.llama(seed=1)))


def test_a_mixture_that_lacks_an_expert_is_refused(tmp_path):
    folder = changed(tmp_path, lambda w: w.pop("model.layers.1.mlp.experts.4.down_proj.weight"), mixture())
    with pytest.raises(InputError, match=r"experts.down_proj as \(11, 16, 8\), got \(10, 16, 8\)"):
        filled(folder)


def test_pickles_and_quantised_checkpoints_are_refused(tmp_path):
    folder = Path(tiny.save(tiny.qwen3(seed=1), tmp_path))
    config = json.loads((folder / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(InputError, match="must not be a quantised checkpoint.*RemoteTeacher"):
        filled(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="could not be read from safetensors files"):
        filled(folder)


# -- offload and quantisation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [None, Divergence("reverse_kl")], ids=["policy", "divergence"])
def test_offload_changes_no_gradient_and_hides_the_weights_from_lightning(tmp_path, objective):
    folders = tiny.pair(tmp_path)
    gradients = []
    for offload in (False, True):
        trained: OPDModule = fixed.module(folders, cases.rollout(), objective=objective, token_budget=cases.BUDGET)
        trained.teacher = LocalTeacher(folders[1], dtype="float64", offload=offload)
        gradients.append(fixed.gradient(trained, cases.rollout().prompts)[1])
        assert bool(list(trained.teacher.parameters())) != offload
    assert fixed.relative_gap(*gradients) == 0.0


def test_offloaded_weights_are_on_the_device_inside_the_block_only(tmp_path):
    """The meta device stands for a GPU."""
    scorer = LocalTeacher(tiny.save(tiny.llama(seed=1), tmp_path), offload=True)
    scorer.load(vocabulary=60)
    before = scorer.score(cases.rollout()).logprobs
    with pytest.raises(KeyboardInterrupt), torch.inference_mode(), scorer.on_device(torch.device("meta")):
        assert {value.device.type for value in scorer.policy.state_dict().values()} == {"meta"}
        raise KeyboardInterrupt
    assert torch.equal(scorer.score(cases.rollout()).logprobs, before)


def test_quantisation_is_checked_before_weights_are_read(tmp_path):
    folder = tiny.save(tiny.qwen3(seed=1), tmp_path)
    for settings, why in (
        ({"quant_method": "quanto", "weights": "int8"}, "optimum-quanto"),
        ({"quant_method": "nonsense"}, "Unknown quantization type"),
        ({"weights": "int8"}, "quant_method"),
    ):
        scorer = LocalTeacher(folder, quantization=settings)
        with pytest.raises(InputError, match=f"model.teacher.quantization.*{why}"):
            scorer.check(temperature=1.0, tokens=None)
        with pytest.raises(InputError, match=f"model.teacher.quantization.*{why}"):
            scorer.load(vocabulary=60)


def test_quantised_weights_are_neither_sharded_nor_offloaded(tmp_path):
    settings = {"quant_method": "quanto", "weights": "int8"}
    scorer = LocalTeacher(tiny.save(tiny.qwen3(seed=1), tmp_path), quantization=settings)
    with pytest.raises(InputError, match="quantization` must be null when weights are sharded"):
        scorer.load_sharded(None, vocabulary=60)
    with pytest.raises(InputError, match="offload` must be false"):
        LocalTeacher("anywhere", quantization=settings, offload=True)
