"""The fast engine: a decode loop of our own around the model's decoder.

What ``generate`` cannot do: the token and its log-prob come from one pass over the logits; rows that have ended leave the
batch, so the longest answer is not paid for by all; samples of one prompt share its prefill; keys and values are written into
one growing buffer instead of being copied every step; and a decoder of the usual kind runs in few operations
(``lit_opd.rollout.decoding.plain_decoder``), under autocast on 16-bit weights that are cast once a rollout, and on CUDA from
a graph (``lit_opd.rollout.decoding.graphs``). docs/benchmarks.md says what it saves. Tokens are those of
``TransformersSampler`` for the same seeds, up to the rounding of logits.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lit_opd.errors import InputError
from lit_opd.rollout.base import (
    EarlyStop,
    Sampler,
    SamplingSettings,
    autocast_dtype,
    cached_casts,
    casts_kept,
    finish,
    require_room,
)
from lit_opd.rollout.decoding.buckets import Buckets
from lit_opd.rollout.decoding.conversation import DecodedConversation
from lit_opd.rollout.decoding.fixed_rows import FixedRows
from lit_opd.rollout.decoding.graphs import StepGraphs
from lit_opd.rollout.decoding.key_values import CachedRows, require_full_attention
from lit_opd.rollout.decoding.own_writer import OwnWriter, prefilled
from lit_opd.rollout.decoding.plain_decoder import PlainDecoder, has_whole_weights, is_plain_decoder
from lit_opd.rollout.decoding.responses import Responses
from lit_opd.types import PromptBatch, Rollout

ENGINE = "decode"
ENDED_SHARE = 0.25  # of the rows: when so many have ended, they leave the batch
CHECK_EVERY = 16  # steps between looks at which rows ended, where looking means waiting for the device
CHECK_EVERY_ON_CPU = 1
# Between the model's own next-token log-probs and those of ``PlainDecoder``: a share of the largest one, or nats where that is
# below 1. Rounding grows with the logits: with log-probs of -32 it was 1.3e-4 nats in a model of 24 layers.
PROBE_TOLERANCE = 1e-4
PROBE_TOLERANCE_HALF = 0.1  # nats, for 16-bit weights
_AGREES: WeakKeyDictionary[Any, dict[torch.dtype | None, bool]] = WeakKeyDictionary()  # what the probe said of a model


class DecodeSampler(Sampler):
    """Samples with a decode loop of its own; runs where every layer attends to all earlier tokens, as one with a sliding window
    does that holds the longest prompt and response.

    Other models (shorter windows, linear attention) need ``TransformersSampler``.
    """

    stops_early = True
    continues = True

    @torch.no_grad()
    def sample(self, model: Any, prompts: PromptBatch, settings: SamplingSettings) -> Rollout:
        """One response a row, [B, T <= max_new_tokens]; see ``Sampler.sample``."""
        require_room(model, prompts, settings)
        columns = prompts.ids.shape[1] + settings.max_new_tokens
        require_full_attention(model.causal_lm.config.get_text_config(), refusal=_refusal, columns=columns)
        with cached_casts(prompts.ids.device):
            watch = None if settings.stop is None else settings.stop(prompts, settings)
            ids, logprobs = model.run(_decode, prompts, settings, watch)
        rollout = finish(prompts, ids, logprobs, settings, engine=ENGINE)
        return rollout if watch is None else watch.cut(rollout, pad_id=settings.pad_id)

    @torch.no_grad()
    def converse(self, model: Any, prompts: PromptBatch, settings: SamplingSettings) -> DecodedConversation:
        """Turns in one key-value cache; see ``Sampler.converse``. To be used without gradient."""
        self._refuse_stop(settings)
        require_room(model, prompts, settings)
        require_full_attention(model.causal_lm.config.get_text_config(), refusal=_refusal)
        every = CHECK_EVERY_ON_CPU if prompts.ids.device.type == "cpu" else CHECK_EVERY
        return DecodedConversation(
            model,
            prompts,
            settings,
            engine=ENGINE,
            every=every,
            prefilled=_prefilled,
            writer=_writer,
            plain=_runs_plain,
        )


def _refusal(config: Any, why: str) -> InputError:
    return InputError(
        f"`model.sampler` must be TransformersSampler for a {type(config).__name__} with {why}, got DecodeSampler, "
        "which serves full attention with one key and value a token and layer only"
    )


def _decode(
    model: Any, prompts: PromptBatch, settings: SamplingSettings, watch: EarlyStop | None
) -> tuple[Tensor, Tensor]:
    """Token ids int64 [B, T] and log-probs [B, T]; what stands after a row's first stop id has no meaning."""
    cached = _prefilled(model, prompts, settings)
    plain = _runs_plain(model, prompts.ids.device)
    uniforms = settings.uniforms(prompts.row_keys)
    # transformers keeps tensors of a forward in its modules: inference mode is for our own decoder only; where it is off, it
    # switches gradients on
    with torch.inference_mode(plain), torch.no_grad():
        responses = Responses(uniforms, settings)
        ids, logprobs = _written(_writer(model, cached, responses), responses, watch)
    return ids.clone(), logprobs.clone()  # a tensor of inference mode cannot meet a gradient


