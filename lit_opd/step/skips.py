"""Steps with a value that is not a finite number.

A step with a NaN or Inf is not made: its rows go to ``faults/step-N.safetensors`` and ``faults/step-N.json``, and after a few
in a row the run stops.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lit_opd.distributed import gather_objects, is_rank_zero, rank, world_size
from lit_opd.errors import InputError
from lit_opd.files import whole_file
from lit_opd.types import Rollout

FOLDER = "faults"
GRADIENT = "gradient"
NAMED_ROWS = 3  # in a message; the files have all


# -- values that are no numbers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BadRow:
    """A row of a step that was not made.

    Args:
        rank: whose row it is.
        row: its place in that rank's batch.
        row_id: of the data.
        row_key: names its random stream.
        field: what was not finite: a field of the signal; "gradient" where no row can be blamed and all are kept.
        position: the first response position that is not finite, from 0; None for the gradient.
        value: there: "nan", "inf" or "-inf".
    """

    rank: int
    row: int
    row_id: str
    row_key: int
    field: str
    position: int | None = None
    value: str | None = None

    def __str__(self) -> str:
        where = "" if self.position is None else f" ({self.field} is {self.value} at response position {self.position})"
        return f"data row {self.row_id!r}{where}"


def finite(values: Tensor) -> Tensor:
    """``values`` (any shape) with 0 in place of what is not finite, so that a step which will not be made can be finished."""
    return torch.where(torch.isfinite(values), values, values.new_zeros(()))


def is_bad(values: Tensor, mask: Tensor) -> Tensor:
    """bool [B], rows with a value [B, T] that is not finite where ``mask`` bool [B, T] is True."""
    return (~torch.isfinite(values) & mask).any(-1)


def bad_rows(names: list[str], values: Mapping[str, Tensor], rollout: Rollout, chunk: list[int]) -> list[BadRow]:
    """This rank's rows that are not finite, one entry a row and field; all rows of ``chunk`` where only the gradient is not.

    Args:
        names: what is not finite, on any rank.
        values: by field, those named [B, T].
        rollout: the B rows.
        chunk: rows of the update that failed.
    """
    if names == [GRADIENT]:
        return [_row(rollout, row, field=GRADIENT) for row in chunk]
    found = []
    for field in (name for name in names if name in values):
        bad = ~torch.isfinite(values[field]) & rollout.mask
        for row in bad.any(-1).nonzero().squeeze(-1).tolist():
            position = int(bad[row].nonzero()[0])
            value = str(float(values[field][row, position]))
            found.append(_row(rollout, row, field=field, position=position, value=value))
    return found


def _row(rollout: Rollout, row: int, **found: Any) -> BadRow:
    prompts = rollout.prompts
    return BadRow(rank=rank(), row=row, row_id=prompts.row_ids[row], row_key=int(prompts.row_keys[row]), **found)


def save_fault(
    folder: Path, step: int, *, names: list[str], rows: list[BadRow], rollout: Rollout, values: Mapping[str, Tensor]
) -> None:
    """Write this rank's rows, and on rank 0 the list of all; called on every rank.

    Args:
        folder: ``faults`` of the run folder.
        step: the optimizer step that is not made.
        names: what is not finite, on any rank.
        rows: of all ranks.
        rollout: this rank's batch.
        values: [B, T, ...] by field, as they were.
    """
    mine = sorted({row.row for row in rows if row.rank == rank()})
    index = torch.tensor(mine, dtype=torch.int64, device=rollout.mask.device)
    prompts = rollout.prompts
    texts = {"prompt_ids": prompts.ids, "prompt_mask": prompts.mask, "row_keys": prompts.row_keys}
    texts |= {"response_ids": rollout.response_ids, "mask": rollout.mask}
    if rollout.observed is not None and rollout.turn is not None:
        texts |= {"observed": rollout.observed, "turn": rollout.turn}
    if rollout.version is not None:
        texts["version"] = rollout.version
    if mine:
        kept = {name: value[index].cpu().contiguous() for name, value in {**texts, **values}.items()} | {
            "rows": index.cpu()
        }
        suffix = f"-rank-{rank()}" if rank() else ""
        _write(folder / f"step-{step}{suffix}.safetensors", lambda path: save_file(kept, path))
    if is_rank_zero():
        found = {
            "step": step,
            "not_finite": names,
            "world_size": world_size(),
            "rows": [asdict(row) for row in rows],
        }
        _write(folder / f"step-{step}.json", lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Whole or not at all; a disk that is full or read-only costs the file, not the run."""
    try:
        with whole_file(path) as draft:
            write(draft)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"{path} could not be written: {error}", stacklevel=2)


class Skips:
    """Counts the steps that were not made, keeps their rows, and ends the run after some in a row.

    Args:
        most: rollout batches in a row; 0 and 1 end the run at the first.
        folder: where the rows go; None keeps none.
    """

    def __init__(self, most: int, folder: Path | None = None) -> None:
        self.most, self.folder = most, folder
        self.total = 0  # optimizer steps since the run began; goes into the checkpoint
        self.in_a_row = 0  # rollout batches; from 0 in a run that goes on, to get past a bad stretch

    def made(self) -> None:
        """A batch's steps were all made."""
        self.in_a_row = 0

    def skipped(
        self,
        step: int,
        updates: int,
        *,
        names: list[str],
        rows: list[BadRow],
        rollout: Rollout,
        values: Mapping[str, Tensor],
    ) -> None:
        """Keep the rows, count, and warn on rank 0; the same on every rank.

        Args:
            step: the optimizer step that is not made.
            updates: optimizer steps that are skipped: it, and those that the batch had left.
            names: what was not finite.
            rows: this rank's.
            rollout: this rank's batch.
            values: [B, T, ...] by field, as they were.
        Raises:
            InputError: on every rank, after ``most`` batches in a row.
        """
        self.in_a_row += 1
        rows, where = gather_objects(rows), ""
        if self.folder is not None:
            save_fault(self.folder, step, names=names, rows=rows, rollout=rollout, values=values)
            where = f"; see {self.folder / f'step-{step}.json'}"
        shown = ", ".join(str(row) for row in rows[:NAMED_ROWS])
        more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
        what = f"{' and '.join(names)} not finite; {shown}{more}{where}"
        if self.in_a_row >= self.most:
            error = InputError(
                f"`model.max_skipped_steps` allows no more: batch {self.in_a_row} in a row was not trained on, at optimizer "
                f"step {step}: {what}. Score these rows with that model alone, lower the learning rate, or start from an "
                "earlier checkpoint"
            )
            error.on_every_rank = True
            raise error
        self.total += updates
        if is_rank_zero():
            warnings.warn(
                f"optimizer step {step} was skipped, no weight was changed: {what} ({self.in_a_row} in a row, the run stops "
                f"at {self.most}, `model.max_skipped_steps`)",
                stacklevel=2,
            )
