"""Log-probabilities of given tokens without a [B, T, V] tensor.

Only the hidden states of valid response tokens meet the head, a tile of tokens at a time; the backward pass computes
each tile again, so the peak is one [tile, V] block. Logits at slot t - 1 score token t.

``ScoringModel`` wraps a causal language model so that scoring is one ``forward``: under FSDP the wrapper's own hooks
then gather the head's weight, and generation goes through the wrapper for the same reason.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_opd.types import InputError, Rollout, TokenScores, TopK, at_least_float32

TILE_ELEMENTS = 2**23  # logits in one block: 32 MiB in float32; a divergence holds about eight blocks
PROBE_TOKENS = 4
PROBE_TOLERANCE = 1e-3  # nats; bf16 models get the looser bound below
PROBE_TOLERANCE_HALF = 0.1

FEW_ROWS = 8  # up to so many, and for a float32 head of so many elements,
LARGE_HEAD = 2**22  # head @ states.T takes half the time of states @ head.T on the CPU; more than that otherwise
TOP_K = 32  # entries of the top-k lists that strategies may require

Returned = TypeVar("Returned")


@dataclass(frozen=True, eq=False)
class Head:
    """A linear output head and the hidden states it reads.

    Args:
        hidden: [N, H] hidden states of the valid tokens, in row-major order of the mask.
        weight: [V, H] in the dtype of ``hidden``; None where ``hidden`` holds the logits themselves, [N, V].
        bias: [V] or None.
    """

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None = None

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.hidden.shape[-1] if self.weight is None else len(self.weight)

    def logits(self, rows: slice, temperature: float) -> Tensor:
        """Temperature-scaled logits of the tokens ``rows``: [n, V], at least float32."""
        states = self.hidden[rows]
        logits = at_least_float32(states if self.weight is None else F.linear(states, self.weight))
        if self.bias is not None:
            logits = logits + self.bias.to(logits.dtype)
        return logits / temperature if temperature != 1.0 else logits


def _tiles(count: int, vocabulary: int) -> list[slice]:
    size = max(1, TILE_ELEMENTS // max(1, vocabulary))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class TokenTerm(ABC):
    """One number a token made from its logits; ``per_token`` evaluates it a tile at a time.

    Subclass it and write ``value``; ``gradient`` falls back on autograd through it.
    """

    @abstractmethod
    def value(self, logits: Tensor, rows: slice) -> Tensor:
        """[n] from temperature-scaled ``logits`` [n, V] of the tokens ``rows``."""

    def gradient(self, logits: Tensor, rows: slice, upstream: Tensor) -> Tensor:
        """d(sum of upstream * value)/d logits, [n, V]; ``upstream`` is [n]."""
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            value = self.value(leaf, rows)
        return torch.autograd.grad(value, leaf, upstream)[0]


class _TokenLogprob(TokenTerm):
    """log softmax(logits)[target], with a gradient that needs one block."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def value(self, logits: Tensor, rows: slice) -> Tensor:
        picked = logits.gather(-1, self.targets[rows].unsqueeze(-1)).squeeze(-1)
        return picked - logits.logsumexp(-1)

    def gradient(self, logits: Tensor, rows: slice, upstream: Tensor) -> Tensor:
        upstream = upstream.unsqueeze(-1)
        return logits.softmax(-1).mul_(-upstream).scatter_add_(-1, self.targets[rows].unsqueeze(-1), upstream)


