"""Models of Hugging Face folders outside a training: loaded frozen, given a run's prompts, sampled with fixed streams."""

from __future__ import annotations

from typing import Any

from lit_opd.models.loading import load_causal_lm, load_tokenizer
from lit_opd.models.vocabulary import configured_stops, num_used, unused_ids
from lit_opd.prompts.datamodule import PromptDataModule
from lit_opd.rollout import Sampler, SamplingSettings, TransformersSampler
from lit_opd.scoring.model import ScoringModel
from lit_opd.types import PromptBatch, Rollout


def load_policy(path: str) -> ScoringModel:
    """A frozen float32 policy of a Hugging Face folder."""
    model = load_causal_lm(path, "path", dtype="float32")
    tokenizer = load_tokenizer(path, "path", pads=False)
    policy = ScoringModel(model, vocabulary=num_used(tokenizer), unused=unused_ids(tokenizer))
    return policy.requires_grad_(False).eval()


def held_out(settings: dict[str, Any], tokenizer: Any) -> PromptBatch:
    """The first batch of the validation prompts that the ``data`` section of a configuration names."""
    data = PromptDataModule(**{name: value for name, value in settings.items() if value is not None})
    data.use_tokenizer(tokenizer)
    data.setup("validate")
    return next(iter(data.val_dataloader()))


def sample(
    policy: ScoringModel,
    prompts: PromptBatch,
    tokenizer: Any,
    path: str,
    *,
    new_tokens: int,
    seed: int,
    greedy: bool = False,
    sampler: type[Sampler] = TransformersSampler,
) -> Rollout:
    """Temperature-1 responses with fixed random streams.

    Args:
        policy: to sample from.
        prompts: a row each.
        tokenizer: of the prompts.
        path: the policy's folder, which names the ids that end a response.
        new_tokens: longest response.
        seed: of the streams.
        greedy: the likeliest token each time, in place of temperature 1.
        sampler: which engine; the tokens are the same up to the rounding of logits.
    """
    settings = SamplingSettings(
        max_new_tokens=new_tokens,
        stop_ids=tuple(sorted(configured_stops(path, tokenizer))),
        pad_id=tokenizer.pad_token_id,
        vocabulary=policy.vocabulary,
        seed=seed,
        greedy=greedy,
    )
    return sampler(max_new_tokens=new_tokens).sample(policy, prompts, settings)
