"""What responses in pieces ask of the run: rows that may wait, one length for all steps, and a correction for older tokens."""

from __future__ import annotations

import warnings
from typing import Any

from lit_opd.errors import InputError
from lit_opd.objective import PolicyLoss
from lit_opd.preflight.subject import Subject
from lit_opd.prompts import HindsightPrompt, PromptDataModule
from lit_opd.rollout import PartialSampler


def check_partial(module: Subject, data: PromptDataModule | None, *, ranks: int) -> None:
    """A batch has rows that can wait, and nothing else ends or names them.

    Args:
        module: of the run.
        data: set up; None where the run has data of its own.
        ranks: that share a batch.
    Raises:
        InputError: naming the setting.
    """
    sampler = module.sampler
    if not isinstance(sampler, PartialSampler):
        return
    if module.length_budget is not None:
        raise InputError(
            "`model.length_budget` must be null with PartialSampler, got LengthBudget: a row that waits would have another "
            "length than its step; leave one of them out"
        )
    if data is not None:
        _check_room(module, sampler, data, ranks)
        _check_columns(data)
    objective = module.recipe.objective
    if isinstance(objective, PolicyLoss) and objective.importance_cap is None:
        warnings.warn(
            "`PolicyLoss.importance_cap` is null: tokens that older weights sampled count as if the student had written them "
            "now, which is biased",
            stacklevel=2,
        )


def _check_columns(data: PromptDataModule) -> None:
    """Checkpoints hold the data rows of responses that wait, where something reads those, and are read without running code."""
    for row in getattr(data, "training_rows", ()):
        for name, value in row.items():
            if not _is_plain(value):
                raise InputError(
                    f"`data.train` must hold text, numbers, lists and objects where PartialSampler keeps data rows in "
                    f"checkpoints, got {type(value).__name__} in column {name!r} of row {row.row_id!r}; leave the column out, or "
                    "write it as text"
                )


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, bytes, bool, int, float)


def _check_room(module: Subject, sampler: PartialSampler, data: PromptDataModule, ranks: int) -> None:
    """At least one row can wait, with the rows that must end with it."""
    samples = data.samples_per_prompt
    rows = data.prompt_batch // ranks * samples
    fewest, _ = sampler.trained_rows(rows)
    compares = module.reward is not None or isinstance(getattr(data, "teacher_prompt", None), HindsightPrompt)
    together = samples if compares else 1
    if rows - fewest < together:
        what = f"the {together} samples of a prompt, which end in one batch" if together > 1 else "a row"
        raise InputError(
            f"`PartialSampler.waiting` must let {what} wait, got {sampler.waiting:g} of the {rows} rows of a rank; raise it, or "
            "`data.prompt_batch`"
        )