class _PerToken(torch.autograd.Function):
    """A ``TokenTerm`` of every token, recomputed tile by tile in the backward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, term: TokenTerm, temperature: float
    ) -> Tensor:
        head = Head(hidden, weight, bias)
        out = hidden.new_empty(len(hidden), dtype=at_least_float32(hidden[:0]).dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _tiles(len(hidden), head.vocabulary):
                out[rows] = term.value(head.logits(rows, temperature), rows)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.term, ctx.temperature = term, temperature
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        head = Head(*ctx.saved_tensors)
        sums = _HeadGradient(head, ctx.needs_input_grad[:3])
        with torch.autocast(head.hidden.device.type, enabled=False):
            for rows in _tiles(len(head.hidden), head.vocabulary):
                scaled = upstream[rows] / ctx.temperature
                sums.add(ctx.term.gradient(head.logits(rows, ctx.temperature), rows, scaled), rows)
        return (*sums.result(), None, None)


class _HeadGradient:
    """Gradients of hidden states, weight and bias, summed over tiles in at least float32."""

    def __init__(self, head: Head, wanted: Sequence[bool]) -> None:
        self.head = head
        self.hidden = torch.empty_like(head.hidden) if wanted[0] else None
        self.weight, self.bias = (
            torch.zeros_like(value, dtype=at_least_float32(value[:0]).dtype) if want and value is not None else None
            for value, want in zip((head.weight, head.bias), wanted[1:], strict=True)
        )

    def add(self, d_logits: Tensor, rows: slice) -> None:
        """Add the tile ``rows``, whose logits have the gradient ``d_logits`` [n, V] before the temperature."""
        if self.bias is not None:
            self.bias += d_logits.sum(0)
        d_logits = d_logits.to(self.head.hidden.dtype)
        if self.hidden is not None:
            self.hidden[rows] = d_logits if self.head.weight is None else d_logits @ self.head.weight
        if self.weight is not None:
            self.weight += d_logits.T @ self.head.hidden[rows]

    def result(self) -> tuple[Tensor | None, ...]:
        """In the dtypes of the inputs."""
        pairs = ((self.hidden, self.head.hidden), (self.weight, self.head.weight), (self.bias, self.head.bias))
        return tuple(None if sums is None or like is None else sums.to(like.dtype) for sums, like in pairs)


def per_token(head: Head, term: TokenTerm, *, temperature: float = 1.0) -> Tensor:
    """``term`` at each token, differentiable in hidden states, weight and bias; holds one tile of logits at a time.

    Args:
        head: N hidden states and the head.
        term: what to compute of the logits.
        temperature: > 0, divides the logits.
    Returns:
        [N], at least float32.
    """
    return _PerToken.apply(head.hidden, head.weight, head.bias, term, temperature)  # type: ignore[no-any-return]


def token_logprobs(head: Head, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log pi(target) for each token, differentiable in hidden states, weight and bias.

    Args:
        head: N hidden states and the head.
        targets: int64 [N].
        temperature: > 0, divides the logits.
    Returns:
        [N] nats, at least float32.
    """
    return per_token(head, _TokenLogprob(targets), temperature=temperature)


@torch.no_grad()
def token_entropy(head: Head, *, temperature: float = 1.0) -> Tensor:
    """Full-vocabulary entropy at each token: [N] nats, no gradient."""
    parts = []
    for rows in _tiles(len(head.hidden), head.vocabulary):
        logprobs = head.logits(rows, temperature).log_softmax(-1)
        parts.append(-(logprobs.exp() * logprobs).sum(-1))
    return torch.cat(parts) if parts else at_least_float32(head.hidden.new_zeros(0))


@torch.no_grad()
def token_kl(student: Head, teacher: Head, *, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) over the full vocabulary at each token: [N] nats, no gradient."""
    parts = []
    for rows in _tiles(len(student.hidden), 2 * student.vocabulary):
        student_logprobs = student.logits(rows, temperature).log_softmax(-1)
        teacher_logprobs = teacher.logits(rows, temperature).log_softmax(-1)
        parts.append((student_logprobs.exp() * (student_logprobs - teacher_logprobs)).sum(-1))
    return torch.cat(parts) if parts else at_least_float32(student.hidden.new_zeros(0))


@torch.no_grad()
def token_topk(head: Head, *, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The k likeliest entries at each token, likeliest first, no gradient.

    Returns:
        ids int64 [N, K] and log-probs [N, K] nats, K the smaller of k and V.
    """
    k = min(k, head.vocabulary)
    ids = torch.zeros(len(head.hidden), k, dtype=torch.int64, device=head.hidden.device)
    logprobs = head.hidden.new_zeros(len(head.hidden), k, dtype=at_least_float32(head.hidden[:0]).dtype)
    for rows in _tiles(len(head.hidden), head.vocabulary):
        logits = head.logits(rows, temperature)
        best = logits.topk(k)
        ids[rows], logprobs[rows] = best.indices, best.values - logits.logsumexp(-1, keepdim=True)
    return ids, logprobs


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    """[N, ...] values of the valid tokens -> [B, T, ...], 0 where masked, differentiable."""
    spread = mask.reshape(*mask.shape, *(1,) * (values.ndim - 1)).expand(*mask.shape, *values.shape[1:])
    return values.new_zeros(spread.shape).masked_scatter(spread, values)


