"""What a response is worth, for what adds a reward to the teacher's signal."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_opd.errors import InputError, is_finite, require
from lit_opd.evaluation.grading import Grader, Outcome
from lit_opd.evaluation.validation import decoder
from lit_opd.types import Rollout, is_reward


class Reward(ABC):
    """Scores whole responses. Subclass it and write ``score``."""

    @abstractmethod
    def score(self, responses: Sequence[str], rollout: Rollout) -> Sequence[float | None]:
        """What each response is worth.

        Args:
            responses: B texts, special tokens left out.
            rollout: the same rows; ``rollout.prompts`` has row ids and reference answers.
        Returns:
            B finite numbers of any type and unit, None for a row without a reward.
        """

    def close(self) -> None:  # noqa: B027
        """End what was started."""

    def __call__(self, rollout: Rollout, tokenizer: Any) -> Tensor:
        """float32 [B] on the rollout's device, NaN where a row has none.

        Args:
            rollout: B rows.
            tokenizer: the student's.
        Raises:
            InputError: ``score`` returned another count, or what is no finite number of float32; the row is named.
        """
        found = list(self.score(decoder(tokenizer)(rollout), rollout))
        own = f"`{type(self).__name__}.score`"
        if len(found) != len(rollout):
            raise InputError(f"{own} must return one number or None a row, {len(rollout)}, got {len(found)}")
        for row, value in zip(rollout.prompts.row_ids, found, strict=True):
            if value is not None and not is_reward(value):
                raise InputError(f"{own} must return finite numbers or None, got {value!r} for row {row!r}")
        numbers = [math.nan if value is None else float(value) for value in found]
        return torch.tensor(numbers, dtype=torch.float32, device=rollout.mask.device)


class AnswerReward(Reward):
    """``right`` where the boxed or last answer equals the reference, ``wrong`` elsewhere; none where the data has no answer.

    Graded as validation does, in processes of their own. An answer that is not found, or takes too long to compare, is wrong.

    Args:
        right: of a right answer.
        wrong: of any other.
        num_workers: processes that run math-verify.
    Raises:
        InputError: a number that is not finite, or no worker.
    """

    def __init__(self, right: float = 1.0, wrong: float = 0.0, num_workers: int = 2) -> None:
        self.right, self.wrong = right, wrong
        for name, value in (("right", right), ("wrong", wrong)):
            require(is_finite(value), f"AnswerReward.{name}", "a finite number", value)
        require(num_workers >= 1, "AnswerReward.num_workers", ">= 1", num_workers)
        self.grader = Grader(num_workers=num_workers)

    def score(self, responses: Sequence[str], rollout: Rollout) -> list[float | None]:
        """``right`` or ``wrong`` for each of B rows, None without a reference."""
        answers = rollout.prompts.answers or (None,) * len(rollout)
        rows = [row for row, answer in enumerate(answers) if answer is not None]
        grades = self.grader.grade([responses[row] for row in rows], [str(answers[row]) for row in rows])
        found: list[float | None] = [None] * len(rollout)
        for row, grade in zip(rows, grades, strict=True):
            found[row] = self.right if grade.outcome is Outcome.CORRECT else self.wrong
        return found

    def close(self) -> None:
        """End the workers."""
        self.grader.close()