_prefilled = partial(prefilled, refusal=_refusal)


def _writer(model: Any, cached: CachedRows, responses: Responses) -> OwnWriter | _PlainWriter:
    plain = _runs_plain(model, cached.mask.device)
    return _PlainWriter(model, cached, responses) if plain else OwnWriter(model, cached, responses)


class _Writer(Protocol):
    """The rows that are still being written, in a model."""

    def rows(self, count: int) -> int:
        """How many it runs to write ``count``."""

    def first(self) -> None:
        """Draw the first token of every row, after the prompts."""

    def advance(self) -> None:
        """Run the model on the last token of every row, and draw the next."""

    def select(self, kept: Tensor) -> None:
        """Go on with some of the rows still written, int64 [R]."""


def _written(writer: _Writer, responses: Responses, watch: EarlyStop | None) -> tuple[Tensor, Tensor]:
    """The responses, column by column, as ``_decode`` returns them."""
    settings, on_cpu = responses.settings, responses.token.device.type == "cpu"
    every, share = CHECK_EVERY_ON_CPU if on_cpu else CHECK_EVERY, ENDED_SHARE
    if watch is not None:
        every, share = watch.chunk, 0.0  # a text given up is not written for a chunk more
    writer.first()
    for columns in range(1, settings.max_new_tokens + 1):
        look, last = columns % every == 0, columns == settings.max_new_tokens
        if watch is not None and (look or last):
            rows = responses.rows[: responses.count]
            collapsed = watch.collapsed(rows, responses.ids, responses.logprobs, columns)
            responses.ended[: responses.count].logical_or_(collapsed)
        if last:
            break
        if look:
            ended = responses.ended[: responses.count]
            num_ended = int(ended.sum())
            num_left = len(ended) - num_ended
            if not num_left:
                break
            if num_ended and num_ended >= share * len(ended):
                if watch is not None or writer.rows(num_left) < writer.rows(len(ended)):
                    left = (~ended).nonzero().squeeze(-1)
                    writer.select(left)
                    if watch is not None:
                        watch.select(left)
        writer.advance()
    return responses.ids[:, :columns], responses.logprobs[:, :columns]


