"""The fast engine: a decode loop of our own around the model's decoder.

What ``generate`` cannot do: the token and its log-prob come from one pass over the logits; rows that have ended leave the
batch, so the longest answer is not paid for by all; samples of one prompt share its prefill; keys and values are written into
one growing buffer instead of being copied every step; and a decoder of the usual kind runs in few operations
(``lit_opd.rollout.decoding.plain_decoder``). docs/benchmarks.md says what it saves. Tokens are those of
``TransformersSampler`` for the same seeds, up to the rounding of logits.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lit_opd.errors import InputError
from lit_opd.rollout.base import EarlyStop, Sampler, SamplingSettings, cached_casts, finish, require_room
from lit_opd.rollout.decoding.drawing import choose
from lit_opd.rollout.decoding.key_values import CachedRows, require_full_attention
from lit_opd.rollout.decoding.plain_decoder import FEW_ROWS, PlainDecoder, is_plain_decoder
from lit_opd.streams import row_uniforms
from lit_opd.types import PromptBatch, Rollout

ENGINE = "decode"
ENDED_SHARE = 0.25  # of the rows: when so many have ended, they leave the batch
CHECK_EVERY = 16  # steps between looks at which rows ended, where looking means waiting for the device
CHECK_EVERY_ON_CPU = 1
PROBE_TOLERANCE = 1e-4  # nats between the model's own next-token log-probs and those of ``PlainDecoder``, for 16-bit
PROBE_TOLERANCE_HALF = 0.1  # weights this
_AGREES: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # what the probe said of a model


class DecodeSampler(Sampler):
    """Samples with a decode loop of its own; runs where every layer attends to all earlier tokens.

    Other models (sliding windows, linear attention) need ``TransformersSampler``.
    """

    stops_early = True

    @torch.no_grad()
    def sample(self, model: Any, prompts: PromptBatch, settings: SamplingSettings) -> Rollout:
        """One response a row, [B, T <= max_new_tokens]; see ``Sampler.sample``."""
        require_room(model, prompts, settings)
        require_full_attention(model.causal_lm.config.get_text_config(), refusal=_refusal)
        with cached_casts(prompts.ids.device):
            watch = None if settings.stop is None else settings.stop(prompts, settings)
            ids, logprobs = model.run(_decode, prompts, settings, watch)
        rollout = finish(prompts, ids, logprobs, settings, engine=ENGINE)
        return rollout if watch is None else watch.cut(rollout, pad_id=settings.pad_id)


def _refusal(config: Any, why: str) -> InputError:
    return InputError(
        f"`model.sampler` must be TransformersSampler for a {type(config).__name__} with {why}, got DecodeSampler, "
        "which serves full attention with one key and value a token and layer only"
    )


def _decode(
    model: Any, prompts: PromptBatch, settings: SamplingSettings, watch: EarlyStop | None
) -> tuple[Tensor, Tensor]:
    """Token ids int64 [B, T] and log-probs [B, T]; what stands behind a row's first stop id has no meaning."""
    batch = _Batch(model, prompts, settings, plain=_runs_plain(model, prompts.ids.device))
    uniforms = row_uniforms(
        settings.seed, prompts.row_keys, settings.step, settings.max_new_tokens, domain=settings.domain
    )
    # transformers keeps tensors of a forward in its modules: inference mode is for our own decoder only
    with torch.inference_mode() if batch.by_plain_decoder else nullcontext():
        ids, logprobs = _written(batch, uniforms, settings, watch)
    return ids.clone(), logprobs.clone()  # a tensor of inference mode cannot meet a gradient


