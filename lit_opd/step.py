"""One rollout batch turned into optimizer steps: denominators, micro-batches, backward, record.

The order of things: the teacher (and a reference model where something reads it) scores the whole batch; where weights
need other rows, where a strategy drops tokens or where the batch is used more than once, the student scores it once too,
without gradient; denominators are summed over micro-batches and ranks; then each micro-batch runs forward and backward.
A rank with fewer micro-batches than another runs dummies of weight zero, because sharded collectives must match.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lit_opd.advantage import apply_transforms
from lit_opd.distributed import all_max, all_sum, world_size
from lit_opd.objective import aggregate, denominator
from lit_opd.server import shared_failure
from lit_opd.sharding import holds_shards, sync_gradients
from lit_opd.types import FinishReason, InputError, Rollout, StepRecord, TokenScores, TokenSignal, TopK

if TYPE_CHECKING:
    from lit_opd.module import OPDModule

_SIGNAL_FIELDS = (
    "student_logprobs", "teacher_logprobs", "reference_logprobs", "student_entropy", "teacher_entropy", "token_kl"
)  # fmt: skip
_STUDENT_WANTS = {"student_entropy": "entropy", "student_topk": "topk", "token_kl": "token_kl"}


def micro_batches(lengths: Tensor, *, token_budget: int | None) -> list[Tensor]:
    """Rows cut into groups whose padded size (rows x longest row) stays within the budget, longest first.

    Args:
        lengths: int64 [B] on the CPU, prompt and response tokens of each row.
        token_budget: None for one group.
    Returns:
        list of int64 row indices; every row once.
    Raises:
        InputError: a row alone is over the budget.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    if token_budget is None or not len(order):
        return [order] if len(order) else []
    if int(lengths.max()) > token_budget:
        raise InputError(
            f"`OPDModule.token_budget` must hold the longest row, got {token_budget} for a row of {int(lengths.max())} tokens; "
            "raise it, or lower `model.sampler.max_new_tokens`"
        )
    groups: list[list[int]] = [[]]
    longest = 0
    for row in order.tolist():
        longest = max(longest, int(lengths[row])) if groups[-1] else int(lengths[row])
        if longest * (len(groups[-1]) + 1) > token_budget:
            groups.append([])
            longest = int(lengths[row])
        groups[-1].append(row)
    return [torch.tensor(group) for group in groups]


def row_lengths(rollout: Rollout) -> Tensor:
    """Prompt and response tokens of each row, int64 [B] on the CPU; the longer of the two prompts where templates differ."""
    prompt = rollout.prompts.mask.sum(-1)
    if rollout.prompts.teacher_mask is not None:
        prompt = torch.maximum(prompt, rollout.prompts.teacher_mask.sum(-1))
    return (prompt + rollout.lengths).cpu()


def apply_truncated(rollout: Rollout, policy: str) -> Rollout:
    """Rows that reached ``max_new_tokens``, not those a length budget cut: "keep" trains on them, "mask" keeps the row without
    any valid token, "drop" removes it before it is scored. Both of the latter leave every denominator. A batch left without
    rows keeps one, fully masked."""
    if policy == "keep":
        return rollout
    finished = rollout.finish_reason != int(FinishReason.LENGTH)
    masked = replace(rollout, mask=rollout.mask & finished.unsqueeze(-1))
    if policy == "mask":
        return masked
    rows = finished.nonzero().squeeze(-1)
    return masked.rows(rows if len(rows) else torch.zeros(1, dtype=torch.int64, device=rows.device))


class _Parts:
    """Results collected from micro-batches by ``TokenSignal`` field (or "weights", "loss", "clipped"), [B, T] or
    [B, T, K], in the batch's row order; a top-k list is two of them."""

    def __init__(self, mask: Tensor) -> None:
        self.shape = tuple(mask.shape)
        self.values: dict[str, Tensor] = {}

    def put(self, name: str, rows: Tensor, part: Tensor) -> None:
        """Store ``part`` [rows, columns, ...] without its gradient."""
        part = part.detach()
        if name not in self.values:
            self.values[name] = part.new_zeros(self.shape + part.shape[2:])
        self.values[name][rows.to(part.device), : part.shape[1]] = part

    def put_scores(self, who: str, rows: Tensor, scores: TokenScores) -> None:
        """Store what ``who`` ("student", "teacher", "reference") says of the rows."""
        found = {f"{who}_logprobs": scores.logprobs, f"{who}_entropy": scores.entropy, "token_kl": scores.token_kl}
        if scores.topk is not None:
            found |= {f"{who}_topk.ids": scores.topk.ids, f"{who}_topk.logprobs": scores.topk.logprobs}
        for name, value in found.items():
            if value is not None:
                self.put(name, rows, value)

    def signal_fields(self, rows: Tensor, columns: int) -> dict[str, Any]:
        """The optional and required fields of a ``TokenSignal`` of some rows and the leading columns."""
        cut = {name: value[rows.to(value.device), :columns] for name, value in self.values.items()}
        fields: dict[str, Any] = {name: cut[name] for name in _SIGNAL_FIELDS if name in cut}
        for name in ("student_topk", "teacher_topk"):
            if f"{name}.ids" in cut:
                fields[name] = TopK(ids=cut[f"{name}.ids"], logprobs=cut[f"{name}.logprobs"])
        return fields


