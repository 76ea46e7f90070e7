"""The fast engine: a decode loop of our own around the model's decoder.

What ``generate`` cannot do: the token and its log-prob come from one pass over the logits; rows that have ended leave the
batch, so the longest answer is not paid for by all; samples of one prompt share its prefill; keys and values are written into
one growing buffer instead of being copied every step. docs/benchmarks.md says what it saves: little where no row ends early.

Tokens are those of ``TransformersSampler`` for the same seeds, up to the rounding of logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lit_opd.rollout.base import Sampler, SamplingSettings, cached_casts, finish, require_room
from lit_opd.rollout.drawing import choose
from lit_opd.streams import row_uniforms
from lit_opd.types import InputError, PromptBatch, Rollout

ENGINE = "decode"
ENDED_SHARE = 0.25  # of the rows: when so many have ended, they leave the batch
CHECK_EVERY = 16  # steps between looks at which rows ended, where looking means waiting for the device
CHECK_EVERY_ON_CPU = 1
FIRST_COLUMNS = 64  # columns by which a key-value buffer is longer than the prompt at first; then it doubles


class _Slab(DynamicLayer):
    """Keys and values of one layer in a buffer [B, heads, columns, size] that doubles up to ``most`` columns."""

    def __init__(self, *, most: int) -> None:
        super().__init__()
        self.most, self.length = most, 0
        self.held: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns, [B, heads, n, size] each; returns all of them, [B, heads, written, size]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.held = [key_states[:, :, :0], value_states[:, :, :0]]
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.held[0].shape[-2]:
            room = max(self.length, min(self.most, max(2 * start, self.length + FIRST_COLUMNS))) - start
            self.held = [F.pad(held[:, :, :start], (0, 0, 0, room)) for held in self.held]
        for held, new in zip(self.held, (key_states, value_states), strict=True):
            held[:, :, start : self.length] = new
        keys, values = self.held
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Columns written."""
        return self.length

    def select(self, rows: Tensor, start: int) -> None:
        """Keep ``rows`` (int64 [R], with repetition) and the columns from ``start`` on."""
        self.held = [held[rows, :, start : self.length] for held in self.held]
        self.length -= start


class DecodeSampler(Sampler):
    """Samples with a decode loop of its own; runs where every layer attends to all earlier tokens.

    Other models (sliding windows, linear attention) need ``TransformersSampler``.
    """

    @torch.no_grad()
    def sample(self, model: Any, prompts: PromptBatch, settings: SamplingSettings) -> Rollout:
        """One response a row, [B, T <= max_new_tokens]; see ``Sampler.sample``."""
        require_room(model, prompts, settings)
        _require_full_attention(model.causal_lm.config.get_text_config())
        if settings.synced:
            raise InputError("`SamplingSettings.synced` must be False for DecodeSampler; gather sharded weights first")
        training = model.training
        model.eval()  # no dropout, and gradient checkpointing would switch the cache off
        try:
            with cached_casts(prompts.ids.device):
                ids, logprobs = model.run(_decode, prompts, settings)
        finally:
            model.train(training)
        return finish(prompts, ids, logprobs, settings, engine=ENGINE)


def _require_full_attention(config: Any) -> None:
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    unnamed = "sliding_attention" if window else "full_attention"
    kinds = set(getattr(config, "layer_types", None) or {unnamed}) - {"full_attention"}
    if kinds:
        raise _refusal(config, f"layers of kind {', '.join(sorted(kinds))}")


def _refusal(config: Any, why: str) -> InputError:
    return InputError(
        f"`model.sampler` must be TransformersSampler for a {type(config).__name__} with {why}, got DecodeSampler, "
        "which serves full attention with one key and value a token and layer only"
    )


def _decode(model: Any, prompts: PromptBatch, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """Token ids int64 [B, T] and log-probs [B, T]; what stands behind a row's first stop id has no meaning."""
    uniforms = row_uniforms(
        settings.seed, prompts.row_keys, settings.step, settings.max_new_tokens, domain=settings.domain
    )
    batch = _Batch(model, prompts, settings)
    device = prompts.ids.device
    every = CHECK_EVERY_ON_CPU if device.type == "cpu" else CHECK_EVERY
    stops = torch.tensor(settings.stop_ids, dtype=torch.int64, device=device)
    rows, ended = torch.arange(len(prompts), device=device), torch.zeros(len(prompts), dtype=torch.bool, device=device)
    ids = torch.full((len(prompts), settings.max_new_tokens), settings.pad_id, device=device)
    logprobs: Tensor | None = None
    for step in range(settings.max_new_tokens):
        token, logprob = choose(batch.logits(), uniforms[rows, step], settings)
        logprobs = logprob.new_zeros(ids.shape) if logprobs is None else logprobs
        ids[rows, step], logprobs[rows, step] = token, logprob
        ended = ended | torch.isin(token, stops)
        if (step + 1) % every == 0:
            num_ended = int(ended.sum())
            if num_ended == len(ended):
                break
            if num_ended >= ENDED_SHARE * len(ended):
                left = (~ended).nonzero().squeeze(-1)
                batch.select(left)
                rows, ended, token = rows[left], ended[left], token[left]
        if step + 1 < settings.max_new_tokens:
            batch.append(token)
    assert logprobs is not None
    return ids[:, : step + 1], logprobs[:, : step + 1]


class _Batch:
    """The rows that are still being written: their keys and values, last hidden states and masks."""

    def __init__(self, model: Any, prompts: PromptBatch, settings: SamplingSettings) -> None:
        self.model, self.vocabulary = model, settings.vocabulary
        config, columns = model.causal_lm.config.get_text_config(), prompts.ids.shape[1]
        most = columns + settings.max_new_tokens - 1
        self.layers = [_Slab(most=most) for _ in range(config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))
        together = torch.cat([prompts.ids, prompts.mask.long()], -1)
        _, group = torch.unique_consecutive(together, dim=0, return_inverse=True)
        first = torch.cat([group.new_ones(1), group.diff()]).nonzero().squeeze(-1)
        mask = prompts.mask[first]
        self.padded = not bool(mask.all())
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        self.states = self._forward(prompts.ids[first], mask if self.padded else None, positions)
        self.mask, self.position = mask, positions[:, -1:]
        if any(layer.length != columns for layer in self.layers):
            raise _refusal(config, "layers that do not write the key-value cache")
        if len(first) < len(prompts):
            self.select(group)

    def logits(self) -> Tensor:
        """[B, V] of the coming token, at least float32."""
        return self.model.next_logits(self.states)[:, : self.vocabulary]  # type: ignore[no-any-return]

    def append(self, token: Tensor) -> None:
        """Run the model on one token a row, int64 [B]."""
        self.position = self.position + 1
        if self.padded:
            self.mask = F.pad(self.mask, (0, 1), value=True)
        self.states = self._forward(token.unsqueeze(-1), self.mask if self.padded else None, self.position)

    def select(self, rows: Tensor) -> None:
        """Keep ``rows`` (int64 [R], with repetition), without the columns that are padding in all of them."""
        self.mask, self.position, self.states = self.mask[rows], self.position[rows], self.states[rows]
        start = int(self.mask.any(0).int().argmax()) if self.padded else 0
        self.mask = self.mask[:, start:]
        self.padded = not bool(self.mask.all())
        for layer in self.layers:
            layer.select(rows, start)

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        return self.model.next_states(ids, mask, positions, self.cache)
