"""What a step logs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_opd.distributed import all_sum
from lit_opd.types import FinishReason, StepRecord


def scalars(record: StepRecord) -> dict[str, Tensor]:
    """Step statistics over all ranks, one collective; names are documented in docs/metrics.md.

    A skipped step has NaN for all that is not counted while sampling: Lightning would log the values of the step before again.

    Returns:
        scalars by metric name.
    """
    parts = _parts(record)
    sums = all_sum(torch.stack([value.double().sum() for value in parts.values()])).unbind()
    sum_of = dict(zip(parts, sums, strict=True))
    tokens, counted, trained, rows = (sum_of[name].clamp(min=1) for name in ("tokens", "counted", "trained", "rows"))
    found = {
        "train/reverse_kl_k1": sum_of["kl"] / tokens,
        "train/disagreement": sum_of["gap"] / tokens,
        "train/weight_mean": sum_of["weight"] / counted,
        "train/weight_ess": sum_of["weight"].square()
        / (counted * sum_of["square"]).clamp(min=torch.finfo(torch.float64).tiny),
        "train/clip_fraction": sum_of["clipped"] / trained,
        "train/student_nll": sum_of["surprise"] / tokens,
        "train/sampler_gap": sum_of["sampler_gap"] / tokens,
        "train/grad_norm": record.grad_norm.double(),
    }
    found |= _of_replay(record) | _of_older(record)
    if record.skipped:
        found = {name: torch.full_like(value, math.nan) for name, value in found.items()}
    if record.chunks is not None:
        found["train/aligned_fraction"] = sum_of["aligned"] / sum_of["valid"].clamp(min=1)
    return (
        found
        | _of_waiting(record)
        | {
            "train/tokens": sum_of["sampled"],
            "train/truncated_fraction": sum_of["length"] / rows,
            "train/budget_fraction": sum_of["budget"] / rows,
            "train/stopped_fraction": sum_of["drift"] / rows,
            "train/response_length": sum_of["held"] / rows,
        }
    )


def _parts(record: StepRecord) -> dict[str, Tensor]:
    """What is summed over the tokens or rows of all ranks, by name."""
    signal, mask, ratio = record.signal, record.signal.mask, record.signal.log_ratio
    assert signal.sampler_logprobs is not None
    trained = mask & (record.weights > 0)
    reasons = {name: record.finish_reason == int(FinishReason[name.upper()]) for name in ("length", "budget", "drift")}
    return {
        "tokens": mask,
        "counted": record.kept,
        "kl": -ratio,
        "gap": ratio.abs(),
        "weight": record.weights,
        "square": record.weights.square(),
        "trained": trained,
        "clipped": record.clipped & trained,
        "sampled": record.sampled_tokens,
        "rows": torch.ones_like(record.finish_reason),
        "surprise": -signal.student_logprobs,
        "sampler_gap": (signal.student_logprobs - signal.sampler_logprobs).abs(),
        "held": record.sampled_tokens if record.response_tokens is None else record.response_tokens,
        "valid": record.rollout.mask,
        "aligned": mask if record.chunks is None else record.chunks.lengths,
        **reasons,
    }


def _of_replay(record: StepRecord) -> dict[str, Tensor]:
    """Where responses were saved ones: their share, how far the student is from who sampled them, and without them what is an
    average over the student's own samples; one collective."""
    replayed, signal = record.rollout.replayed, record.signal
    if replayed is None:
        return {}
    assert signal.sampler_logprobs is not None
    gap = (signal.student_logprobs - signal.sampler_logprobs).abs()
    old = signal.mask & replayed.old.unsqueeze(-1)
    known = old & replayed.known.unsqueeze(-1)
    now = signal.mask & ~old
    own = {"reverse_kl_k1": -signal.log_ratio, "student_nll": -signal.student_logprobs, "sampler_gap": gap}
    parts = (
        replayed.old,
        torch.ones_like(replayed.old),
        gap * known,
        known,
        now,
        *(value * now for value in own.values()),
    )
    found = all_sum(torch.stack([part.double().sum() for part in parts])).unbind()
    rows, all_rows, drift, drifted, counted, *sums = found
    return {
        "train/replayed_fraction": rows / all_rows,
        "train/replay_gap": drift / drifted,  # NaN where there is nothing to average
        **{f"train/{name}": value / counted for name, value in zip(own, sums, strict=True)},
    }


def _of_older(record: StepRecord) -> dict[str, Tensor]:
    """Where responses took several steps: how far the student is from the weights that sampled their older tokens, and the
    sampler's gap without them; one collective."""
    signal, version = record.signal, record.rollout.version
    if version is None:
        return {}
    assert signal.sampler_logprobs is not None
    gap = (signal.student_logprobs - signal.sampler_logprobs).abs()
    old = signal.mask & record.rollout.older
    now = signal.mask & ~old
    parts = torch.stack([part.double().sum() for part in (gap * old, old, gap * now, now)])
    drift, drifted, sampled, counted = all_sum(parts).unbind()
    # NaN where there is nothing to compare
    return {"train/older_gap": drift / drifted, "train/sampler_gap": sampled / counted}