class Update:
    """Runs the optimizer steps of one rollout batch for ``module``.

    Args:
        module: the ``OPDModule``.
        rollout: B rows, already without what ``truncated`` removes.
        sampled: the rollout as sampled, for the record.
    """

    def __init__(self, module: OPDModule, rollout: Rollout, sampled: Rollout) -> None:
        self.module, self.rollout, self.sampled = module, rollout, sampled
        self.progress = module.progress
        self.step = module.global_step
        self.lengths = row_lengths(rollout)
        self.parts = _Parts(rollout.mask)
        self.full: TokenSignal | None = None  # the whole batch's signal, where one scoring pass came first
        self.weights: Tensor | None = None
        self.kept: Tensor | None = None

    # -- scoring -----------------------------------------------------------------------------------------------------

    def score_teacher(self) -> None:
        """Scores of the whole batch by the frozen models, in micro-batches."""
        groups = self._groups(torch.arange(len(self.rollout)))
        total = self._most(len(groups))
        with ExitStack() as stack:
            for model in self.module.scorers.values():
                stack.enter_context(model.on_device(self.rollout.mask.device))
            if not any(holds_shards(model) for model in self.module.scorers.values()):
                stack.enter_context(shared_failure())  # sharded models talk to each other while they score
            for index in range(total):
                self._score_group(groups[index] if index < len(groups) else groups[0])
                self.module.phase("scoring", index + 1, total)
            for who in self.module.scorers:
                _require_finite(f"{who}_logprobs", self.parts.values[f"{who}_logprobs"], self.rollout)

    def _score_group(self, rows: Tensor) -> None:
        part = self.rollout.rows(rows).trimmed()
        for who, model in self.module.scorers.items():
            requires = self.module.required if who == "teacher" else frozenset()
            scores = model.score(part, temperature=self.module.sampler.temperature, requires=requires)
            self.parts.put_scores(who, rows, scores)

    def score_student(self) -> None:
        """The student's scores without gradient, where the weights or the denominators need them first."""
        if not self.module.needs_scoring_pass:
            return
        groups = self._groups(torch.arange(len(self.rollout)))
        with torch.no_grad(), self._teacher_head():
            for index in range(self._most(len(groups))):
                rows = groups[index] if index < len(groups) else groups[0]
                with self.module.teacher.whole_head():
                    self.parts.put_scores("student", rows, self._student_scores(self.rollout.rows(rows).trimmed()))
        self.full = self._signal(self.rollout, validate=True)
        self.weights = self.module.weighting(self.full, self.progress)
        self.kept = self.module.weighting.kept(self.full, self.progress)

    def _student_scores(self, part: Rollout) -> TokenScores:
        """One forward of the student: what the signal still lacks, and the divergence where a gradient is wanted."""
        assert self.module.student is not None
        lacking = self.module.required if self.full is None else frozenset()
        wants = frozenset(want for name, want in _STUDENT_WANTS.items() if name in lacking)
        divergence = self.module.objective.token_divergence if self._trains_on_distribution else None
        scores: TokenScores = self.module.student(
            part,
            temperature=self.module.sampler.temperature,
            wants=wants,
            against=self.module.teacher.full_head(part) if divergence or "token_kl" in wants else None,
            divergence=divergence,
        )
        return scores

    def _teacher_head(self) -> AbstractContextManager[None]:
        """The teacher's weights on the device, where its head is read beside the student's."""
        reads = self.module.required & {"token_kl", "teacher_distribution"}
        return self.module.teacher.on_device(self.rollout.mask.device) if reads else nullcontext()

    @property
    def _trains_on_distribution(self) -> bool:
        return torch.is_grad_enabled() and "teacher_distribution" in self.module.objective.requires

    def _signal(self, rollout: Rollout, *, rows: Tensor | None = None, validate: bool) -> TokenSignal:
        """The signal of ``rollout``, which is the batch's ``rows`` (default all of them)."""
        rows = torch.arange(len(rollout)) if rows is None else rows
        signal = TokenSignal(
            **self.parts.signal_fields(rows, rollout.mask.shape[1]),
            mask=rollout.mask,
            sampler_logprobs=rollout.sampler_logprobs,
            row_keys=rollout.prompts.row_keys,
            step=self.step,
            validate=validate,
        )
        return apply_transforms(self.module.advantage, signal)

    # -- updating ----------------------------------------------------------------------------------------------------

    def run(self) -> Tensor:
        """All optimizer steps of the batch; returns the mean reported loss, scalar."""
        module = self.module
        losses = []
        rows = torch.arange(len(self.rollout))
        updates = module.epochs * module.mini_batches
        with self._teacher_head():
            for _ in range(module.epochs):
                for chunk in torch.tensor_split(rows, module.mini_batches):
                    losses.append(self._optimizer_step(chunk))
                    module.phase("updating", len(losses), updates)
        return torch.stack(losses).mean()

    def _optimizer_step(self, rows: Tensor) -> Tensor:
        module = self.module
        total = self._denominator(rows)
        groups = self._groups(rows)
        count = self._most(len(groups))
        loss = torch.zeros((), device=self.rollout.mask.device)
        for index in range(count):
            # the backward pass reads the teacher's head again
            with synchronised(module, last=index == count - 1), module.teacher.whole_head():
                share = self._micro_loss(groups[index], total) if index < len(groups) else self._dummy_loss()
                module.manual_backward(share * world_size())
            loss = loss + share.detach()
        self._check_sampler_gap(rows)
        self.grad_norm = module.apply_gradients()
        return all_sum(loss)

    def _check_sampler_gap(self, rows: Tensor) -> None:
        """Before weights change: the sampler's log-probs are near the student's, where the sampler sets a bound."""
        bound = self.module.sampler.max_logprob_gap
        if bound is None:
            return
        index = rows.to(self.rollout.mask.device)
        mask = self.rollout.mask[index]
        student, sampler = self.parts.values["student_logprobs"][index], self.rollout.sampler_logprobs[index]
        gap = torch.where(mask, (student - sampler).abs(), 0.0).sum(dtype=torch.float64)
        total, tokens = all_sum(torch.stack([gap, mask.sum().double()])).tolist()
        mean = total / max(tokens, 1.0)
        if not mean <= bound:
            error = InputError(
                f"`model.sampler.max_logprob_gap` must bound the mean |student - sampler log-prob|, got {mean:.3g} nats over "
                f"{bound} at optimizer step {self.step + 1}; no weight was changed. The servers sample from other weights, "
                "dtype or temperature: check them and `model.sampler.sync`"
            )
            error.on_every_rank = True
            raise error

    def _denominator(self, rows: Tensor) -> Tensor:
        index = rows.to(self.rollout.mask.device)
        mask = self.rollout.mask[index]
        kept = mask if self.kept is None else self.kept[index]
        module = self.module
        share = denominator(module.aggregation, kept=kept, mask=mask, max_new_tokens=module.sampler.max_new_tokens)
        return all_sum(share)

    def _micro_loss(self, rows: Tensor, total: Tensor) -> Tensor:
        """This micro-batch's share of the reduced loss."""
        module = self.module
        part = self.rollout.rows(rows).trimmed()
        scores = self._student_scores(part)
        signal, weights, kept = self._weighted(part, rows, scores)
        result = module.objective.token_loss(scores.logprobs, signal, weights, divergence=scores.divergence)
        self.parts.put("loss", rows, result.values)
        self.parts.put("clipped", rows, result.clipped)
        return aggregate(result.values, kept=kept, aggregation=module.aggregation, denominator=total)

    def _dummy_loss(self) -> Tensor:
        """An exact zero with a gradient of zero, through the same models as a micro-batch: their collectives must match."""
        return self._student_scores(self.rollout.rows(torch.zeros(1, dtype=torch.int64)).trimmed()).logprobs.sum() * 0.0

    def _weighted(self, part: Rollout, rows: Tensor, scores: TokenScores) -> tuple[TokenSignal, Tensor, Tensor]:
        columns = part.mask.shape[1]
        if self.full is not None and self.weights is not None and self.kept is not None:
            index = rows.to(part.mask.device)
            signal = _cut(self.full.rows(rows), columns)
            return signal, self.weights[index][:, :columns], self.kept[index][:, :columns]
        self.parts.put_scores("student", rows, scores)
        signal = self._signal(part, rows=rows, validate=not part.mask.is_cuda)
        weights = self.module.weighting(signal, self.progress)
        self.parts.put("weights", rows, weights)
        return signal, weights, part.mask

    # -- what is left behind -----------------------------------------------------------------------------------------

    def record(self, seconds: dict[str, float]) -> StepRecord:
        """What callbacks may read of this batch."""
        signal = self.full if self.full is not None else self._signal(self.rollout, validate=False)
        weights = self.weights if self.weights is not None else self.parts.values["weights"]
        return StepRecord(
            rollout=self.rollout,
            signal=signal,
            weights=weights,
            kept=self.kept if self.kept is not None else self.rollout.mask,
            loss=self.parts.values["loss"],
            clipped=self.parts.values["clipped"],
            finish_reason=self.sampled.finish_reason,
            sampled_tokens=self.sampled.lengths.sum(),
            grad_norm=self.grad_norm,
            progress=self.progress,
            step=self.module.global_step,
            seconds=seconds,
        )

    def _groups(self, rows: Tensor) -> list[Tensor]:
        return [rows[group] for group in micro_batches(self.lengths[rows], token_budget=self.module.token_budget)]

    def _most(self, count: int) -> int:
        return int(all_max(torch.tensor(count, device=self.rollout.mask.device)))