class TokenDivergence(Protocol):
    """A divergence of two heads over the same N tokens."""

    def __call__(self, student: Head, teacher: Head, *, temperature: float) -> Tensor:
        """[N] nats, differentiable in the student."""


class ScoringModel(nn.Module):
    """A causal language model seen as a scorer of given tokens.

    Args:
        model: a transformers causal language model (or a PEFT wrapper of one).
        vocabulary: number of leading vocabulary entries that count; later rows of the head (padding of the
            embedding) are cut, in sampling as in scoring.
    """

    def __init__(self, model: nn.Module, *, vocabulary: int) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        self.plain = False  # True: the head is not a plain linear map, use the model's own logits

    @property
    def causal_lm(self) -> Any:
        """The transformers model itself, without a PEFT wrapper around it."""
        get_base_model = getattr(self.model, "get_base_model", None)
        return get_base_model() if get_base_model is not None else self.model

    def forward(
        self,
        rollout: Rollout,
        *,
        temperature: float = 1.0,
        wants: frozenset[str] = frozenset(),
        against: Head | None = None,
        divergence: TokenDivergence | None = None,
        own_template: bool = False,
    ) -> TokenScores:
        """Score the sampled tokens of ``rollout``.

        Args:
            rollout: B rows; only valid tokens are scored.
            temperature: > 0, divides the logits.
            wants: any of "entropy", "topk", "token_kl" (KL(this || against)); without gradient.
            against: the teacher's head, for "token_kl" and ``divergence``.
            divergence: from this head and the teacher's to [N], with gradient; None for none.
            own_template: read ``prompts.teacher_ids`` where the batch has them.
        Returns:
            [B, T] in nats, 0 where masked; the log-probs and the divergence carry gradient.
        """
        head, targets = self._head(rollout, own_template=own_template)
        if against is None and ("token_kl" in wants or divergence is not None):
            raise InputError("`ScoringModel.forward` needs `against` for a divergence; the teacher gave no full head")
        found: dict[str, Tensor] = {"logprobs": token_logprobs(head, targets, temperature=temperature)}
        if "entropy" in wants:
            found["entropy"] = token_entropy(head, temperature=temperature)
        if against is not None and "token_kl" in wants:
            found["token_kl"] = token_kl(head, against, temperature=temperature)
        if against is not None and divergence is not None:
            found["divergence"] = divergence(head, against, temperature=temperature)
        topk = self._topk(head, rollout.mask, temperature) if "topk" in wants else None
        return TokenScores(**{name: _scatter(value, rollout.mask) for name, value in found.items()}, topk=topk)

    def _topk(self, head: Head, mask: Tensor, temperature: float) -> TopK:
        ids, logprobs = token_topk(head, k=TOP_K, temperature=temperature)
        return TopK(ids=_scatter(ids, mask), logprobs=_scatter(logprobs, mask))

    def head(self, rollout: Rollout, *, own_template: bool = False) -> Head:
        """Hidden states [N, H] of the valid tokens with the output head; an FSDP forward method of its own."""
        return self._head(rollout, own_template=own_template)[0]

    def _head(self, rollout: Rollout, *, own_template: bool) -> tuple[Head, Tensor]:
        prompts = rollout.prompts
        use_own = own_template and prompts.teacher_ids is not None
        prompt_ids, prompt_mask = (
            (prompts.teacher_ids, prompts.teacher_mask) if use_own else (prompts.ids, prompts.mask)
        )
        attention = torch.cat([prompt_mask, rollout.mask], -1)  # type: ignore[list-item]
        inputs = {
            "input_ids": torch.cat([prompt_ids, rollout.response_ids], -1),  # type: ignore[list-item]
            "attention_mask": attention.long(),
            "position_ids": (attention.long().cumsum(-1) - 1).clamp(min=0),
        }
        start, stop = prompt_ids.shape[1] - 1, attention.shape[1] - 1  # type: ignore[union-attr]
        targets = rollout.response_ids[rollout.mask]
        if self.plain:
            return self._plain_head(inputs, slice(start, stop), rollout.mask), targets
        states = self.causal_lm.get_decoder()(**inputs, use_cache=False).last_hidden_state[:, start:stop]
        return self._linear_head(states[rollout.mask]), targets

    def _linear_head(self, hidden: Tensor) -> Head:
        linear = self.causal_lm.get_output_embeddings()
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))  # as the model's own head would compute
        weight = linear.weight[: self.vocabulary].to(hidden.dtype)
        return Head(hidden, weight, None if linear.bias is None else linear.bias[: self.vocabulary])

    def _plain_head(self, inputs: dict[str, Tensor], slots: slice, mask: Tensor) -> Head:
        logits = self.causal_lm(**inputs, use_cache=False).logits[:, slots][mask]
        return Head(logits[:, : self.vocabulary], weight=None)

    @torch.no_grad()
    def choose_path(self, name: str) -> None:
        """Compare the tiled path with the model's own logits on a probe, and use the plain path where they differ.

        Args:
            name: who this is ("student", "teacher"), for the warning.
        """
        linear = self.causal_lm.get_output_embeddings()
        if type(linear) is not nn.Linear:
            self._use_plain(name, f"its output head is {type(linear).__name__}, not nn.Linear")
            return
        training = self.training
        self.eval()
        ids = torch.arange(PROBE_TOKENS, device=linear.weight.device).unsqueeze(0) % self.vocabulary
        own = at_least_float32(self.causal_lm(input_ids=ids, use_cache=False).logits[0, :, : self.vocabulary])
        hidden = self.causal_lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        ours = self._linear_head(hidden).logits(slice(None), 1.0)
        gap = float((ours.log_softmax(-1) - own.log_softmax(-1)).abs().max())
        half = linear.weight.dtype in (torch.bfloat16, torch.float16)
        if not gap <= (PROBE_TOLERANCE_HALF if half else PROBE_TOLERANCE):
            self._use_plain(name, f"log-probs through the plain linear head differ by {gap:.3g} nats on a probe")
        self.train(training)

    def _use_plain(self, name: str, why: str) -> None:
        self.plain = True
        warnings.warn(
            f"{name}: scoring uses the model's own full logits, which takes more memory, because {why}", stacklevel=2
        )

    def next_states(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
        """Run the model on further columns of every row.

        Args:
            ids: int64 [B, n], the tokens after those in ``cache``.
            mask: [B, cached + n], 0 on padding; None where there is none. Bool for n = 1.
            positions: int64 [B, n].
            cache: transformers' key-value cache; grows by n.
        Returns:
            what ``next_logits`` reads: [B, H], or [B, V] where the plain path is used.
        """
        lm = self.causal_lm
        one_query = ids.shape[1] == 1 and lm.config._attn_implementation == "sdpa"
        if mask is not None and one_query and getattr(lm, "_supports_attention_backend", False):
            mask = mask[:, None, None, :]  # saves transformers the work of making one
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        if self.plain:
            return self.causal_lm(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
        return self.causal_lm.get_decoder()(**inputs, use_cache=True).last_hidden_state[:, -1]

    def next_logits(self, states: Tensor) -> Tensor:
        """Logits [B, V] of the coming token from what ``next_states`` gave, at least float32."""
        if self.plain:
            return at_least_float32(states[:, : self.vocabulary])
        linear = self.causal_lm.get_output_embeddings()
        if len(states) <= FEW_ROWS and _is_slow_head(linear.weight):
            logits = (linear.weight[: self.vocabulary] @ states.T).T.contiguous()
            return logits if linear.bias is None else logits + linear.bias[: self.vocabulary]
        return at_least_float32(linear(states)[:, : self.vocabulary])

    def run(self, function: Callable[..., Returned], *arguments: Any) -> Returned:
        """``function(self, *arguments)``, through this module so that FSDP's hooks gather what the function reads."""
        return function(self, *arguments)

    def generate(self, **arguments: Any) -> Any:
        """transformers' ``generate`` of the wrapped model, through this module so that FSDP's hooks see it."""
        return self.model.generate(**arguments)  # type: ignore[operator]


def _is_slow_head(weight: Tensor) -> bool:
    plain_float32 = weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return weight.device.type == "cpu" and plain_float32 and weight.numel() >= LARGE_HEAD