class _PlainWriter:
    """By ``PlainDecoder``, in steps of fixed shapes."""

    def __init__(self, model: Any, cached: CachedRows, responses: Responses) -> None:
        self.model, self.responses, device = model, responses, cached.mask.device
        self.half, self.most = autocast_dtype(device), cached.most + 1
        self.without_autocast = torch.autocast(device.type, enabled=False)  # every cast is the decoder's own
        self.buckets, self.graphs = Buckets.of(device), StepGraphs(device)
        self.states, self.decoder = cached.states, self._decoder(len(cached.mask))
        self.fixed = FixedRows(cached, buckets=self.buckets, dtype=self.decoder.dtype)

    def _decoder(self, rows: int) -> PlainDecoder:
        return PlainDecoder(self.model.causal_lm, rows=rows, columns=self.most, half=self.half)

    def rows(self, count: int) -> int:
        """See ``_Writer``."""
        return self.buckets.rows(count)

    def first(self) -> None:
        """See ``_Writer``."""
        with self.without_autocast:
            self._draw(self.states)
        rows, bucket = self.responses.count, self.rows(self.responses.count)
        if bucket > rows:
            self.select(torch.arange(rows, device=self.states.device))

    def advance(self) -> None:
        """See ``_Writer``."""
        self.fixed.reserve()
        with self.without_autocast:
            self.graphs.run(self._step, self.fixed.version)

    def _step(self) -> None:
        fixed, token = self.fixed, self.responses.token
        bias = fixed.step()
        self._draw(self.decoder.states(token, fixed.position, fixed.column, fixed.caches, fixed.columns, bias))

    def _draw(self, states: Tensor) -> None:
        logits = self.model.without_unused(self.decoder.logits(states)[:, : self.model.vocabulary])
        self.responses.draw(logits[:, : self.responses.settings.vocabulary])

    def select(self, kept: Tensor) -> None:
        """See ``_Writer``; ``kept`` int64 [R]."""
        bucket = self.rows(len(kept))
        self.fixed.select(torch.cat([kept, kept[:1].expand(bucket - len(kept))]))
        self.responses.select(kept, bucket=bucket)
        if not self.decoder.is_for(bucket):
            self.decoder = self._decoder(bucket)


def _runs_plain(model: Any, device: torch.device) -> bool:
    """True where ``PlainDecoder`` takes the steps; a model is compared with its own forward once for each dtype of autocast."""
    if model.full_logits or not is_plain_decoder(model.causal_lm) or not has_whole_weights(model.causal_lm):
        return False
    agrees, dtype = _AGREES.setdefault(model, {}), autocast_dtype(device)
    if dtype not in agrees:
        agrees[dtype] = _agrees(model, device)
    return agrees[dtype]


@torch.no_grad()
def _agrees(model: Any, device: torch.device) -> bool:
    """A token after a padded batch of two prompts has the same log-probs either way, under the same autocast."""
    ids = torch.arange(6, device=device).reshape(2, 3) % model.vocabulary
    mask = torch.tensor([[False, True, True], [True] * 3], device=device)
    prompts = PromptBatch(ids, mask, torch.arange(2, device=device), ("0", "1"))
    settings = SamplingSettings(max_new_tokens=2, stop_ids=(), pad_id=0, vocabulary=model.vocabulary)
    with casts_kept(device, False):  # each weight is read once
        own, ours = (_probed(kind, model, prompts, settings) for kind in (OwnWriter, _PlainWriter))
    counted = own != -torch.inf  # not of entries that name no token; NaN stays, to be found
    gap = float((own - ours)[counted].abs().max())
    half = model.causal_lm.get_output_embeddings().weight.dtype.itemsize == 2 or autocast_dtype(device) is not None
    largest = max(1.0, float(own[counted].abs().max()))
    agrees = gap <= (PROBE_TOLERANCE_HALF if half else PROBE_TOLERANCE * largest)
    if not agrees:
        warnings.warn(f"DecodeSampler runs {type(model.causal_lm).__name__}'s own forward, which is slower: a decode step in "
                      f"few operations differs by {gap:.3g} nats on a probe", stacklevel=2)  # fmt: skip
    return agrees


class _Probe(Responses):
    """Keeps the logits of the last draw, and goes on with token 0."""

    def draw(self, logits: Tensor) -> None:
        """Keep the logits [R, V]; the model reads token 0 next, whatever was drawn."""
        super().draw(logits)
        self.logits = logits
        self.token.zero_()


def _probed(
    kind: type[OwnWriter] | type[_PlainWriter], model: Any, prompts: PromptBatch, settings: SamplingSettings
) -> Tensor:
    """Log-probs [B, V] nats after one decode step."""
    probe = _Probe(torch.zeros(prompts.ids.shape[0], 2, dtype=torch.float64, device=prompts.ids.device), settings)
    writer = kind(model, _prefilled(model, prompts, settings), probe)
    writer.first()
    writer.advance()
    return probe.logits.log_softmax(-1)