def _cut(signal: TokenSignal, columns: int) -> TokenSignal:
    """The leading columns of a signal."""
    changes: dict[str, Any] = {}
    for field in fields(signal):
        value = getattr(signal, field.name)
        if isinstance(value, TopK):
            changes[field.name] = TopK(ids=value.ids[:, :columns], logprobs=value.logprobs[:, :columns])
        elif isinstance(value, Tensor) and value.ndim > 1:
            changes[field.name] = value[:, :columns]
    return replace(signal, **(changes | {"validate": False}))


def _require_finite(name: str, logprobs: Tensor, rollout: Rollout) -> None:
    bad = ~torch.isfinite(logprobs).all(-1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise InputError(
            f"`{name}` must be finite on valid tokens, got a non-finite value in row {row} "
            f"(data row {rollout.prompts.row_ids[row]!r}); score this row with that model alone to see why"
        )


def synchronised(module: Any, *, last: bool) -> Any:
    """Gradient reduction over ranks on the last micro-batch only."""
    sync_gradients(module.student, last)
    model = module.trainer.strategy.model
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def scalars(record: StepRecord) -> dict[str, Tensor]:
    """Step statistics over all ranks, one collective; names are documented in docs/metrics.md.

    Returns:
        scalars by metric name.
    """
    signal, kept, weights = record.signal, record.kept, record.weights
    ratio, mask = signal.log_ratio, signal.mask
    truncated = record.finish_reason == int(FinishReason.LENGTH)
    budget = record.finish_reason == int(FinishReason.BUDGET)
    assert signal.sampler_logprobs is not None
    sampler_gap = (signal.student_logprobs - signal.sampler_logprobs).abs()
    sums = torch.stack(
        [value.double().sum() for value in (
            mask, kept, -ratio, ratio.abs(), weights, weights.square(), record.clipped, record.sampled_tokens, truncated,
            torch.ones_like(record.finish_reason), -signal.student_logprobs, sampler_gap, budget,
        )]
    )  # fmt: skip
    tokens, counted, kl, gap, weight, square, clipped, sampled, cut, rows, surprise, sampler_gap, budget = all_sum(
        sums
    ).unbind()
    tokens, counted, rows = (count.clamp(min=1) for count in (tokens, counted, rows))
    return {
        "train/reverse_kl_k1": kl / tokens,
        "train/disagreement": gap / tokens,
        "train/weight_mean": weight / counted,
        "train/weight_ess": weight.square() / (counted * square).clamp(min=torch.finfo(torch.float64).tiny),
        "train/clip_fraction": clipped / tokens,
        "train/student_nll": surprise / tokens,
        "train/sampler_gap": sampler_gap / tokens,
        "train/tokens": sampled,
        "train/truncated_fraction": cut / rows,
        "train/budget_fraction": budget / rows,
        "train/response_length": sampled / rows,
        "train/grad_norm": record.grad_norm.double(),
    }


def total_updates(*, max_steps: int, batches: float, updates_per_batch: int) -> int:
    """Optimizer steps the run will make, 1 where that is not known."""
    if max_steps > 0:
        return max_steps
    return int(batches) * updates_per_batch if math.isfinite(batches) else 1
