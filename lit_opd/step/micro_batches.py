"""Rows cut into micro-batches by a token budget."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from lit_opd.errors import InputError
from lit_opd.types import Rollout


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
