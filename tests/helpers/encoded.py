"""Texts as a batch of prompts, as the data room would make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_opd.prompts.encoding import PromptEncoder, collate, encode_rows, pad_token_id
from lit_opd.prompts.sources import PromptRow, checked_prompt
from lit_opd.types import PromptBatch


def encode_prompts(
    encoder: PromptEncoder,
    prompts: Sequence[Any],
    *,
    row_ids: Sequence[str] | None = None,
    answers: Sequence[str | None] | None = None,
    num_samples: int = 1,
) -> PromptBatch:
    """N texts or message lists, each in ``num_samples`` adjacent rows."""
    row_ids = [f"prompt-{n}" for n in range(len(prompts))] if row_ids is None else row_ids
    answers = [None] * len(prompts) if answers is None else answers
    rows = [
        PromptRow(row_id, checked_prompt(prompt, row_id), answer, where=row_id)
        for row_id, prompt, answer in zip(row_ids, prompts, answers, strict=True)
    ]
    repeated = [(prompt, sample) for prompt in encode_rows(rows, encoder) for sample in range(num_samples)]
    pad_id = pad_token_id(encoder.tokenizer)
    return collate([prompt for prompt, _ in repeated], pad_id, samples=[sample for _, sample in repeated])
