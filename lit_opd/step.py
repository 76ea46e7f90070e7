"""One rollout batch turned into optimizer steps: denominators, micro-batches, backward, record.

The order of things: the teacher (and a reference model where something reads it) scores the whole batch; where weights
need other rows, where a strategy drops tokens or where the batch is used more than once, the student scores it once too,
without gradient; denominators are summed over micro-batches and ranks; then each micro-batch runs forward and backward.
A rank with fewer micro-batches than another runs dummies of weight zero, because sharded collectives must match.

A value that is not finite goes into the signal as 0, so that all ranks finish the backward pass; the one decision whether the
step is made falls there, see ``faults.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lit_opd.advantage import apply_transforms
from lit_opd.distributed import all_max, all_sum, shared_failure, world_size
from lit_opd.faults import FOLDER, GRADIENT, bad_rows, finite, free_memory, is_bad, out_of_memory, save_fault
from lit_opd.objective import aggregate, denominator
from lit_opd.sharding import holds_shards, sync_gradients
from lit_opd.types import FinishReason, InputError, Rollout, StepRecord, TokenScores, TokenSignal, TopK

if TYPE_CHECKING:
    from lit_opd.module import OPDModule

Result = TypeVar("Result")

_SIGNAL_FIELDS = (
    "student_logprobs", "teacher_logprobs", "reference_logprobs", "student_entropy", "teacher_entropy", "token_kl"
)  # fmt: skip
_MUST_BE_FINITE = ("sampler_logprobs", *_SIGNAL_FIELDS)
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
        """Store ``part`` [R, columns, ...] without its gradient."""
        part = part.detach()
        if name not in self.values:
            self.values[name] = part.new_zeros(self.shape + part.shape[2:])
        self.values[name][rows.to(part.device), : part.shape[1]] = part

    def put_scores(self, who: str, rows: Tensor, scores: TokenScores) -> None:
        """Store what ``who`` ("student", "teacher", "reference") says of ``rows``, int64 [R]."""
        found = {f"{who}_logprobs": scores.logprobs, f"{who}_entropy": scores.entropy, "token_kl": scores.token_kl}
        if scores.topk is not None:
            found |= {f"{who}_topk.ids": scores.topk.ids, f"{who}_topk.logprobs": scores.topk.logprobs}
        for name, value in found.items():
            if value is not None:
                self.put(name, rows, value)

    def signal_fields(self, rows: Tensor, columns: int) -> dict[str, Any]:
        """The optional and required fields of a ``TokenSignal`` of ``rows``, int64 [R], and the leading columns, finite."""
        cut = {name: value[rows.to(value.device), :columns] for name, value in self.values.items()}
        fields: dict[str, Any] = {name: finite(cut[name]) for name in _SIGNAL_FIELDS if name in cut}
        for name in ("student_topk", "teacher_topk"):
            if f"{name}.ids" in cut:
                logprobs = cut[f"{name}.logprobs"].nan_to_num(neginf=-math.inf)  # no mass is a fair answer
                fields[name] = TopK(ids=cut[f"{name}.ids"], logprobs=logprobs)
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
        self.attempted = torch.arange(0)  # rows of the micro-batch that runs
        self.skipped = False
        self.full: TokenSignal | None = None  # the whole batch's signal, where one scoring pass came first
        self.weights: Tensor | None = None
        self.kept: Tensor | None = None

    # -- scoring -----------------------------------------------------------------------------------------------------

    def score_teacher(self) -> None:
        """Scores of the whole batch by the frozen models, in micro-batches."""
        rows = torch.arange(len(self.rollout))
        with shared_failure():  # a row over the budget is every rank's error
            groups = self._groups(rows)
        most = self._most(len(groups))  # a collective, which the block below must not hold
        with ExitStack() as stack:
            for model in self.module.scorers.values():
                stack.enter_context(model.on_device(self.rollout.mask.device))
            if not any(holds_shards(model) for model in self.module.scorers.values()):
                stack.enter_context(shared_failure())  # sharded models talk to each other while they score
            self._in_micro_batches(rows, lambda groups: self._score_groups(groups, max(most, len(groups))))

    def _score_groups(self, groups: list[Tensor], total: int) -> None:
        for index in range(total):
            self._score_group(groups[index] if index < len(groups) else groups[0])
            self.module.phase("scoring", index + 1, total)

    def _score_group(self, rows: Tensor) -> None:
        part = self._part(rows)
        for who, model in self.module.scorers.items():
            requires = self.module.required if who == "teacher" else frozenset()
            if who == "teacher" and part.teacher_logprobs is not None and not requires & model.provides:
                scores = TokenScores(part.teacher_logprobs)  # of the same tokens and weights, from sampling
            else:
                # mini-batches are cut otherwise, so what the teacher kept for their updates would not be found
                again = requires - {"teacher_distribution"} if self.module.mini_batches > 1 else requires
                scores = model.score(part, temperature=self.module.sampler.temperature, requires=again)
            self.parts.put_scores(who, rows, scores)

    def score_student(self) -> None:
        """The student's scores without gradient, where the weights or the denominators need them first."""
        if not self.module.needs_scoring_pass:
            return
        with torch.no_grad(), self._teacher_head():
            self._in_micro_batches(torch.arange(len(self.rollout)), self._score_groups_of_student)
        self.full = self._signal(self.rollout)
        self.weights = self.module.weighting(self.full, self.progress)
        self.kept = self.module.weighting.kept(self.full, self.progress)

    def _score_groups_of_student(self, groups: list[Tensor]) -> None:
        for index in range(self._most(len(groups))):
            rows = groups[index] if index < len(groups) else groups[0]
            with self.module.teacher.whole_head():
                self.parts.put_scores("student", rows, self._student_scores(self._part(rows)))

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

    def _signal(self, rollout: Rollout, *, rows: Tensor | None = None) -> TokenSignal:
        """The signal of ``rollout``, which is the batch's ``rows`` (default all of them); 0 in place of what is not finite."""
        rows = torch.arange(len(rollout)) if rows is None else rows
        signal = TokenSignal(
            **self.parts.signal_fields(rows, rollout.mask.shape[1]),
            mask=rollout.mask,
            sampler_logprobs=finite(rollout.sampler_logprobs),
            row_keys=rollout.prompts.row_keys,
            step=self.step,
            validate=False,
        )
        return apply_transforms(self.module.advantage, signal)

    # -- updating ----------------------------------------------------------------------------------------------------

    def run(self) -> Tensor:
        """All optimizer steps of the batch, or those before one that is not finite; returns the mean reported loss, scalar."""
        module = self.module
        chunks = torch.tensor_split(torch.arange(len(self.rollout)), module.mini_batches) * module.epochs
        losses: list[Tensor] = []
        if module.mini_batches > 1:
            self._forget()
        with self._teacher_head():
            for done, chunk in enumerate(chunks):
                losses.append(self._optimizer_step(chunk, left=len(chunks) - done))
                if self.skipped:
                    break
                module.phase("updating", done + 1, len(chunks))
            else:
                module.skips.made()
        return torch.stack(losses).mean()

    def _optimizer_step(self, rows: Tensor, *, left: int) -> Tensor:
        """The step on ``rows``, the first of ``left``; all of them are skipped where something is not finite."""
        loss = self._in_micro_batches(rows, lambda groups: self._backward(groups, self._denominator(rows)))
        self.grad_norm = self.module.clip()
        names = self._not_finite()
        if names:
            self._skip(rows, names, left)
        else:
            self._check_sampler_gap(rows)
            self.module.apply_gradients()
        return all_sum(loss)

    def _backward(self, groups: list[Tensor], total: Tensor) -> Tensor:
        """Gradients of all micro-batches; this rank's share of the loss, scalar."""
        module = self.module
        count = self._most(len(groups))
        loss = torch.zeros((), device=self.rollout.mask.device)
        for index in range(count):
            # the backward pass reads the teacher's head again
            with synchronised(module, last=index == count - 1), module.teacher.whole_head():
                share = self._micro_loss(groups[index], total) if index < len(groups) else self._dummy_loss()
                module.manual_backward(share * world_size())
            loss = loss + share.detach()
        return loss

    def _not_finite(self) -> list[str]:
        """What is not finite on any rank, equal on all of them; the step's one host synchronisation."""
        values, mask = self._values(), self.rollout.mask
        fine = torch.zeros((), dtype=torch.bool, device=mask.device)
        bad = [is_bad(values[name], mask).any() if name in values else fine for name in _MUST_BE_FINITE]
        flags = torch.stack([*bad, ~torch.isfinite(self.grad_norm).to(mask.device)]).int()
        found = all_max(flags).tolist()
        return [name for name, flag in zip((*_MUST_BE_FINITE, GRADIENT), found, strict=True) if flag]

    def _values(self) -> dict[str, Tensor]:
        return {"sampler_logprobs": self.rollout.sampler_logprobs, **self.parts.values}

    def _skip(self, chunk: Tensor, names: list[str], left: int) -> None:
        """Keep the rows, count, and let the counters go on without a change of weights; the same on every rank."""
        module, values = self.module, self._values()
        folder, step = Path(module.trainer.default_root_dir) / FOLDER, module.global_step + 1
        rows = bad_rows(names, values, self.rollout, chunk)
        everyone = save_fault(folder, step, names=names, rows=rows, rollout=self.rollout, values=values)
        module.skips.skipped(step, left, names=names, rows=everyone, folder=folder)
        self.skipped = True
        module.clear_gradients()
        for _ in range(left):
            module.apply_gradients()  # of no weight: an optimizer leaves those without a gradient as they are

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
        part = self._part(rows)
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
        signal = self._signal(part, rows=rows)
        weights = self.module.weighting(signal, self.progress)
        self.parts.put("weights", rows, weights)
        return signal, weights, part.mask

    # -- what is left behind -----------------------------------------------------------------------------------------

    def record(self, seconds: dict[str, float]) -> StepRecord:
        """What callbacks may read of this batch."""
        signal = self.full if self.full is not None else self._signal(self.rollout)
        weights = self.weights if self.weights is not None else self.parts.values["weights"]
        return StepRecord(
            rollout=replace(self.rollout, teacher_logprobs=None),  # which the signal has, and a replay makes anew
            signal=signal,
            weights=weights,
            kept=self._trained(),
            loss=self.parts.values["loss"],
            clipped=self.parts.values["clipped"],
            finish_reason=self.sampled.finish_reason,
            sampled_tokens=self.sampled.num_drawn.sum(),
            response_tokens=None if self.sampled.drawn is None else self.sampled.lengths.sum(),
            grad_norm=self.grad_norm,
            progress=self.progress,
            step=self.module.global_step,
            seconds=seconds,
            skipped=self.skipped,
        )

    def _trained(self) -> Tensor:
        kept = self.kept if self.kept is not None else self.rollout.mask
        return torch.zeros_like(kept) if self.skipped else kept

    # -- micro-batches -----------------------------------------------------------------------------------------------

    def _in_micro_batches(self, rows: Tensor, work: Callable[[list[Tensor]], Result]) -> Result:
        """``work`` on the rows' micro-batches; where memory runs out, once more from the start with smaller ones."""
        module, self.attempted = self.module, rows
        while True:
            try:
                return work(self._groups(rows))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                lengths = self.lengths[self.attempted]
                size = {"rows": len(lengths), "longest": int(lengths.max())}
                module.room.halve(module.token_budget, **size, step=module.global_step + 1, error=error)
            module.clear_gradients()  # outside the handler: the traceback holds what the attempt allocated
            self._forget()
            free_memory()

    def _forget(self) -> None:
        """What the frozen models kept of this batch's micro-batches is of no use to those that come."""
        for model in self.module.scorers.values():
            model.forget()

    def _part(self, rows: Tensor) -> Rollout:
        """A micro-batch of ``rows``."""
        self.attempted = rows
        return self.rollout.rows(rows).trimmed()

    def _groups(self, rows: Tensor) -> list[Tensor]:
        lengths = self.lengths[rows]
        budget = self.module.room.budget(self.module.token_budget, lengths)
        return [rows[group] for group in micro_batches(lengths, token_budget=budget)]

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


def synchronised(module: Any, *, last: bool) -> Any:
    """Gradient reduction over ranks on the last micro-batch only."""
    sync_gradients(module.student, last)
    model = module.trainer.strategy.model
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


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


def total_updates(*, max_steps: int, batches: float, updates_per_batch: int) -> int:
    """Optimizer steps the run will make, 1 where that is not known."""
    if max_steps > 0:
        return max_steps
    return int(batches) * updates_per_batch if math.isfinite(batches) else 1
