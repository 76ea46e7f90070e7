"""What a step logs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_opd.distributed import all_sum
from lit_opd.types import FinishReason, StepRecord


def scalars(record: StepRecord) -> dict[str, Tensor]:
    """Step statistics over all ranks, one collective; names are documented in docs/metrics.md.

    Of a step that was skipped all but what its sampling says is NaN: Lightning would log the step before's again.

    Returns:
        scalars by metric name.
    """
    signal, kept, weights = record.signal, record.kept, record.weights
    ratio, mask = signal.log_ratio, signal.mask
    truncated = record.finish_reason == int(FinishReason.LENGTH)
    budget, drift = (record.finish_reason == int(reason) for reason in (FinishReason.BUDGET, FinishReason.DRIFT))
    held = record.sampled_tokens if record.response_tokens is None else record.response_tokens
    assert signal.sampler_logprobs is not None
    sampler_gap = (signal.student_logprobs - signal.sampler_logprobs).abs()
    sums = torch.stack(
        [value.double().sum() for value in (
            mask, kept, -ratio, ratio.abs(), weights, weights.square(), record.clipped, record.sampled_tokens, truncated,
            torch.ones_like(record.finish_reason), -signal.student_logprobs, sampler_gap, budget, drift, held,
        )]
    )  # fmt: skip
    (
        tokens, counted, kl, gap, weight, square, clipped, sampled, cut, rows, surprise, sampler_gap, budget, drift, held,
    ) = all_sum(sums).unbind()  # fmt: skip
    tokens, counted, rows = (count.clamp(min=1) for count in (tokens, counted, rows))
    found = {
        "train/reverse_kl_k1": kl / tokens,
        "train/disagreement": gap / tokens,
        "train/weight_mean": weight / counted,
        "train/weight_ess": weight.square() / (counted * square).clamp(min=torch.finfo(torch.float64).tiny),
        "train/clip_fraction": clipped / tokens,
        "train/student_nll": surprise / tokens,
        "train/sampler_gap": sampler_gap / tokens,
        "train/grad_norm": record.grad_norm.double(),
    }
    if record.skipped:
        found = {name: torch.full_like(value, math.nan) for name, value in found.items()}
    return found | {
        "train/tokens": sampled,
        "train/truncated_fraction": cut / rows,
        "train/budget_fraction": budget / rows,
        "train/stopped_fraction": drift / rows,
        "train/response_length": held / rows,
    }
