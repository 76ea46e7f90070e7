"""The policy that is trained is the one that sampled, and the one that is exported: settled when a model is loaded."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_opd.errors import InputError
from lit_opd.evaluation.statistics import WeightedMean
from lit_opd.models.export import export_folder
from lit_opd.models.export_check import ExportCheck
from lit_opd.models.loading import load_causal_lm, load_config
from lit_opd.models.student import LoraSettings, StudentSettings, build_student
from lit_opd.rollout import DecodeSampler, SamplingSettings, TransformersSampler
from lit_opd.scoring import ScoringModel
from lit_opd.types import PromptBatch
from tests.helpers import fixed, tiny

ROWS = 64
SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
NOISY: dict[str, dict[str, Any]] = {
    "gpt2": {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5},
    "bloom": {"hidden_dropout": 0.5, "attention_dropout": 0.5},  # functional, by an attribute of the block
    "opt": {"dropout": 0.5, "layerdrop": 0.5, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "mixtral": {"num_local_experts": 4, "head_dim": 8, "router_jitter_noise": 0.5, "attention_dropout": 0.5},
}


def saved(folder: Path, kind: str, *, spread: float = 0.3, **changes: Any) -> str:
    """A tiny random model of an architecture, as a folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | changes)))
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(std=spread)
    return tiny.save(model, folder)


def policy(folder: str, **settings: Any) -> ScoringModel:
    """As a run makes it."""
    attention = "eager" if AutoConfig.from_pretrained(folder).model_type == "bloom" else "sdpa"
    made = ScoringModel(
        build_student(StudentSettings(folder, attn_implementation=attention, **settings)), vocabulary=ROWS
    )
    made.choose_path("student")
    made.freeze_unused()
    return made.train()


def sampled(model: ScoringModel, sampler: Any = TransformersSampler, tokens: int = 8) -> Any:
    """Responses to two prompts of different lengths."""
    ids, mask = torch.arange(8).reshape(2, 4) + 5, torch.tensor([[False, False, True, True], [True] * 4])
    prompts = PromptBatch(torch.where(mask, ids, 0), mask, torch.arange(2), ("0", "1"))
    settings = SamplingSettings(max_new_tokens=tokens, stop_ids=(1,), pad_id=0, vocabulary=ROWS)
    return sampler(max_new_tokens=tokens).sample(model, prompts, settings)


# -- sampling and scoring ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NOISY)
def test_what_is_scored_with_gradient_is_what_sampled_whatever_is_random_in_train_mode(tmp_path, kind):
    model = policy(saved(tmp_path / "m", kind, **NOISY[kind]), gradient_checkpointing=True)
    rollout = sampled(model)
    scores = model(rollout).logprobs
    assert scores.requires_grad
    torch.testing.assert_close(scores * rollout.mask, rollout.sampler_logprobs * rollout.mask, rtol=0, atol=1e-4)


def test_blocks_are_recomputed_in_evaluation_mode_and_hold_less(tmp_path):
    folder = saved(tmp_path / "m", "gpt2", num_hidden_layers=4)
    rollout = fixed.rollout(lengths=[9, 6], prompt_lengths=[4, 2], truncated=set())
    held, runs, gradients = {}, {}, {}
    for on in (False, True):
        model = policy(folder, gradient_checkpointing=on)
        assert not any(module.training for module in model.modules())
        calls, kept = [], []
        for block in model.causal_lm.transformer.h:
            block.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            total = model(rollout).logprobs.sum()
        total.backward()
        held[on], runs[on] = sum(kept), len(calls)
        gradients[on] = {name: value.grad for name, value in model.named_parameters()}
    assert runs == {False: 4, True: 8}
    assert held[True] < 0.5 * held[False]
    assert fixed.relative_gap(gradients[True], gradients[False]) < 1e-6


def test_a_model_without_blocks_to_recompute_is_refused_by_name(tmp_path):
    folder = saved(tmp_path / "m", "ctrl", n_embd=16, dff=32, n_layer=2, n_head=2, n_positions=64)
    with pytest.raises(InputError, match="gradient_checkpointing.*CTRLLMHeadModel"):
        policy(folder, gradient_checkpointing=True)


def test_dropout_of_adapters_says_that_it_has_no_effect(tmp_path):
    folder = saved(tmp_path / "m", "qwen3", head_dim=8)
    with pytest.warns(UserWarning, match=r"lora.dropout` is 0.5 and has no effect"):
        model = policy(folder, lora=LoraSettings(rank=2, dropout=0.5))
    rollout = sampled(model)
    with torch.no_grad():
        assert torch.equal(model(rollout).logprobs, model(rollout).logprobs)


