"""Rows cut into micro-batches by a token budget."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from lit_opd.errors import InputError, out_of_memory
from lit_opd.step.token_budget import TokenBudget
from lit_opd.types import Rollout

Result = TypeVar("Result")


def free_memory() -> None:
    """Give the memory of a failed attempt back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def micro_batches(lengths: Sequence[int], *, token_budget: int | None, packed: bool = False) -> list[list[int]]:
    """Rows cut into groups whose size stays within the budget, longest first.

    Args:
        lengths: prompt and response tokens of each row.
        token_budget: tokens a group may hold, None for one group.
        packed: a group's size is the sum of its rows; else rows x longest row, padding with them.
    Returns:
        row numbers of each group; every row once.
    Raises:
        InputError: a row alone is over the budget.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    if token_budget is None or not order:
        return [order] if order else []
    if max(lengths) > token_budget:
        raise InputError(
            f"`OPDModule.token_budget` must hold the longest row, got {token_budget} for a row of {max(lengths)} tokens; "
            "raise it, or lower `model.sampler.max_new_tokens`"
        )
    groups: list[list[int]] = []
    size = 0
    for row in order:
        longest = lengths[row if packed or not groups else groups[-1][0]]  # a group's first row is its longest
        if not groups or size + longest > token_budget:
            groups.append([])
            longest, size = lengths[row], 0
        groups[-1].append(row)
        size += longest
    return groups


class MicroBatches:
    """The micro-batches of one rollout batch: cut by the token budget, and again by a smaller one after memory ran out.

    Args:
        rollout: B rows.
        budget: in force; halved where memory runs out.
        configured: ``model.token_budget``.
        packed: all models score rows without padding.
    """

    def __init__(self, rollout: Rollout, budget: TokenBudget, configured: int | None, *, packed: bool = False) -> None:
        self.rollout, self.budget, self.configured, self.packed = rollout, budget, configured, packed
        self.lengths = rollout.layout.row_lengths
        self._running: list[int] = []  # rows of the micro-batch that runs

    def groups(self, rows: Sequence[int]) -> list[list[int]]:
        """``rows`` cut into micro-batches: row numbers of the batch, every row once.

        Raises:
            InputError: a row alone is over the configured budget.
        """
        lengths = [self.lengths[row] for row in rows]
        budget = self.budget.budget(self.configured, lengths)
        return [
            [rows[place] for place in group]
            for group in micro_batches(lengths, token_budget=budget, packed=self.packed)
        ]

    def take(self, rows: list[int]) -> Rollout:
        """The micro-batch of ``rows``, [R, T'] with T' its longest response; it runs from now on."""
        self._running = rows
        return self.rollout.take(rows).trimmed()

    def attempt(
        self, rows: list[int], work: Callable[[list[list[int]]], Result], *, step: int, undo: Callable[[], None]
    ) -> Result:
        """``work`` on the micro-batches of ``rows``; where memory runs out, once more from the start with smaller ones.

        Args:
            rows: of the batch.
            work: of what ``groups`` gives.
            step: the optimizer step that is made, from 1, for the message.
            undo: drops the results of a failed attempt.
        Returns:
            what ``work`` returns.
        Raises:
            InputError: memory runs out and the budget cannot be halved (again), see ``TokenBudget.halve``.
        """
        self._running = rows
        while True:
            try:
                return work(self.groups(rows))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                lengths = [self.lengths[row] for row in self._running]
                size = {"rows": len(lengths), "longest": max(lengths, default=0)}
                self.budget.halve(self.configured, **size, step=step, error=error)
            undo()  # outside the handler: the traceback holds what the attempt allocated
            free_memory()
