"""The Gemma 3 material: a forward by hand that sees every way to convert it wrongly, pruning, and the joining of the parts."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import replace

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from lit_opd.errors import InputError
from lit_opd.testbed import gemma3
from lit_opd.testbed.gemma3 import HAND_TOLERANCE, Shape, logits_by_hand
from lit_opd.testbed.gguf_pair import copy_plain, prune_layers

HAS_GGUF = importlib.util.find_spec("gguf") is not None
LAYERS, WINDOW, ROWS, EPSILON = 7, 4, 48, 1e-6  # heads are 256 wide, since transformers assumes it of every GGUF file
SHAPE = Shape(layers=LAYERS, heads=4, key_heads=2, width=256, epsilon=EPSILON, window=WINDOW, period=1e6)
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@pytest.fixture(scope="module")
def model() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=ROWS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.key_heads,
        head_dim=SHAPE.width,
        query_pre_attn_scalar=SHAPE.width,
        sliding_window=WINDOW,
        rms_norm_eps=EPSILON,
        initializer_range=0.5,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        layer_types=["full_attention" if gemma3.sees_all(layer) else "sliding_attention" for layer in range(LAYERS)],
    )
    built = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in built.named_parameters():
            if "norm" in name:
                value.normal_(0.0, 0.3)
    return built


def as_gguf(model: Gemma3ForCausalLM) -> dict[str, torch.Tensor]:
    """Its weights by GGUF's names, norms as 1 + weight."""
    found = {"token_embd.weight": model.model.embed_tokens.weight, "output_norm.weight": 1 + model.model.norm.weight}
    for number, layer in enumerate(model.model.layers):
        for name, value in layer.named_parameters():
            inner = name.removesuffix(".weight")
            own = 1 + value if "norm" in inner else value
            found[f"blk.{number}.{NAMES[inner]}.weight"] = own
    return {name: value.detach() for name, value in found.items()}


