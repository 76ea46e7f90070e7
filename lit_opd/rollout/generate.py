"""The reference engine: transformers' ``generate`` with a random stream of its own for every row.

``generate`` takes no seeds a row and keeps every step's logits when asked for log-probs. Here a logits processor draws
each row's token itself, by inverting the cumulative distribution at that row's own uniform number, records the
token's log-prob, and leaves ``generate`` no choice. The row's sample then depends on (seed, step, row key) and the
weights only, and nothing of size [steps, B, V] exists.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lit_opd.masked import at_least_float32
from lit_opd.rollout.base import Sampler, SamplingSettings, cached_casts, finish, require_room
from lit_opd.rollout.decoding.conversation import DecodedConversation
from lit_opd.rollout.decoding.drawing import choose
from lit_opd.rollout.decoding.going_on import CannotGoOn, why_not
from lit_opd.rollout.decoding.own_writer import OwnWriter, prefilled
from lit_opd.types import PromptBatch, Rollout

ENGINE = "transformers"


class _Draw(LogitsProcessor):
    """Draws and records one token a row; ``generate`` then takes the only finite score."""

    def __init__(self, model: Any, uniforms: Tensor, settings: SamplingSettings) -> None:
        self.model, self.uniforms, self.settings = model, uniforms, settings
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = self.model.without_unused(at_least_float32(scores[:, : self.model.vocabulary]))
        logits = logits[:, : self.settings.vocabulary]
        token, logprob = choose(logits, self.uniforms[:, len(self.logprobs)], self.settings)
        self.logprobs.append(logprob)
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(-1, token.unsqueeze(-1), 0.0)


class TransformersSampler(Sampler):
    """Samples with transformers' ``generate``; runs wherever the model runs."""

    continues = True

    _told = False  # that turns are read again

    @torch.no_grad()
    def sample(self, model: Any, prompts: PromptBatch, settings: SamplingSettings) -> Rollout:
        """One response a row, [B, T <= max_new_tokens]; see ``Sampler.sample``."""
        self._refuse_stop(settings)
        require_room(model, prompts, settings)
        draw = _Draw(model, settings.uniforms(prompts.row_keys), settings)
        with cached_casts(prompts.ids.device):
            ids = model.generate(
                input_ids=prompts.ids,
                attention_mask=prompts.mask.long(),
                generation_config=_generation_config(settings),
                logits_processor=LogitsProcessorList([draw]),
                synced_gpus=False,  # sharded weights are gathered for the whole rollout
            )
        response = ids[:, prompts.ids.shape[1] :]
        logprobs = torch.stack(draw.logprobs[: response.shape[1]], -1)
        return finish(prompts, response, logprobs, settings, engine=ENGINE)

    @torch.no_grad()
    def converse(self, model: Any, prompts: PromptBatch, settings: SamplingSettings) -> DecodedConversation | None:
        """Turns in one key-value cache by the model's own forward; None, with one warning, for a model that cannot go on from
        its cache: ``generate`` then reads the conversation again each turn. See ``Sampler.converse``."""
        self._refuse_stop(settings)
        require_room(model, prompts, settings)
        why = model.run(why_not, prompts.ids.device)
        if why is not None:
            self._tell_once(type(model.causal_lm).__name__, why)
            return None
        return DecodedConversation(
            model,
            prompts,
            settings,
            engine=ENGINE,
            every=1,
            prefilled=partial(prefilled, refusal=CannotGoOn),
            writer=OwnWriter,
            plain=lambda model, device: False,
        )

    def _tell_once(self, name: str, why: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                f"TransformersSampler reads a conversation again in each turn, which is slower, because {name} cannot go on from "
                f"the keys and values of earlier turns: {why}",
                stacklevel=3,
            )


def _generation_config(settings: SamplingSettings) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=list(settings.stop_ids),
        pad_token_id=settings.pad_id,
        use_cache=True,
    )
