"""Drawing tokens from logits: one pass gives the token and its log-prob.

A token is the point at which the cumulative probability passes a uniform number. Sums run over blocks of the vocabulary
first, then inside the one block that is hit, so nothing of size [B, V] is held in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_opd.masked import at_least_float32, exp_, running_sum
from lit_opd.rollout.base import SamplingSettings

BLOCK = 128  # vocabulary entries summed together; it divides the usual vocabulary sizes
SMALL = 4096  # vocabularies up to this size need no blocks
CHUNK_ELEMENTS = 2**20  # logits worked on at once, which stay in the processor's cache


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
        mass_before = running_sum(ordered.exp()) - ordered.exp()
        excluded = torch.zeros_like(mass_before, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
        logprobs = logprobs.masked_fill(excluded, -torch.inf).log_softmax(-1)
    return logprobs


def choose(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """One token a row as ``settings`` ask for it, and its log-prob under the distribution it was drawn from.

    Args:
        logits: [B, V], at least float32, before the temperature.
        uniforms: float64 [B] in [0, 1); not read by a greedy choice.
        settings: temperature, top_p, top_k and greedy.
    Returns:
        int64 [B]; [B] nats, of a greedy choice those at temperature 1.
    """
    if settings.greedy:
        token = logits.argmax(-1)
        return token, logits.gather(-1, token.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    if settings.top_p < 1.0 or settings.top_k:
        temperature, top_p, top_k = settings.temperature, settings.top_p, settings.top_k
        logits = sampled_distribution(logits, temperature=temperature, top_p=top_p, top_k=top_k)
    elif settings.temperature != 1.0:
        logits = logits / settings.temperature
    return draw(logits, uniforms)


def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row from softmax(logits), and its log-prob.

    Args:
        logits: [B, V], at least float32; -inf on excluded tokens.
        uniforms: float64 [B] in [0, 1).
    Returns:
        int64 [B], never an excluded token; [B] nats, NaN for a row with a NaN.
    """
    step = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    if len(logits) <= step or logits.device.type != "cpu":
        return _draw(logits, uniforms)
    parts = [_draw(x, u) for x, u in zip(logits.split(step), uniforms.split(step), strict=True)]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([logprobs for _, logprobs in parts])


def _draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    highest = logits.amax(-1, keepdim=True)
    mass = exp_(logits - highest)
    rows, vocabulary = mass.shape
    if vocabulary <= SMALL:
        cumulative = running_sum(mass, dtype=torch.float64)
        total = cumulative[:, -1:]
        token = _passes(cumulative, uniforms.unsqueeze(-1) * total)
    else:
        if vocabulary % BLOCK:
            mass = F.pad(mass, (0, -vocabulary % BLOCK))
        mass = mass.view(rows, -1, BLOCK)
        cumulative = running_sum(mass.sum(-1), dtype=torch.float64)
        total = cumulative[:, -1:]
        wanted = uniforms.unsqueeze(-1) * total
        block = _passes(cumulative, wanted)
        before = cumulative.gather(-1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0.0)
        chosen = mass.gather(1, block.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)
        inside = running_sum(chosen, dtype=torch.float64)
        token = (block * BLOCK + _passes(inside, wanted - before)).clamp(max=vocabulary - 1)
    logprob = (logits.gather(-1, token) - highest) - total.log().to(logits.dtype)
    return token.squeeze(-1), logprob.squeeze(-1)


def _passes(cumulative: Tensor, wanted: Tensor) -> Tensor:
    """The first entry above ``wanted`` [B, 1], never one that adds nothing: int64 [B, 1]."""
    below_all = torch.nextafter(cumulative[:, -1:], torch.zeros_like(wanted))
    found = torch.searchsorted(cumulative, torch.minimum(wanted, below_all), right=True)
    return found.clamp(max=cumulative.shape[-1] - 1)  # a NaN would be found after the end