@pytest.mark.parametrize("sampler", [TransformersSampler, DecodeSampler])
def test_fields_that_add_outputs_are_off_in_a_run_and_back_in_its_export(tmp_path, sampler):
    on = {"output_router_logits": True, "output_hidden_states": True, "output_attentions": True, "return_dict": False}
    folder = saved(tmp_path / "m", "mixtral", num_local_experts=4, head_dim=8)
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | on | {"use_cache": False}))
    model = policy(folder)
    rollout = sampled(model, sampler)
    torch.testing.assert_close(model(rollout).logprobs, rollout.sampler_logprobs * rollout.mask, rtol=0, atol=1e-4)
    export_folder(model.model, tiny.tokenizer(), tmp_path / "out", state=None)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: written[name] for name in on} == on and written["use_cache"] is False


# -- the head ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [30.0, 3000.0, None])
@pytest.mark.parametrize("known", [True, False])
def test_a_soft_cap_that_nothing_states_is_found_while_logits_are_still_small(tmp_path, cap, known, monkeypatch):
    """With logits of size .1 a cap of 30 moves them by 4e-7: four tokens at the start show nothing. A stated one is followed."""
    if not known:
        monkeypatch.setattr("lit_opd.scoring.model._soft_cap", lambda causal_lm: None)
    changes = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
    kinds = ["sliding_attention", "full_attention"]
    folder = saved(
        tmp_path / "m", "gemma3_text", spread=0.02, final_logit_softcapping=cap, layer_types=kinds, **changes
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = policy(folder)
    unstated = cap is not None and not known
    assert model.full_logits is unstated and model.soft_cap == (cap if known else None)
    assert any("full logits" in str(warning.message) for warning in said) is unstated


def test_a_decoder_that_is_the_whole_model_takes_the_models_own_logits(tmp_path):
    changes = {"num_local_experts": 2, "head_dim": 8, "attention_chunk_size": 64, "intermediate_size_mlp": 32}
    with pytest.warns(UserWarning, match="names no decoder"):
        model = policy(saved(tmp_path / "m", "llama4_text", **changes))
    rollout = sampled(model)
    torch.testing.assert_close(model(rollout).logprobs, rollout.sampler_logprobs * rollout.mask, rtol=0, atol=1e-4)


# -- positions ---------------------------------------------------------------------------------------------------------

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
MIXTURE = {"short_mscale": 1.1, "long_mscale": 1.5, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(("kind", "more"), [("phi3", {}), ("phimoe", MIXTURE)])
def test_a_row_has_its_log_probs_whatever_the_length_of_its_neighbours(tmp_path, kind, more):
    window = {"original_max_position_embeddings": 16, "rope_parameters": LONG | more, "num_local_experts": 2}
    folder = saved(tmp_path / "m", kind, **window)
    with pytest.warns(UserWarning, match="LongRoPE"):
        model = policy(folder)
    rollout = fixed.rollout(lengths=[5, 20], prompt_lengths=[4, 4], truncated=set())
    with torch.no_grad():
        together, alone = model(rollout).logprobs[:1, :5], model(rollout.rows(torch.tensor([0])).trimmed()).logprobs
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    grown = sampled(model, tokens=20)  # past the window while it is written
    torch.testing.assert_close(model(grown).logprobs, grown.sampler_logprobs * grown.mask, rtol=0, atol=1e-4)


def test_angles_that_stretch_with_the_longest_row_do_not(tmp_path):
    """Dynamic NTK, behind the window of 16 that a fit refuses to pass."""
    stretched = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = policy(saved(tmp_path / "m", "llama", max_position_embeddings=16, rope_parameters=stretched))
    rollout = fixed.rollout(lengths=[5, 20], prompt_lengths=[4, 4], truncated=set())
    with torch.no_grad():
        together, alone = model(rollout).logprobs[:1, :5], model(rollout.rows(torch.tensor([0])).trimmed()).logprobs
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_short_rows_keep_the_positions_that_transformers_gives_them(tmp_path):
    folder = saved(tmp_path / "m", "phi3", original_max_position_embeddings=16, rope_parameters=LONG)
    ids = torch.arange(10).unsqueeze(0) + 5
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        ours = build_student(StudentSettings(folder), longest=16)(input_ids=ids).logits
        assert torch.equal(ours, AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits)


def test_angles_and_counts_lose_no_bits_where_the_run_is_cast(tmp_path):
    model = policy(saved(tmp_path / "m", "qwen3", head_dim=8))
    table = model.causal_lm.model.rotary_emb.inv_freq.clone()
    mean = WeightedMean()
    torch.nn.ModuleList([model, mean]).to(torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert torch.equal(model.causal_lm.model.rotary_emb.inv_freq, table)
    for _ in range(3):
        mean.update(torch.ones(1, 257), torch.ones(1, 257))
    assert mean.count == 771 and mean.compute() == 1


# -- what is loaded ----------------------------------------------------------------------------------------------------


def test_what_a_text_never_reaches_is_frozen_and_nothing_else(tmp_path):
    text = SIZES | {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
        "layer_types": ["full_attention"] * 2,
    }
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    folder = tiny.save(AutoModelForCausalLM.from_config(config), tmp_path / "m")
    model = policy(folder)
    model(fixed.rollout(lengths=[5, 3], prompt_lengths=[4, 4], truncated=set())).logprobs.sum().backward()
    trained = {name: value.grad is not None for name, value in model.named_parameters() if value.requires_grad}
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    assert all(trained.values()) and any("lm_head" in name or "embed_tokens" in name for name in trained)
    assert frozen and all("vision" in name or "projector" in name for name in frozen)


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_with_an_adapter_is_refused_with_what_to_do(tmp_path, whole):
    from peft import LoraConfig, get_peft_model

    folder = saved(tmp_path / "m", "qwen3", head_dim=8)
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    if whole:
        for file in (tmp_path / "adapter").glob("adapter*"):
            shutil.copy(file, folder)
    for load in (load_config, lambda path, field: load_causal_lm(path, field, dtype="float32")):
        with pytest.raises(InputError, match="model.student.path.*adapter.*merge"):
            load(folder if whole else str(tmp_path / "adapter"), "model.student.path")


@pytest.mark.parametrize("field", ["model.student.path", "model.teacher.path"])
def test_attention_that_a_model_lacks_names_the_setting(tmp_path, field):
    folder = saved(tmp_path / "m", "bloom")
    setting = field.replace("path", "attn_implementation")
    with pytest.raises(InputError, match=f"set `{setting}`.*eager"):
        load_causal_lm(folder, field, dtype="float32", attn_implementation="sdpa")


# -- the export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"], "all-linear"]
)
def test_the_exported_student_is_the_trained_one_for_every_target(tmp_path, targets, tied):
    folder = saved(tmp_path / "m", "qwen3", head_dim=8, tie_word_embeddings=tied)
    settings = StudentSettings(folder, lora=LoraSettings(rank=2, target_modules=targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's about tied weights
        model = ScoringModel(build_student(settings), vocabulary=ROWS)
        model.choose_path("student")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.3)
    rollout = fixed.rollout(lengths=[3, 6], prompt_lengths=[4, 2], truncated=set())
    check = ExportCheck.of(model, tiny.tokenizer(), settings)
    export_folder(model.model, tiny.tokenizer(), tmp_path / "out", state=None, check=check)
    with torch.no_grad():
        ours = model(rollout).logprobs  # the export has left the adapters and the ties as they were
        there = ScoringModel(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), vocabulary=ROWS)
        before = ScoringModel(AutoModelForCausalLM.from_pretrained(folder), vocabulary=ROWS)
        torch.testing.assert_close(there(rollout).logprobs, ours, rtol=0, atol=1e-4)
        assert float((before(rollout).logprobs - ours).abs().max()) > 0.1


def test_an_export_that_is_not_the_student_is_refused_and_leaves_the_former_one(tmp_path):
    folder = saved(tmp_path / "m", "qwen3", head_dim=8)
    settings = StudentSettings(folder)
    model = policy(folder)
    check = ExportCheck.of(model, tiny.tokenizer(), settings)
    export_folder(model.model, tiny.tokenizer(), tmp_path / "out", state=None, check=check)
    state = torch.random.get_rng_state()
    with torch.no_grad():
        model.causal_lm.lm_head.weight.mul_(1.5)  # what is written is no longer what was asked
    with pytest.raises(InputError, match="exported student's log-probs differ"):
        export_folder(model.model, tiny.tokenizer(), tmp_path / "out", state=None, check=check)
    with torch.no_grad():
        model.causal_lm.lm_head.weight.div_(1.5)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again.lm_head.weight, model.causal_lm.lm_head.weight)
    assert torch.equal(torch.random.get_rng_state(), state)
