"""One response, a token at a time, for somebody who reads along; the tokens are the sampling engines' own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from lit_opd.masked import at_least_float32
from lit_opd.rollout.base import SamplingSettings
from lit_opd.rollout.decoding.drawing import choose
from lit_opd.scoring.model import ScoringModel
from lit_opd.streams import row_uniforms


def stream(model: ScoringModel, prompt: Sequence[int], settings: SamplingSettings, *, row_key: int) -> Iterator[int]:
    """Token ids of a response as they are drawn; the stop id is the last one.

    Args:
        model: any causal language model that keeps keys and values.
        prompt: token ids.
        settings: as for ``Sampler.sample``, without ``stop`` and ``unused_ids``, which the model knows.
        row_key: names the random stream.
    """
    key = torch.tensor([row_key])
    uniforms = row_uniforms(settings.seed, key, settings.step, settings.max_new_tokens, domain=settings.domain)
    ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    cache = DynamicCache(config=model.causal_lm.config)
    for drawn in range(settings.max_new_tokens):
        token, _ = choose(_next_logits(model, ids, cache), uniforms[:, drawn].to(ids.device), settings)
        yield int(token)
        if int(token) in settings.stop_ids:
            return
        ids = token.unsqueeze(-1)


@torch.no_grad()
def _next_logits(model: ScoringModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    """[1, V] after ``ids`` [1, n], which go into the cache."""
    logits = model.causal_lm(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    return model.without_unused(at_least_float32(logits[:, : model.vocabulary]))
