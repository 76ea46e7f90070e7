"""Log-probabilities of given tokens without a [B, T, V] tensor.

Only the hidden states of valid response tokens meet the head, a tile of tokens at a time; the backward pass computes
each tile again, so the peak is one [tile, V] block. Logits at slot t - 1 score token t.

``ScoringModel`` wraps a causal language model so that scoring is one ``forward``: under FSDP the wrapper's own hooks
then gather the head's weight, and generation goes through the wrapper for the same reason.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_opd.types import InputError, Rollout, TokenScores, at_least_float32

TILE_ELEMENTS = 2**23  # logits held at once: 32 MiB in float32
PROBE_TOKENS = 4
PROBE_TOLERANCE = 1e-3  # nats; bf16 models get the looser bound below
PROBE_TOLERANCE_HALF = 0.1

OPTIONAL_SCORES = frozenset({"entropy", "token_kl"})


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


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden W^T + b)[target], recomputed tile by tile in the backward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> Tensor:
        head = Head(hidden, weight, bias)
        out = hidden.new_empty(len(hidden), dtype=at_least_float32(hidden[:0]).dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _tiles(len(hidden), len(weight)):
                logits = head.logits(rows, temperature)
                picked = logits.gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1)
                out[rows] = picked - logits.logsumexp(-1)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature = temperature
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets = ctx.saved_tensors
        head = Head(hidden, weight, bias)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        accumulator = at_least_float32(weight[:0]).dtype
        d_weight = torch.zeros_like(weight, dtype=accumulator) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=accumulator) if wants_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _tiles(len(hidden), len(weight)):
                logits = head.logits(rows, ctx.temperature)
                coefficient = gradient[rows].unsqueeze(-1) / ctx.temperature
                d_logits = logits.softmax(-1).mul_(-coefficient)
                d_logits.scatter_add_(-1, targets[rows].unsqueeze(-1), coefficient)
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
                d_logits = d_logits.to(hidden.dtype)
                if d_hidden is not None:
                    d_hidden[rows] = d_logits @ weight
                if d_weight is not None:
                    d_weight += d_logits.T @ hidden[rows]
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


def token_logprobs(head: Head, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log pi(target) for each token, differentiable in hidden states, weight and bias.

    Args:
        head: N hidden states and the head.
        targets: int64 [N].
        temperature: > 0, divides the logits.
    Returns:
        [N] nats, at least float32.
    """
    if head.weight is None:
        return head.logits(slice(None), temperature).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return _TokenLogprobs.apply(head.hidden, head.weight, head.bias, targets, temperature)  # type: ignore[no-any-return]


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


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    """[N] values of the valid tokens -> [B, T], 0 where masked, differentiable."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


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
        own_template: bool = False,
    ) -> tuple[TokenScores, Tensor | None]:
        """Score the sampled tokens of ``rollout``.

        Args:
            rollout: B rows; only valid tokens are scored.
            temperature: > 0, divides the logits.
            wants: any of "entropy", "token_kl".
            against: the teacher's head for "token_kl".
            own_template: read ``prompts.teacher_ids`` where the batch has them.
        Returns:
            scores [B, T], and KL(this || against) [B, T] in nats where asked for, else None.
        """
        head, targets = self._head(rollout, own_template=own_template)
        logprobs = _scatter(token_logprobs(head, targets, temperature=temperature), rollout.mask)
        entropy = divergence = None
        if "entropy" in wants:
            entropy = _scatter(token_entropy(head, temperature=temperature), rollout.mask)
        if "token_kl" in wants:
            if against is None:
                raise InputError("`ScoringModel.forward` needs `against` for token_kl; the teacher gave no full head")
            divergence = _scatter(token_kl(head, against, temperature=temperature), rollout.mask)
        return TokenScores(logprobs=logprobs, entropy=entropy), divergence

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

    def generate(self, **arguments: Any) -> Any:
        """transformers' ``generate`` of the wrapped model, through this module so that FSDP's hooks see it."""
        return self.model.generate(**arguments)  # type: ignore[operator]
