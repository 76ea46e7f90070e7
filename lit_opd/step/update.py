"""One rollout batch turned into optimizer steps: denominators, micro-batches, backward, record.

The order of things: the teacher (and a reference model where something reads it) scores the whole batch; where weights
need other rows, where a strategy drops tokens or where the batch is used more than once, the student scores it once too,
without gradient; denominators are summed over micro-batches and ranks; then each micro-batch runs forward and backward.
A rank with fewer micro-batches than another runs dummies of weight zero, because sharded collectives must match. A rank
with fewer rows than mini-batches (``truncated: drop``) has no rows in the last ones; where no rank has any, the gradient of
the step is zero, as with masked rows.

A value that is not finite goes into the signal as 0, so that all ranks finish the backward pass; the one decision whether the
step is made falls after it, see ``skips.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy
import torch
from torch import Tensor

from lit_opd.distributed import all_max, all_sum, largest, world_size
from lit_opd.objective import aggregate, denominator
from lit_opd.step.micro_batches import MicroBatches
from lit_opd.step.optimisation import Optimisation
from lit_opd.step.recipe import Recipe
from lit_opd.step.sampler_gap import SamplerGap
from lit_opd.step.scores import SIGNAL_FIELDS, Listener, Rows, Scores, leading_columns
from lit_opd.step.skips import GRADIENT, Skips, bad_rows, is_bad
from lit_opd.types import Rollout, StepRecord, TokenScores, TokenSignal

_MUST_BE_FINITE = ("sampler_logprobs", *SIGNAL_FIELDS)


class Clock:
    """Wall seconds of named phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