def _of_waiting(record: StepRecord) -> dict[str, Tensor]:
    """Where responses took several steps: what is trained on, how old it is, and what waits; one collective."""
    rollout, waiting = record.rollout, record.waiting
    if rollout.version is None or waiting is None:
        return {}
    behind = torch.where(rollout.mask, record.signal.step - rollout.version, 0)
    parts = (
        rollout.mask,
        rollout.older,
        behind,
        rollout.mask.any(-1),
        waiting.responses,
        waiting.tokens,
        waiting.steps,
    )
    tokens, older, behind, rows, waits, held, steps = all_sum(torch.stack([p.double().sum() for p in parts])).unbind()
    return {
        "train/weights_behind": behind / tokens.clamp(min=1),
        "train/older_fraction": older / tokens.clamp(min=1),
        "train/trained_rows": rows,
        "train/trained_tokens": tokens,
        "train/waiting_rows": waits,
        "train/waiting_tokens": held,
        "train/waiting_steps": steps / waits,  # NaN where nothing waits
    }


def _of_reward(record: StepRecord) -> dict[str, Tensor]:
    """The mean reward of the sampled rows that have one, over all ranks; nothing without rewards."""
    reward = record.reward
    if reward is None:
        return {}
    known = ~reward.isnan()
    total, count = all_sum(torch.stack([reward.nan_to_num().double().sum(), known.double().sum()])).unbind()
    return {"train/reward": total / count}


def turn_scalars(record: StepRecord) -> dict[str, Tensor]:
    """What an environment adds, over all ranks, one collective; where responses are one turn the mean reward alone, if any.

    Turns and tokens are of the rows that ``truncated`` left in the batch, the reward and the fractions of all that were sampled.

    Returns:
        scalars by metric name; the reward is NaN where no row has one.
    """
    rollout, reasons = record.rollout, record.finish_reason
    if rollout.turn is None or rollout.observed is None:
        return _of_reward(record)
    reward = torch.full_like(reasons, math.nan, dtype=torch.float32) if record.reward is None else record.reward
    known = ~reward.isnan()
    failed, cut = (reasons == int(reason) for reason in (FinishReason.ENVIRONMENT, FinishReason.TURNS))
    ones = torch.ones_like(reasons)
    values = (
        rollout.num_turns,
        rollout.mask,
        rollout.observed,
        reward.nan_to_num(),
        known,
        failed,
        cut,
        ones,
        rollout.mask.any(-1),
    )
    sums = all_sum(torch.stack([value.double().sum() for value in values]))
    turns, sampled, observed, reward, known, failed, cut, rows, trained = sums.unbind()
    return {
        "train/turns": turns / trained.clamp(min=1),
        "train/turn_length": sampled / turns.clamp(min=1),
        "train/observed_tokens": observed,
        "train/environment_failed_fraction": failed / rows.clamp(min=1),
        "train/turns_cut_fraction": cut / rows.clamp(min=1),
        "train/reward": reward / known,
    }


def logged(
    record: StepRecord,
    *,
    loss: Tensor,
    skipped_steps: int,
    learning_rate: float,
    max_new_tokens: int,
    length_budget: int | None,
    stops_early: bool,
    engine_seconds: Mapping[str, float],
    weights_behind: int | None = None,
    hints: Tensor | None = None,
) -> dict[str, Tensor]:
    """Everything that a training step logs, float64 scalars on the host by metric name: counts stay exact, and one transfer
    serves every logger and callback.

    Args:
        record: of the batch.
        loss: mean reported loss of its steps, scalar nats.
        skipped_steps: optimizer steps that were not made since the run began.
        learning_rate: of the first parameter group.
        max_new_tokens: the sampler's.
        length_budget: tokens a response might have at this step, None without a budget.
        stops_early: a length budget or a ``RatioStop`` may end responses before ``max_new_tokens``.
        engine_seconds: seconds that a sampler with an engine of its own spent since the step before, by name.
        weights_behind: optimizer steps that the weights which sampled had not seen, None for a sampler that reads the student,
            and where the record says it token by token.
        hints: int64 [3] of this rank, see ``Hindsight``; None where the teacher's prompts are not made of responses.
    """
    values: dict[str, Any] = {
        "train/loss": torch.full_like(loss, math.nan) if record.skipped else loss,
        "train/skipped_steps": skipped_steps,
        **scalars(record),
        **turn_scalars(record),
    }
    if hints is not None:
        rows, hinted, refused = all_sum(hints.double()).unbind()
        values |= {"train/hint_fraction": hinted / rows, "train/hint_refused_fraction": refused / rows}
    if weights_behind is not None:
        values["train/weights_behind"] = weights_behind
    if length_budget is not None:
        values["train/length_budget"] = length_budget
    if stops_early:
        values["train/tokens_saved_at_most"] = _saved(record, max_new_tokens)
    values |= {f"time/{name}": seconds for name, seconds in {**record.seconds, **engine_seconds}.items()}
    values["train/learning_rate"] = learning_rate
    values["step"] = record.step  # Lightning would count batches, from 0
    numbers = [torch.as_tensor(value, dtype=torch.float64, device=loss.device) for value in values.values()]
    return dict(zip(values, torch.stack(numbers).cpu(), strict=True))


def _saved(record: StepRecord, max_new_tokens: int) -> Tensor:
    """Tokens that the rows cut by the budget or the stop could still have had, over all ranks, scalar; saved responses have none
    to save."""
    rollout = record.rollout  # which has all of these rows, whatever `truncated` is
    cut = (rollout.finish_reason == int(FinishReason.BUDGET)) | (rollout.finish_reason == int(FinishReason.DRIFT))
    if rollout.replayed is not None:
        cut = cut & ~rollout.replayed.old
    return all_sum(torch.where(cut, max_new_tokens - rollout.num_drawn, 0).sum())
