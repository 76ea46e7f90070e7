"""Rows cut into micro-batches by a token budget."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from lit_opd.errors import InputError, out_of_memory
from lit_opd.step.token_budget import TokenBudget
from lit_opd.types import Rollout

Result = TypeVar("Result")


def free_memory() -> None:
    """Give back what a failed attempt left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


class MicroBatches:
    """The micro-batches of one rollout batch: cut by the token budget, and again by a smaller one after memory ran out.

    Args:
        rollout: B rows.
        budget: in force; halved where memory runs out.
        configured: ``model.token_budget``.
    """

    def __init__(self, rollout: Rollout, budget: TokenBudget, configured: int | None) -> None:
        self.rollout, self.budget, self.configured = rollout, budget, configured
        self.lengths = row_lengths(rollout)
        self._running = torch.arange(0)  # rows of the micro-batch that runs

    def groups(self, rows: Tensor) -> list[Tensor]:
        """``rows``, int64 [R] on the CPU, cut into micro-batches, int64 each."""
        lengths = self.lengths[rows]
        budget = self.budget.budget(self.configured, lengths)
        return [rows[group] for group in micro_batches(lengths, token_budget=budget)]

    def take(self, rows: Tensor) -> Rollout:
        """The micro-batch of ``rows``, int64 [R], which runs now."""
        self._running = rows
        return self.rollout.rows(rows).trimmed()

    def attempt(
        self, rows: Tensor, work: Callable[[list[Tensor]], Result], *, step: int, undo: Callable[[], None]
    ) -> Result:
        """``work`` on the micro-batches of ``rows``; where memory runs out, once more from the start with smaller ones.

        Args:
            rows: int64 [R].
            work: of what ``groups`` gives.
            step: the optimizer step that is made, for the message.
            undo: forgets what a failed attempt left behind.
        """
        self._running = rows
        while True:
            try:
                return work(self.groups(rows))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                lengths = self.lengths[self._running]
                size = {"rows": len(lengths), "longest": int(lengths.max())}
                self.budget.halve(self.configured, **size, step=step, error=error)
            undo()  # outside the handler: the traceback holds what the attempt allocated
            free_memory()