def _written(
    batch: _Batch, uniforms: Tensor, settings: SamplingSettings, watch: EarlyStop | None
) -> tuple[Tensor, Tensor]:
    """The responses of ``batch``, column by column, as ``_decode`` returns them."""
    device, total = uniforms.device, len(uniforms)
    every = CHECK_EVERY_ON_CPU if device.type == "cpu" else CHECK_EVERY
    share = ENDED_SHARE
    if watch is not None:
        every, share = watch.chunk, 0.0  # a text given up is not written for a chunk more
    stops = torch.tensor(settings.stop_ids, dtype=torch.int64, device=device)
    rows, ended = torch.arange(total, device=device), torch.zeros(total, dtype=torch.bool, device=device)
    ids = torch.full((total, settings.max_new_tokens), settings.pad_id, device=device)
    logprobs: Tensor | None = None
    for step in range(settings.max_new_tokens):
        token, logprob = choose(batch.logits(), uniforms[rows, step], settings)
        logprobs = logprob.new_zeros(ids.shape) if logprobs is None else logprobs
        ids[rows, step], logprobs[rows, step] = token, logprob
        ended, last = ended | torch.isin(token, stops), step + 1 == settings.max_new_tokens
        look = (step + 1) % every == 0
        if watch is not None and (look or last):
            ended = ended | watch.collapsed(rows, ids, logprobs, step + 1)
        if look:
            num_ended = int(ended.sum())
            if num_ended == len(ended):
                break
            if num_ended and num_ended >= share * len(ended):
                left = (~ended).nonzero().squeeze(-1)
                batch.select(left)
                if watch is not None:
                    watch.select(left)
                rows, ended, token = rows[left], ended[left], token[left]
        if not last:
            batch.append(token)
    assert logprobs is not None
    return ids[:, : step + 1], logprobs[:, : step + 1]


class _Batch(CachedRows):
    """The rows that are still being written."""

    def __init__(self, model: Any, prompts: PromptBatch, settings: SamplingSettings, *, plain: bool) -> None:
        most = prompts.ids.shape[1] + settings.max_new_tokens - 1
        super().__init__(model, prompts.ids, prompts.mask, most=most, refusal=_refusal)
        self.vocabulary, self.by_plain_decoder = settings.vocabulary, plain
        self.decoder = self._decoder()

    def _decoder(self) -> PlainDecoder | None:
        return (
            PlainDecoder(self.model.causal_lm, rows=len(self.mask), columns=self.most + 1)
            if self.by_plain_decoder
            else None
        )

    def logits(self) -> Tensor:
        """[B, V] of the coming token, at least float32."""
        if self.decoder is None:
            logits = self.model.next_logits(self.states)
        else:
            logits = self.model.without_unused(self.decoder.logits(self.states)[:, : self.model.vocabulary])
        return logits[:, : self.vocabulary]  # type: ignore[no-any-return]

    def append(self, token: Tensor) -> None:
        """Run the model on one token a row, int64 [B]."""
        mask, positions = self.grow(1)
        if self.decoder is not None:
            self.states = self.decoder.states(token, self.position, mask, self.layers)
        else:
            self.states = self.model.next_states(token.unsqueeze(-1), mask, positions, self.cache)

    def select(self, rows: Tensor) -> None:
        """Keep ``rows``, int64 [R]."""
        few = len(rows) <= FEW_ROWS < len(self.mask)
        self.take(rows)
        if few:
            self.decoder = self._decoder()  # whose products depend on the number of rows


def _runs_plain(model: Any, device: torch.device) -> bool:
    """True where ``PlainDecoder`` takes the steps; a model is compared with its own forward once."""
    if model.full_logits or torch.is_autocast_enabled(device.type) or not is_plain_decoder(model.causal_lm):
        return False
    if model not in _AGREES:
        _AGREES[model] = _agrees(model, device)
    return _AGREES[model]


@torch.no_grad()
def _agrees(model: Any, device: torch.device) -> bool:
    """Two tokens behind a padded batch of two prompts have the same log-probs either way."""
    ids = torch.arange(6, device=device).reshape(2, 3) % model.vocabulary
    mask = torch.tensor([[False, True, True], [True] * 3], device=device)
    prompts = PromptBatch(ids, mask, torch.arange(2, device=device), ("0", "1"))
    settings = SamplingSettings(max_new_tokens=2, stop_ids=(), pad_id=0, vocabulary=model.vocabulary)
    own, ours = (_Batch(model, prompts, settings, plain=plain) for plain in (False, True))
    for batch in (own, ours):
        batch.append(ids[:, 0])
    gap = float((own.logits().log_softmax(-1) - ours.logits().log_softmax(-1)).abs().max())
    agrees = gap <= (PROBE_TOLERANCE_HALF if own.states.dtype.itemsize == 2 else PROBE_TOLERANCE)
    if not agrees:
        warnings.warn(f"DecodeSampler runs {type(model.causal_lm).__name__}'s own forward, which is slower: a decode step in "
                      f"few operations differs by {gap:.3g} nats on a probe", stacklevel=2)  # fmt: skip
    return agrees
