"""The token budget in force, halved once where memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from lit_opd.distributed import rank, world_size
from lit_opd.errors import InputError, first_line


class TokenBudget:
    """The token budget in force, in tokens a micro-batch; halved once when memory runs out, for the rest of the run."""

    def __init__(self) -> None:
        self.halved: int | None = None
        self._halved_from: int | None = None  # the configured one

    def state(self) -> list[int | None]:
        """For a checkpoint: the halved budget and the one it was made from."""
        return [self.halved, self._halved_from]

    def restore(self, state: list[int | None], configured: int | None) -> None:
        """Go on with a halved budget, unless ``model.token_budget`` was set to another since."""
        halved, halved_from = state
        if configured == halved_from:
            self.halved, self._halved_from = halved, halved_from

    def budget(self, configured: int | None, lengths: Sequence[int]) -> int | None:
        """Padded tokens that a micro-batch may hold, None for no bound; after halving at least the longest row, which is then a
        micro-batch of its own.

        Args:
            configured: ``model.token_budget``.
            lengths: tokens of the rows to cut.
        """
        return configured if self.halved is None else max(self.halved, max(lengths, default=1))

    def halve(self, configured: int | None, *, rows: int, longest: int, step: int, error: BaseException) -> None:
        """Take note that a micro-batch did not fit.

        Args:
            configured: ``model.token_budget``; None halves the size of what did not fit.
            rows: of the micro-batch.
            longest: tokens of its longest row.
            step: the optimizer step that will be made again.
            error: what torch said.
        Raises:
            InputError: a second time, a single row, or on several ranks, which are in the middle of collectives.
        """
        size = f"a micro-batch of {rows} rows x {longest} tokens"
        in_force = f"{configured}" if self.halved is None else f"{self.halved}, halved once before"
        refused = None
        if world_size() > 1:
            refused = f"on rank {rank()}; on several ranks a step is not made again, go on with --ckpt_path last"
        elif rows <= 1:
            refused = "which cannot be cut; lower `model.sampler.max_new_tokens` or set `model.student.gradient_checkpointing`"
        elif self.halved is not None:
            refused = "again; set it lower, lower `data.prompt_batch`, or set `model.student.gradient_checkpointing`"
        if refused is not None:
            raise InputError(
                f"`model.token_budget` must be lower, got {in_force}: out of memory at optimizer step {step} in {size} "
                f"{refused} ({first_line(error)})"
            ) from error
        size_now = rows * longest  # far below the budget where rows are few: half the budget would not cut it
        self._halved_from = configured
        self.halved = max(1, (size_now if configured is None or size_now <= configured // 2 else configured) // 2)
        warnings.warn(
            f"out of memory at optimizer step {step} in {size} ({first_line(error)}): the step is made again with "
            f"`model.token_budget` {self.halved} instead of {in_force}, which stays so for the rest of the run; set it in the "
            "config",
            stacklevel=2,
        )
