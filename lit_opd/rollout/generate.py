"""The reference engine: transformers' ``generate`` with a random stream of its own for every row.

``generate`` takes no seeds a row and keeps every step's logits when asked for log-probs. Here a logits processor draws
each row's token itself, by inverting the cumulative distribution at that row's own uniform number, records the
token's log-prob, and leaves ``generate`` no choice. The row's sample then depends on (seed, step, row key) and the
weights only, and nothing of size [steps, B, V] exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lit_opd.rollout.base import Sampler, SamplingSettings, finish
from lit_opd.streams import row_uniforms
from lit_opd.types import InputError, PromptBatch, Rollout, at_least_float32

ENGINE = "transformers"


def sampled_distribution(logits: Tensor, *, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Log-probs of the distribution that is sampled from: temperature, then top-k, then top-p, renormalised.

    Args:
        logits: [B, V].
        temperature: > 0.
        top_p: the smallest set of likeliest tokens whose mass reaches it stays.
        top_k: candidates, 0 for all.
    Returns:
        [B, V] nats, -inf on excluded tokens, at least float32.
    """
    logprobs = (at_least_float32(logits) / temperature).log_softmax(-1)
    if 0 < top_k < logprobs.shape[-1]:
        least = logprobs.topk(top_k, dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < least, -torch.inf).log_softmax(-1)
    if top_p < 1.0:
        ordered, order = logprobs.sort(dim=-1, descending=True)
        mass_before = ordered.exp().cumsum(-1) - ordered.exp()
        excluded = torch.zeros_like(mass_before, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
        logprobs = logprobs.masked_fill(excluded, -torch.inf).log_softmax(-1)
    return logprobs


def invert(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative probability passes the row's uniform number.

    Args:
        logprobs: [B, V] nats, -inf on excluded tokens.
        uniforms: float64 [B] in [0, 1).
    Returns:
        int64 [B]; never an excluded token.
    """
    cumulative = logprobs.double().exp().cumsum(-1)
    wanted = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, wanted, right=True).clamp(max=logprobs.shape[-1] - 1)
    return token.squeeze(-1)


class _Draw(LogitsProcessor):
    """Draws and records one token a row; ``generate`` then takes the only finite score."""

    def __init__(self, uniforms: Tensor, settings: SamplingSettings) -> None:
        self.uniforms, self.settings = uniforms, settings
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        settings = self.settings
        allowed = scores[:, : settings.vocabulary]
        if settings.greedy:
            logprobs = at_least_float32(allowed).log_softmax(-1)
            token = logprobs.argmax(-1)
        else:
            logprobs = sampled_distribution(
                allowed, temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k
            )
            token = invert(logprobs, self.uniforms[:, len(self.logprobs)])
        self.logprobs.append(logprobs.gather(-1, token.unsqueeze(-1)).squeeze(-1))
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(-1, token.unsqueeze(-1), 0.0)


class TransformersSampler(Sampler):
    """Samples with transformers' ``generate``; runs wherever the model runs."""

    @torch.no_grad()
    def sample(self, model: Any, prompts: PromptBatch, settings: SamplingSettings) -> Rollout:
        """One response a row, [B, T <= max_new_tokens]; see ``Sampler.sample``."""
        _require_room(model, prompts, settings)
        uniforms = row_uniforms(
            settings.seed, prompts.row_keys, settings.step, settings.max_new_tokens, domain=settings.domain
        )
        draw = _Draw(uniforms, settings)
        training = model.training
        model.eval()  # no dropout, and gradient checkpointing would switch the cache off
        try:
            ids = model.generate(
                input_ids=prompts.ids,
                attention_mask=prompts.mask.long(),
                generation_config=_generation_config(settings),
                logits_processor=LogitsProcessorList([draw]),
                synced_gpus=settings.synced,
            )
        finally:
            model.train(training)
        response = ids[:, prompts.ids.shape[1] :]
        logprobs = torch.stack(draw.logprobs[: response.shape[1]], -1)
        return finish(prompts, response, logprobs, settings, engine=ENGINE)


def _generation_config(settings: SamplingSettings) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=list(settings.stop_ids),
        pad_token_id=settings.pad_id,
        use_cache=True,
    )


def _require_room(model: Any, prompts: PromptBatch, settings: SamplingSettings) -> None:
    window = getattr(model.causal_lm.config, "max_position_embeddings", None)
    longest = int(prompts.ids.shape[1])
    if window is not None and longest + settings.max_new_tokens > window:
        raise InputError(
            f"`model.sampler.max_new_tokens` must leave room in the context window of {window} tokens: prompts of {longest} "
            f"and responses of {settings.max_new_tokens} need {longest + settings.max_new_tokens}; lower it or "
            "`data.max_prompt_tokens`"
        )