class Update:
    """The optimizer steps of one rollout batch.

    Args:
        recipe: what is learned.
        scores: of the batch, B rows, already without what ``truncated`` removes.
        batches: its micro-batches.
        optimisation: turns gradients into steps.
        listener: told how far each phase is.
        skips: counts the steps that are not made.
        progress: of the training, in [0, 1], for the strategy.
        gap: compares the sampler's log-probs with the student's, None for no comparison.
    """

    def __init__(
        self,
        recipe: Recipe,
        scores: Scores,
        batches: MicroBatches,
        optimisation: Optimisation,
        listener: Listener,
        *,
        skips: Skips,
        progress: float,
        gap: SamplerGap | None = None,
    ) -> None:
        self.recipe, self.scores, self.batches = recipe, scores, batches
        self.optimisation, self.listener, self.skips = optimisation, listener, skips
        self.progress, self.gap = progress, gap
        self.rollout, self.step = scores.rollout, optimisation.step
        self.skipped = False
        self.weights: Tensor | None = None  # of the whole batch, where one scoring pass came first
        self.kept: Tensor | None = None
        self.loss = torch.zeros(())  # mean reported loss of the steps, a skipped one included: scalar nats

    def run(self, sampled: Rollout | None = None, clock: Clock | None = None) -> StepRecord:
        """Score the batch and make all of its steps, or those before one that is not finite.

        Args:
            sampled: the rollout as it was sampled, for the record; None where it is the batch.
            clock: has measured what came before.
        Returns:
            the record, which holds B rows.
        Raises:
            InputError: memory ran out, ``max_skipped_steps`` or ``max_logprob_gap`` was passed, or a strategy or transform
                returned what it must not.
            ServerError: a teacher's server failed for good.
        """
        clock = clock or Clock()
        with clock("scoring"):
            self._score()
        with clock("updating"):
            self.loss = self._steps()
        return self._record(sampled or self.rollout, clock.seconds)

    # -- scoring -----------------------------------------------------------------------------------------------------

    def _score(self) -> None:
        self.scores.score_frozen(self.batches, self.listener)
        if self.recipe.needs_scoring_pass:
            full = self.scores.score_student(self.batches)
            self.weights, self.kept = self.recipe.weighted(full, self.progress)

    # -- updating ----------------------------------------------------------------------------------------------------

    def _steps(self) -> Tensor:
        recipe = self.recipe
        parts = numpy.array_split(range(len(self.rollout)), recipe.mini_batches)
        chunks = [part.tolist() for part in parts] * recipe.epochs
        losses: list[Tensor] = []
        with self.scores.teacher_head():
            for done, chunk in enumerate(chunks):
                losses.append(self._optimizer_step(chunk, left=len(chunks) - done))
                if self.skipped:
                    break
                self.listener("updating", done + 1, len(chunks))
            else:
                self.skips.made()
        return torch.stack(losses).mean()

    def _optimizer_step(self, rows: Rows, *, left: int) -> Tensor:
        """The step on ``rows``, maybe none, the first of ``left``; all of them are skipped where something is not finite."""
        loss = self.batches.attempt(
            rows,
            lambda groups: self._backward(groups, self._denominator(rows), last=left == 1),
            step=self.optimisation.step + 1,
            undo=self._undo,
        )
        self.grad_norm = self.optimisation.clip()
        names = self._not_finite()
        if names:
            self._skip(rows, names, left)
        else:
            self._check_sampler_gap(rows)
            self.optimisation.apply()
        return all_sum(loss)

    def _undo(self) -> None:
        self.optimisation.clear()
        self.scores.forget()

    def _backward(self, groups: list[Rows], total: Tensor, *, last: bool) -> Tensor:
        """Gradients of all micro-batches, of the batch's ``last`` step or another; this rank's share of the loss, scalar."""
        count = max(1, largest(len(groups), self.rollout.mask.device))  # without rows anywhere, for a gradient of zero
        loss = torch.zeros((), device=self.rollout.mask.device)
        with self.scores.teacher_head():  # where memory ran out there are no states any more, and all of it is needed
            for index in range(count):
                # the backward pass reads the teacher's head again
                with self.optimisation.accumulating(last=index == count - 1), self.scores.whole_head():
                    share = self._micro_loss(groups[index], total) if index < len(groups) else self.scores.nothing()
                    if last and index < len(groups):
                        self.scores.forget(groups[index])
                    self.optimisation.backward(share * world_size())
                loss = loss + share.detach()
                del share  # with its graph, which holds what the teacher said of this micro-batch
        return loss

    def _denominator(self, rows: Rows) -> Tensor:
        kept = (self.scores.counted if self.kept is None else self.kept)[self._index(rows)]
        return all_sum(denominator(self.recipe.aggregation, kept=kept, max_new_tokens=self.recipe.max_new_tokens))

    def _micro_loss(self, rows: Rows, total: Tensor) -> Tensor:
        """This micro-batch's share of the reduced loss."""
        part = self.batches.take(rows)
        scores = self.scores.student(part, rows)
        signal, weights, kept = self._weighted(part, rows, scores)
        logprobs = self.scores.student_sums(scores.logprobs, rows)
        result = self.recipe.objective.token_loss(logprobs, signal, weights, divergence=scores.divergence)
        self.scores.buffer.put("loss", rows, result.values)
        self.scores.buffer.put("clipped", rows, result.clipped)
        return aggregate(result.values, kept=kept, aggregation=self.recipe.aggregation, denominator=total)

    def _weighted(self, part: Rollout, rows: Rows, scores: TokenScores) -> tuple[TokenSignal, Tensor, Tensor]:
        columns = part.mask.shape[1]
        if self.scores.full is not None and self.weights is not None and self.kept is not None:
            index = self._index(rows)
            signal = leading_columns(self.scores.full.rows(index), columns)
            return signal, self.weights[index][:, :columns], self.kept[index][:, :columns]
        self.scores.buffer.put_scores("student", rows, scores)
        signal = self.scores.signal(part, rows)
        weights = self.recipe.weighting(self.recipe.as_weighed(signal), self.progress)
        self.scores.buffer.put("weights", rows, weights)
        return signal, weights, signal.mask

    def _index(self, rows: Rows) -> Tensor:
        """int64, on the batch's device; of no rows too."""
        return torch.tensor(rows, dtype=torch.int64, device=self.rollout.mask.device)

    # -- before weights change ---------------------------------------------------------------------------------------

    def _not_finite(self) -> list[str]:
        """What is not finite on any rank, equal on all of them; the step's one host synchronisation."""
        values, mask = self.scores.values(), self.rollout.mask
        fine = torch.zeros((), dtype=torch.bool, device=mask.device)
        bad = [is_bad(values[name], mask).any() if name in values else fine for name in _MUST_BE_FINITE]
        flags = torch.stack([*bad, ~torch.isfinite(self.grad_norm).to(mask.device)]).int()
        found = all_max(flags).tolist()
        return [name for name, flag in zip((*_MUST_BE_FINITE, GRADIENT), found, strict=True) if flag]

    def _skip(self, chunk: Rows, names: list[str], left: int) -> None:
        """Keep the rows, count, and let the counters go on without a change of weights; the same on every rank."""
        values = self.scores.values()
        rows = bad_rows(names, values, self.rollout, chunk)
        self.skips.skipped(
            self.optimisation.step + 1, left, names=names, rows=rows, rollout=self.rollout, values=values
        )
        self.skipped = True
        self.optimisation.clear()
        for _ in range(left):
            self.optimisation.apply()  # of no weight: an optimizer leaves those without a gradient as they are

    def _check_sampler_gap(self, rows: Rows) -> None:
        """The sampler's log-probs are near the student's, where that is compared at this step."""
        if self.gap is None or not self.gap.due:
            return
        index = self._index(rows)
        student, sampler = self.scores.buffer.values["student_logprobs"][index], self.rollout.sampler_logprobs[index]
        mask, step = self.rollout.mask[index], self.optimisation.step + 1
        if self.rollout.replayed is not None:
            mask = mask & ~self.rollout.replayed.old[index].unsqueeze(-1)
        if self.rollout.version is not None:
            mask = mask & ~self.rollout.older[index]
        self.gap.check(student, sampler, mask, step=step, model=self.scores.student_model)

    # -- the record --------------------------------------------------------------------------------------------------

    def _record(self, sampled: Rollout, seconds: dict[str, float]) -> StepRecord:
        """What callbacks may read of this batch."""
        buffer = self.scores.buffer.values
        signal = self.scores.full
        if signal is None:
            signal = self.scores.signal(self.rollout, list(range(len(self.rollout))))
        kept = self.kept if self.kept is not None else self.scores.counted
        return StepRecord(
            rollout=replace(self.rollout, teacher_logprobs=None),  # which the signal has, and a replay makes anew
            signal=signal,
            weights=self.weights if self.weights is not None else buffer["weights"],
            kept=torch.zeros_like(kept) if self.skipped else kept,
            loss=buffer["loss"],
            clipped=buffer["clipped"],
            finish_reason=sampled.finish_reason,
            reward=sampled.reward,
            sampled_tokens=sampled.num_drawn.sum(),
            response_tokens=None if sampled.drawn is None else sampled.lengths.sum(),
            grad_norm=self.grad_norm,
            progress=self.progress,
            step=self.optimisation.step,
            seconds=seconds,
            skipped=self.skipped,
            chunks=self.scores.chunks,
        )
