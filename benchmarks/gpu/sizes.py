"""How large things are: on a GPU those of Qwen3-0.6B taught by Qwen3-1.7B, with random weights; tiny ones for a CPU."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from benchmarks.speed.peers.settings import word_tokenizer

PROMPT = 28  # tokens of every prompt
STUDENT, TEACHER, PROMPTS = "student", "teacher", "prompts.jsonl"
EOS, PAD = 1, 0
WORDS = "abcdefghijklmnop"


@dataclass(frozen=True)
class Shape:
    """Of a Qwen3 model with tied heads."""

    layers: int
    width: int
    inner: int
    heads: int
    key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class StepSize:
    """A training step that is measured.

    Args:
        name: of its row.
        rows: responses.
        tokens: of each.
        sampled: written by the student; else random ids, so that only scoring and update are measured.
        recompute: activations are computed again in the backward pass.
        budget: padded tokens a micro-batch.
    """

    name: str
    rows: int
    tokens: int
    sampled: bool
    recompute: bool
    budget: int


@dataclass(frozen=True)
class Sizes:
    """Of everything that is run.

    Args:
        student, teacher: shapes.
        vocabulary: embedding rows of both.
        decode_rows: batch sizes of decode steps.
        decode_tokens: decode steps that are measured.
        steps: training steps that are measured.
        step_repeats: of each, after a first one that is left out.
        head_tokens: tokens that meet the head alone.
        head_repeats: of each measurement of the head.
        run_steps: optimizer steps of the whole runs: long, middle, short.
        val_limit: rows of the whole runs' validation, None for all.
    """

    student: Shape
    teacher: Shape
    vocabulary: int
    decode_rows: tuple[int, ...]
    decode_tokens: int
    steps: tuple[StepSize, ...]
    step_repeats: int
    head_tokens: int
    head_repeats: int
    run_steps: tuple[int, int, int]
    val_limit: int | None


FULL = Sizes(
    student=Shape(28, 1024, 3072, 16, 8, 128),
    teacher=Shape(28, 2048, 6144, 16, 8, 128),
    vocabulary=151_936,
    decode_rows=(1, 32, 128),
    decode_tokens=40,
    steps=(
        StepSize("32 rows of 256 sampled tokens, recomputation", 32, 256, sampled=True, recompute=True, budget=16_384),
        StepSize("one row of 16,256 tokens, recomputation", 1, 16_256, sampled=False, recompute=True, budget=16_384),
        StepSize("8 rows of 2,016 tokens, no recomputation", 8, 2_016, sampled=False, recompute=False, budget=16_384),
    ),
    step_repeats=2,
    head_tokens=16_384,
    head_repeats=5,
    run_steps=(40, 20, 6),
    val_limit=None,
)
TINY = Sizes(
    student=Shape(2, 32, 64, 2, 1, 16),
    teacher=Shape(2, 48, 96, 2, 1, 24),
    vocabulary=97,
    decode_rows=(1, 3),
    decode_tokens=3,
    steps=(
        StepSize("3 rows of 4 sampled tokens, recomputation", 3, 4, sampled=True, recompute=True, budget=72),
        StepSize("2 rows of 8 tokens, no recomputation", 2, 8, sampled=False, recompute=False, budget=72),
    ),
    step_repeats=1,
    head_tokens=64,
    head_repeats=1,
    run_steps=(2, 2, 2),
    val_limit=8,
)


def random_model(shape: Shape, vocabulary: int, *, dtype: torch.dtype, device: str, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights and nothing that ends a response."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(dtype)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    return model.eval()


def write_models(folder: Path, sizes: Sizes, *, device: str) -> None:
    """Folders of student and teacher in bfloat16, and prompts of ``PROMPT`` tokens, unless they are there."""
    for seed, (role, shape) in enumerate(((STUDENT, sizes.student), (TEACHER, sizes.teacher))):
        if not (folder / role / "tokenizer_config.json").is_file():
            model = random_model(shape, sizes.vocabulary, dtype=torch.bfloat16, device=device, seed=seed)
            model.save_pretrained(folder / role)
            word_tokenizer(sizes.vocabulary).save_pretrained(folder / role)
    rows = [{"prompt": (WORDS[row % len(WORDS)] * (PROMPT - 2))} for row in range(256)]
    (folder / PROMPTS).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