def ids(length: int = 11) -> torch.Tensor:
    return torch.randint(3, ROWS, (length,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_forward_by_hand_is_that_of_transformers(model):
    """On a text longer than the window, through a layer without one."""
    torch.testing.assert_close(
        logits_by_hand(as_gguf(model), SHAPE, ids()), model(ids()[None]).logits[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "fault", ["norm", "query norm", "scale", "window", "period", "post norm", "key heads", "activation"]
)
@torch.no_grad()
def test_every_way_to_convert_wrongly_moves_the_logits_further_than_is_allowed(model, fault, monkeypatch):
    weights, shape = as_gguf(model), SHAPE
    if fault == "norm":  # the stored 1 + weight taken for the weight
        weights["blk.3.ffn_norm.weight"] += 1
    elif fault == "query norm":
        weights["blk.0.attn_q_norm.weight"] = torch.ones(SHAPE.width)
    elif fault == "scale":
        weights["token_embd.weight"] = weights["token_embd.weight"] / 2
    elif fault == "window":
        shape = replace(SHAPE, window=64)
    elif fault == "period":
        shape = replace(SHAPE, period=1e4)
    elif fault == "post norm":
        weights["blk.6.post_ffw_norm.weight"] -= 1
    elif fault == "key heads":
        weights["blk.1.attn_k.weight"] = weights["blk.1.attn_k.weight"].flip(0)
    else:
        monkeypatch.setattr(gemma3, "gelu", lambda inner, approximate: torch.nn.functional.silu(inner))
    gap = (logits_by_hand(weights, shape, ids()) - model(ids()[None]).logits[0]).abs().max()
    assert gap > 10 * HAND_TOLERANCE


@torch.no_grad()
def test_a_pruned_model_keeps_each_layers_kind_and_loads_again(model, tmp_path):
    removed = [1, 5]
    pruned = prune_layers(model, removed)
    kept = [layer for layer in range(LAYERS) if layer not in removed]
    assert pruned.config.layer_types == [model.config.layer_types[layer] for layer in kept]
    hooks = [model.model.layers[layer].register_forward_hook(lambda _, given, __: given[0]) for layer in removed]
    expected = model(ids()[None], use_cache=False).logits
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(pruned(ids()[None], use_cache=False).logits, expected)
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.layer_types == pruned.config.layer_types
    assert torch.equal(again(ids()[None]).logits, pruned(ids()[None]).logits)


# -- the packages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Packages like those of the registry, the file's bytes cut in four."""
    content = bytes(range(200))
    for name in ("gguf", gemma3.PACKAGE, *gemma3.PARTS):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("raise ImportError('it must be found and not imported')\n")
    (tmp_path / gemma3.PACKAGE / "data" / "SHA256SUMS").write_text(f"{hashlib.sha256(content).hexdigest()}  x.gguf\n")
    for place, name in enumerate(gemma3.PARTS):
        (tmp_path / name / "data" / f"x.gguf.part{place:02d}").write_bytes(content[50 * place : 50 * (place + 1)])
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path, content


def test_the_parts_are_joined_in_their_order_and_the_joined_file_goes(packages):
    with gemma3.gguf_file() as file:
        assert file.read_bytes() == packages[1] and file.name == "x.gguf"
    assert not file.exists()


def test_damaged_and_missing_parts_are_named(packages):
    folder = packages[0] / gemma3.PARTS[2] / "data"
    part = next(folder.iterdir())
    part.write_bytes(b"0" * 50)
    with pytest.raises(InputError, match="must give a file of sha256"), gemma3.gguf_file():
        pass
    part.unlink()
    with pytest.raises(InputError, match=f"`{gemma3.PARTS[2]}` must hold one part.*got 0"), gemma3.gguf_file():
        pass


def test_a_missing_package_is_answered_with_the_pip_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gemma3, "PARTS", ("no_such_package_part1",))
    with pytest.raises(SystemExit, match="2"):
        gemma3.main(["--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "`no_such_package_part1` is not installed" in said and gemma3.INSTALL in said and said.count("\n") == 1


# -- a whole file --------------------------------------------------------------------------------------------------------


def write_gguf(model: Gemma3ForCausalLM, path, **changes) -> None:
    """The tiny model as llama.cpp would store it, with a tokenizer of single characters."""
    from gguf import GGUFWriter, TokenType

    writer = GGUFWriter(path, "gemma3")
    writer.add_context_length(128)
    writer.add_embedding_length(16)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(24)
    writer.add_head_count(SHAPE.heads)
    writer.add_head_count_kv(SHAPE.key_heads)
    writer.add_key_length(SHAPE.width)
    writer.add_value_length(SHAPE.width)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(SHAPE.period)
    writer.add_sliding_window(WINDOW)
    letters = [chr(number) for number in range(97, 123)] + ["▁", "T", ".", ",", "1", "9", "7"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters]
    tokens += [f"<unused{number}>" for number in range(ROWS - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * ROWS)
    control = [TokenType.CONTROL] * 3 + [TokenType.UNKNOWN, TokenType.CONTROL] + [TokenType.NORMAL] * len(letters)
    writer.add_token_types(control + [TokenType.UNUSED] * (ROWS - len(control)))
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    for name, value in (as_gguf(model) | changes).items():
        writer.add_tensor(name, value.numpy().astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_GGUF, reason="needs the package gguf")
def test_a_tiny_file_becomes_a_teacher_and_a_student(model, tmp_path):
    write_gguf(model, tmp_path / "tiny.gguf")
    done = gemma3.convert(tmp_path / "out", gguf=tmp_path / "tiny.gguf", removed_layers=(1, 3))
    teacher = AutoModelForCausalLM.from_pretrained(done.teacher).eval()
    student = AutoModelForCausalLM.from_pretrained(done.student).eval()
    with torch.no_grad():
        torch.testing.assert_close(teacher(ids()[None]).logits, model(ids()[None]).logits, rtol=1e-4, atol=1e-4)
    assert teacher.lm_head.weight is teacher.model.embed_tokens.weight
    assert (len(student.model.layers), student.config.sliding_window) == (LAYERS - 2, WINDOW)
    tokenizer = AutoTokenizer.from_pretrained(done.student)
    assert tokenizer("at").input_ids[0] == 2 and tokenizer.decode(tokenizer("at a").input_ids[1:]) == "at a"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_GGUF, reason="needs the package gguf")
def test_what_transformers_reads_wrongly_is_no_teacher(model, tmp_path, monkeypatch):
    """As if it forgot that norms are stored as 1 + weight."""
    from transformers import modeling_gguf_pytorch_utils as reader

    write_gguf(model, tmp_path / "tiny.gguf")
    monkeypatch.setitem(reader.TENSOR_PROCESSORS, "gemma3", reader.TensorProcessor)
    with pytest.raises(RuntimeError, match="forward by hand"):
        gemma3.convert(tmp_path / "out", gguf=tmp_path / "tiny.gguf", removed_layers=(1,))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(HAS_GGUF, reason="the package gguf is there")
def test_without_the_reader_the_command_says_what_to_install(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gemma3.main(["--out", str(tmp_path / "out")])
    assert "needs the package `gguf`" in capsys.readouterr().err


def test_a_tokenizer_of_another_size_is_refused(model):
    class Short:
        def __len__(self) -> int:
            return ROWS - 1

    with pytest.raises(InputError, match=f"must have {ROWS} tokens like the model, got {ROWS - 1}"):
        copy_plain(model, Short())
