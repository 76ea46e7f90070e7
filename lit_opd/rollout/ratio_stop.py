"""Responses that end where the teacher has left them: the teacher reads along while the student writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_opd.errors import InputError
from lit_opd.masked import running_sum
from lit_opd.rollout.base import Sampler, SamplingSettings
from lit_opd.rollout.decoding.key_values import CachedRows, require_full_attention
from lit_opd.types import FinishReason, PromptBatch, Rollout


class RatioStop:
    """Ends a training response after the token at which the teacher-to-student ratio of all it has written collapses.

        n = the first t with   sum_{k<=t} A_k <= log(threshold),   A_k = q_k - s_k in nats

    Token n, to which the teacher objected, is kept. What would stand after it, where the teacher continues a text it would not
    have written, is sampled to the end of the chunk, then the row leaves the batch; that part is never scored by the student,
    never trained on, and counted in ``Rollout.drawn`` (and so in train/tokens) only. Every ``chunk`` tokens
    the teacher reads what was written since, with keys and values of its own; its log-probs then serve as those of the scoring
    pass wherever the run needs nothing else of the teacher. Evaluation is never stopped.

    A row ended so is marked ``FinishReason.DRIFT`` and trained on, whatever ``truncated`` says of rows that reach
    ``max_new_tokens``. "Not generated" is not "weight 0": a stopped row has n tokens and no others. The aggregation
    ``sequence-mean`` gives each of them 1/n of the row, so rows stopped early outweigh the others token by token; ``token-mean``
    divides all by the smaller count, ``constant`` by what it ever does. A strategy that looks at the whole row, such as IW-OPD,
    sees a shorter one. Whether a token is written depends on those before it only, as for a mask with ``depends_on`` "prefix".

    The rule is ours. The ratio is that of arXiv 2606.22600, see ``PrefixRatioTilt``; stopping rollouts early: reported in
    arXiv 2605.27028, see ``LengthBudget``.

    Args:
        threshold: of the ratio, in (0, 1).
        chunk: tokens between two looks, >= 1. It changes the cost, not the responses (up to rounding): with more of them the
            teacher runs less often, and more tokens are sampled that are cut off again.
    Raises:
        InputError: a value outside its range.
    """

    def __init__(self, threshold: float = 0.01, chunk: int = 8) -> None:
        if not 0 < threshold < 1:
            raise InputError(f"`RatioStop.threshold` must be in (0, 1), got {threshold}")
        if chunk < 1:
            raise InputError(f"`RatioStop.chunk` must be >= 1 token, got {chunk}")
        self.threshold, self.chunk = threshold, chunk

    def check(self, sampler: Sampler, *, teacher: str, config: Any, sharded: bool) -> None:
        """What can be checked before a run.

        Args:
            sampler: the run's.
            teacher: class of the run's teacher.
            config: the teacher's text configuration, None where it cannot read along.
            sharded: weights are spread over the ranks.
        Raises:
            InputError: responses cannot be stopped, or not by this ratio.
        """
        if not sampler.stops_early:
            raise _error(f"sampled by {type(sampler).__name__}", "use DecodeSampler")
        if sampler.top_p < 1 or sampler.top_k:
            why = f"with `model.sampler.top_p` {sampler.top_p} and `top_k` {sampler.top_k}"
            raise _error(why, "use 1.0 and 0: otherwise tokens are not sampled from the distribution that is scored")
        if config is None:
            raise _error(f"scored by {teacher}", "use LocalTeacher, which can read along in this process")
        if sharded:
            raise _error("with sharded weights", "train with ddp or on one device")
        require_full_attention(config, refusal=_refusal)

    def watching(self, teacher: Any) -> Callable[[PromptBatch, SamplingSettings], RatioWatch]:
        """What ``SamplingSettings.stop`` takes, for the ``ScoringModel`` of the teacher."""
        return partial(RatioWatch, self, teacher)


def _error(run: str, remedy: str) -> InputError:
    return InputError(f"`model.rollout_stop` must be null for responses {run}, got RatioStop; {remedy}")


def _refusal(config: Any, why: str) -> InputError:
    return _error(
        f"scored by a {type(config).__name__} with {why}", "it serves one key and value a token and layer only"
    )


class RatioWatch:
    """The teacher beside one batch of responses that are being written.

    Args:
        stop: when to end a row.
        teacher: its ``ScoringModel``.
        prompts: B rows.
        settings: those of the sampling.
    """

    def __init__(self, stop: RatioStop, teacher: Any, prompts: PromptBatch, settings: SamplingSettings) -> None:
        self.chunk, self.floor, self.temperature = stop.chunk, math.log(stop.threshold), settings.temperature
        own = prompts.teacher_ids is not None
        ids, mask = (prompts.teacher_ids, prompts.teacher_mask) if own else (prompts.ids, prompts.mask)
        self.teacher = CachedRows(teacher, ids, mask, most=ids.shape[1] + settings.max_new_tokens, refusal=_refusal)  # type: ignore[arg-type, union-attr]
        device, count = prompts.ids.device, len(prompts)
        self.read = 0  # columns
        self.ratio = torch.zeros(count, dtype=torch.float64, device=device)  # log of it, of the rows still written
        self.kept = torch.full((count,), settings.max_new_tokens + 1, device=device)  # tokens up to the collapse
        self.logprobs: Tensor | None = None  # [B, T] nats, the teacher's

    @torch.inference_mode(False)  # transformers keeps tensors of a forward in its modules
    @torch.no_grad()
    def collapsed(self, rows: Tensor, ids: Tensor, logprobs: Tensor, columns: int) -> Tensor:
        """Read on up to ``columns``.

        Args:
            rows: int64 [R], those of the batch that are still written.
            ids: int64 [B, T].
            logprobs: [B, T] nats, the sampler's.
            columns: how many of them are written.
        Returns:
            bool [R], True where the ratio has collapsed.
        """
        new, lm = slice(self.read, columns), self.teacher
        mask, positions = lm.grow(columns - self.read)
        scores, lm.states = lm.model.next_logprobs(
            ids[rows, new], lm.states, mask, positions, lm.cache, temperature=self.temperature
        )
        if self.logprobs is None:
            self.logprobs = scores.new_zeros(ids.shape)
        self.logprobs[rows, new] = scores
        ratio = self.ratio.unsqueeze(-1) + running_sum(scores.double() - logprobs[rows, new].double())
        below = ratio <= self.floor
        first = torch.where(below.any(-1), self.read + 1 + below.int().argmax(-1), self.kept[rows])
        self.kept[rows] = torch.minimum(self.kept[rows], first)
        self.ratio, self.read = ratio[:, -1], columns
        return self.kept[rows] <= columns

    def select(self, rows: Tensor) -> None:
        """Go on with ``rows`` of those still written, int64 [R]."""
        self.teacher.take(rows)
        self.ratio = self.ratio[rows]

    def cut(self, rollout: Rollout, *, pad_id: int) -> Rollout:
        """``rollout`` as sampled, without what stands after a collapse, with the teacher's log-probs and the tokens drawn."""
        assert self.logprobs is not None
        columns, lengths = rollout.mask.shape[1], rollout.lengths
        mask = rollout.mask & (torch.arange(columns, device=self.kept.device) < self.kept.unsqueeze(-1))
        collapsed = (self.kept < lengths) | ((self.kept == lengths) & ~rollout.finished)
        looked = (self.kept + self.chunk - 1) // self.chunk * self.chunk  # tokens up to the look that saw the collapse
        return replace(
            rollout,
            response_ids=torch.where(mask, rollout.response_ids, pad_id),
            mask=mask,
            finish_reason=torch.where(collapsed, int(FinishReason.DRIFT), rollout.finish_reason).to(torch.int8),
            teacher_logprobs=self.logprobs[:, :columns],
            drawn=torch.minimum(lengths, looked),
        )
