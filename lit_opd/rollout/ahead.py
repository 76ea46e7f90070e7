"""A batch that servers sample while the trainer works on the one before it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from lit_opd.distributed import gather_objects, is_rank_zero
from lit_opd.errors import ServerError
from lit_opd.rollout.base import SamplingSettings

Row = tuple[list[int], list[float]]  # token ids and log-probs (nats)


@dataclass(frozen=True)
class Ahead:
    """Responses of one batch, which may still be on their way.

    Args:
        keys: of its rows, in order; those of all ranks where it comes from a checkpoint.
        settings: they were asked for with.
        version: of the weights that sample.
        rows: the responses, in the order of the keys.
        lost: connections that the servers had lost when it was begun; infinite for one that has long arrived.
    """

    keys: tuple[int, ...]
    settings: SamplingSettings
    version: int
    rows: Future[list[Row]]
    lost: float

    def wait(self) -> None:
        """Until all have arrived, or failed for good."""
        self.rows.exception()

    def of(self, keys: Sequence[int], *, lost: int) -> list[Row] | None:
        """The responses to the rows ``keys``; None where one failed, is of another batch, or a server went away meanwhile.

        Args:
            keys: of a batch.
            lost: connections that the servers have lost by now.
        """
        self.wait()
        failed = self.rows.exception()
        if failed is not None and not isinstance(failed, ServerError):
            raise failed
        if failed is not None or lost > self.lost or not set(keys) <= set(self.keys):
            return None
        by_key = dict(zip(self.keys, self.rows.result(), strict=True))
        return [by_key[key] for key in keys]

    def drop(self) -> None:
        """Nobody waits for them any more."""
        self.rows.cancel()


def collected(ahead: Ahead, keys: Sequence[int], *, lost: int) -> list[Row] | None:
    """As ``Ahead.of``; None on every rank where it is None on one. Called on every rank."""
    rows = ahead.of(keys, lost=lost)
    if all(gather_objects([rows is not None])):
        return rows
    if is_rank_zero():
        warnings.warn(
            f"the batch sampled ahead by weights version {ahead.version} was lost with a server, or is not the batch that is "
            "trained on now: it is sampled again, by the weights of now",
            stacklevel=3,
        )
    return None


def to_state(ahead: Ahead, *, lost: int) -> dict[str, Any] | None:
    """For a checkpoint: the responses of all ranks, once they have arrived; None where some did not. Called on every rank."""
    rows = ahead.of(ahead.keys, lost=lost)
    parts = gather_objects([None if rows is None else (ahead.keys, rows)])
    if any(part is None for part in parts):
        return None
    found = [row for _, rows in parts for row in rows]
    return {
        "keys": torch.tensor([key for keys, _ in parts for key in keys], dtype=torch.int64),
        "lengths": torch.tensor([len(ids) for ids, _ in found], dtype=torch.int64),
        "ids": torch.tensor([number for ids, _ in found for number in ids], dtype=torch.int64),
        "logprobs": torch.tensor([value for _, values in found for value in values], dtype=torch.float32),
        "version": ahead.version,
        **{name: getattr(ahead.settings, name) for name in _KEPT},
    }


_KEPT = ("max_new_tokens", "budgeted", "step", "domain")  # what else a batch needs of its settings


def from_state(state: Mapping[str, Any], settings: SamplingSettings) -> Ahead:
    """What ``to_state`` kept.

    Args:
        state: of a checkpoint.
        settings: of the sampler now; those that belong to the batch are the checkpoint's.
    """
    ends = [*accumulate(state["lengths"].tolist(), initial=0)]
    rows: Future[list[Row]] = Future()
    rows.set_result([(state["ids"][a:b].tolist(), state["logprobs"][a:b].tolist()) for a, b in pairwise(ends)])
    own = replace(settings, **{name: state[name] for name in _KEPT})
    return Ahead(tuple(state["keys"].tolist()), own, int(state["version"]), rows, lost=math.inf)
