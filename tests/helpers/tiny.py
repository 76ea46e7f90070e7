"""Tiny real models, built from a config and saved as Hugging Face folders, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 =+"
PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<user>", "<assistant>"
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}<user>{{ message.content }}{% else %}{{ message.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(letters: str = LETTERS, *, rows: int = 0) -> PreTrainedTokenizerFast:
    """One token a character, and tokens that no text becomes up to ``rows``, so that no row of an embedding is padding."""
    words = [PAD, EOS, USER, ASSISTANT, *letters]
    words += [f"<{number}>" for number in range(len(words), rows)]
    vocabulary = {token: index for index, token in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    built = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, eos_token=EOS, additional_special_tokens=[USER, ASSISTANT]
    )
    built.chat_template = TEMPLATE
    return built


def qwen3(*, seed: int, hidden: int = 16, layers: int = 2, rows: int = 64, window: int = 64) -> Qwen3ForCausalLM:
    """A random Qwen3 with sharpened output, so that log-probs differ visibly between seeds."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=rows,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=hidden // 2,
            max_position_embeddings=window,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)
    return model


def llama(*, seed: int, hidden: int = 16, layers: int = 2, rows: int = 64) -> LlamaForCausalLM:
    """A random Llama with tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def save(model: torch.nn.Module, folder: Path, *, with_tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """Write model, generation config and a tokenizer as large as the embedding; returns the folder as text."""
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    (with_tokenizer or tokenizer(rows=model.config.get_text_config().vocab_size)).save_pretrained(folder)
    return str(folder)


def pair(folder: Path, *, rows: int = 64, hidden: int = 16) -> tuple[str, str]:
    """A student and a teacher that differ."""
    student = save(qwen3(seed=1, rows=rows, hidden=hidden), folder / "student")
    teacher = save(qwen3(seed=2, rows=rows, hidden=hidden), folder / "teacher")
    return student, teacher


@contextmanager
def grad_modes(model: torch.nn.Module) -> Iterator[list[bool]]:
    """Of every forward of a causal language model in the block: whether it recorded a graph."""
    modes: list[bool] = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    try:
        yield modes
    finally:
        handle.remove()
