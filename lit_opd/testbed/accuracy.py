"""How often a model answers testbed prompts rightly, by plain `generate`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_opd.errors import InputError
from lit_opd.testbed.task import BOX, CODE_LENGTH
from lit_opd.testbed.tokenizer import prompt_ids

MAX_NEW_TOKENS = 96
BATCH_SIZE = 128


def boxed_answer(text: str) -> str | None:
    """The code in the last box of ``text``, None where there is no whole box.

    >>> boxed_answer("093417\\\\boxed{417}")
    '417'
    """
    code, brace, _ = text.rpartition(BOX)[2].partition("}")
    return code if BOX in text and brace and len(code) == CODE_LENGTH else None


@torch.no_grad()
def respond(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], *, greedy: bool = True
) -> list[str]:
    """One response a prompt, special tokens removed: greedy, or sampled at temperature 1 from torch's global stream.

    Raises:
        InputError: for prompts of unlike lengths (chains of unlike lengths), which would need padding.
    """
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    if len({len(row) for row in rows}) > 1:
        raise InputError("`respond.prompts` must have one length, got several; call it once for each chain length")
    responses = []
    for start in range(0, len(rows), BATCH_SIZE):
        ids = torch.tensor(rows[start : start + BATCH_SIZE])
        sampling = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=not greedy,
            max_new_tokens=MAX_NEW_TOKENS,
            **sampling,
        )
        responses += tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return responses


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[dict[str, str]],
    *,
    samples: int = 0,
) -> float:
    """Fraction of right answers in [0, 1].

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        rows: data rows with "prompt" and "answer".
        samples: responses drawn at temperature 1 for each prompt (avg@samples); 0 for one greedy response.
    """
    repeated = [row for row in rows for _ in range(max(samples, 1))]
    responses = respond(model, tokenizer, [row["prompt"] for row in repeated], greedy=samples == 0)
    right = [boxed_answer(text) == row["answer"] for text, row in zip(responses, repeated, strict=True)]
    return sum(right) / len(right)
