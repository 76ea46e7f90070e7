"""Tiny students and teachers with unlike tokenizers, in folders, and responses of texts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from lit_opd.types import FinishReason, PromptBatch, Provenance, Rollout
from tests.helpers import spelled, tiny

LETTERS = "abcdef "
MERGES = [("a", "b"), ("ab", "c"), ("d", "e")]  # of the student; a teacher may have the first and the last only


def tokenizer(
    merges: list[tuple[str, str]], *, order: list[int] | None = None, letters: str = LETTERS
) -> PreTrainedTokenizerFast:
    """PAD, EOS, letters and merges, numbered in turn or as ``order`` says: the n-th has the id order[n]."""
    tokens = [spelled.PAD, spelled.EOS, *letters, *(first + second for first, second in merges)]
    order = list(range(len(tokens))) if order is None else order
    return spelled.literal(merges, ids=dict(zip(tokens, order, strict=True)))


def save(model: Any, folder: Path, tokens: Any) -> str:
    """A folder in which every file names the tokenizer's own end and pad."""
    ends = {"eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ends))
    return str(folder)


def model(seed: int, rows: int, **settings: Any) -> Any:
    """A random model with visible differences, in float64."""
    return tiny.qwen3(seed=seed, rows=rows, **settings).double()


def permuted(plain: Any, order: list[int]) -> Any:
    """The same model with token n at the id order[n]."""
    other = copy.deepcopy(plain)
    with torch.no_grad():
        for part in ("embed_tokens", "lm_head"):
            old = plain.get_input_embeddings() if part == "embed_tokens" else plain.get_output_embeddings()
            new = other.get_input_embeddings() if part == "embed_tokens" else other.get_output_embeddings()
            new.weight[torch.tensor(order)] = old.weight
    return other


def padded(rows: list[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, part in enumerate(rows):
        place = slice(width - len(part), width) if left else slice(0, len(part))
        ids[row, place], mask[row, place] = torch.tensor(part, dtype=torch.int64), True
    return ids, mask


def rollout(
    student: Any, teacher: Any, texts: list[str | list[int]], *, prompts: list[str], cut: frozenset[int] = frozenset()
) -> Rollout:
    """Responses of ``texts`` in the student's tokens (or of given ids) to prompts that both read in their own; rows in ``cut`` do
    not end."""

    def ids(tokens: Any, text: str | list[int]) -> list[int]:
        return list(tokens(text, add_special_tokens=False)["input_ids"]) if isinstance(text, str) else list(text)

    responses = [ids(student, text) + ([] if row in cut else [student.eos_token_id]) for row, text in enumerate(texts)]
    own, own_mask = padded([ids(student, prompt) for prompt in prompts], left=True)
    their, their_mask = padded([ids(teacher, prompt) for prompt in prompts], left=True)
    response, mask = padded(responses, left=False)
    batch = PromptBatch(
        own,
        own_mask,
        torch.arange(100, 100 + len(texts)),
        tuple(f"row-{row}" for row in range(len(texts))),
        teacher_ids=their,
        teacher_mask=their_mask,
    )
    ends = [FinishReason.LENGTH if row in cut else FinishReason.STOP for row in range(len(texts))]
    finish = torch.tensor([int(end) for end in ends], dtype=torch.int8)
    return Rollout(batch, response, mask, torch.zeros(mask.shape), finish, Provenance("fixed"))
