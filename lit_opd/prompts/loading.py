"""The order of the prompts and the loaders that cut it into batches; positions are exact and can be resumed."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_opd.errors import InputError
from lit_opd.prompts.encoding import EncodedPrompt, collate
from lit_opd.streams import stable_hash
from lit_opd.types import PromptBatch

_SEED_RANGE = 1 << 32  # a CPU generator reads no more bits of its seed


class PromptOrder:
    """The endless, reproducible order in which training prompts are drawn.

    An epoch is ``round(share * N)`` draws from each source (at least one), N being the rows of all sources, spread
    evenly over the epoch. A source is walked in seeded permutations: all its rows come once before any comes again,
    and a walk that the epoch does not finish goes on in the next. Without weights an epoch is every row once.

    Args:
        sizes: rows of each source; rows are numbered through all the sources.
        weights: relative shares, None for the sizes.
        seed: of the permutations.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None, seed: int = 42) -> None:
        weights = list(sizes) if weights is None else list(weights)
        total = sum(sizes)
        self.sizes = tuple(sizes)
        self.quotas = tuple(max(1, round(total * weight / sum(weights))) for weight in weights)
        self.seed = seed
        self._starts = tuple(itertools.accumulate(sizes, initial=0))
        self._epoch = lru_cache(maxsize=2)(self._ordered_epoch)
        self._walk = lru_cache(maxsize=4 * len(sizes))(self._permutation)

    def __len__(self) -> int:
        """Draws in an epoch."""
        return sum(self.quotas)

    def rows(self, start: int, count: int) -> list[int]:
        """Row numbers of the draws ``start``, ..., ``start + count - 1`` counted from the beginning of training."""
        draws = (divmod(position, len(self)) for position in range(start, start + count))
        return [int(self._epoch(epoch)[offset]) for epoch, offset in draws]

    def _ordered_epoch(self, epoch: int) -> Tensor:
        """int64 [len(self)] row numbers; draw i of q of a source stands at (i + 1/2) / q of the epoch."""
        drawn = [self._drawn(source, epoch) for source in range(len(self.sizes))]
        places = [(torch.arange(quota, dtype=torch.float64) + 0.5) / quota for quota in self.quotas]
        return torch.cat(drawn)[torch.argsort(torch.cat(places), stable=True)]

    def _drawn(self, source: int, epoch: int) -> Tensor:
        size, quota = self.sizes[source], self.quotas[source]
        draws = torch.arange(epoch * quota, (epoch + 1) * quota)
        walks = range(int(draws[0]) // size, int(draws[-1]) // size + 1)
        order = torch.cat([self._walk(source, walk) for walk in walks])
        return order[draws - walks[0] * size] + self._starts[source]

    def _permutation(self, source: int, walk: int) -> Tensor:
        seed = stable_hash(f"order\0{self.seed}\0{source}\0{walk}") % _SEED_RANGE
        return torch.randperm(self.sizes[source], generator=torch.Generator().manual_seed(seed))


class PromptLoader:
    """Full batches of training prompts without end; each is a pure function of (seed, batch index).

    The global batch b holds the draws b * prompt_batch, ... of the order; rank r gets every world-th of them from r,
    each repeated ``samples_per_prompt`` times in adjacent rows. Batches run across epochs, so all are full. A prompt
    that a batch holds twice (the seam of two epochs, few prompts) counts its samples on, so no two rows of a global
    batch share a key. One ``iter`` hands out ``len(loader)`` batches and the next goes on from there, which is what
    Lightning does with a sized loader: it never exhausts one, and it fetches no batch ahead.

    Args:
        prompts: encoded prompts, numbered as in ``order``.
        order: which prompt comes when.
        prompt_batch: prompts a batch over all ranks.
        samples_per_prompt: rows a prompt.
        pad_id: fills the left of short prompts.
        teacher_pad_id: likewise in the teacher's own rendering.
        rank: this process.
        world: number of processes, a divisor of ``prompt_batch``.
        processed: how many batches the trainer has finished; makes a state saved inside a step name the batch in
            flight as not done. None: a batch is done when handed out.
    """

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        order: PromptOrder,
        *,
        prompt_batch: int,
        samples_per_prompt: int = 1,
        pad_id: int = 0,
        teacher_pad_id: int | None = None,
        rank: int = 0,
        world: int = 1,
        processed: Callable[[], int] | None = None,
        repeated: int | None = None,
        may_differ: bool = False,
    ) -> None:
        if prompt_batch < 1 or prompt_batch % world:
            raise InputError(
                f"`PromptDataModule.prompt_batch` must be a positive multiple of the number of ranks ({world}), "
                f"got {prompt_batch}; change it or the devices"
            )
        self.prompts, self.order = prompts, order
        self.prompt_batch, self.samples_per_prompt = prompt_batch, samples_per_prompt
        self.pad_id, self.teacher_pad_id = pad_id, teacher_pad_id
        self.rank, self.world = rank, world
        self._processed, self.repeated, self.may_differ = processed, repeated, may_differ
        self._handed_out = 0  # batches
        self._processed_before: int | None = None  # the trainer's count when the last batch was handed out
        self._fingerprint = stable_hash("\0".join([*(p.row_id for p in prompts), *map(str, order.quotas)]))

    def __len__(self) -> int:
        """Batches that cover an epoch."""
        return math.ceil(len(self.order) / self.prompt_batch)

    def __iter__(self) -> Iterator[PromptBatch]:
        for _ in range(len(self)):
            self._processed_before = self._processed() if self._processed else None
            index, self._handed_out = self._handed_out, self._handed_out + 1
            yield self.batch(index if self.repeated is None else index % self.repeated)

    def coming(self) -> PromptBatch:
        """The batch after the one that was handed out last, which stays the next to be handed out."""
        index = self._handed_out
        return self.batch(index if self.repeated is None else index % self.repeated)

    @property
    def num_finished(self) -> int:
        """Batches trained on so far; the next run starts with this index."""
        in_flight = self._processed is not None and self._processed() == self._processed_before
        return self._handed_out - int(in_flight)

    def batch(self, index: int) -> PromptBatch:
        """This rank's part of the global batch ``index``: [prompt_batch / world * samples_per_prompt] rows."""
        rows = self.order.rows(index * self.prompt_batch, self.prompt_batch)
        seen: Counter[int] = Counter()
        mine: list[tuple[EncodedPrompt, int]] = []
        for place, row in enumerate(rows):
            if place % self.world == self.rank:
                first = seen[row] * self.samples_per_prompt
                mine += [(self.prompts[row], first + sample) for sample in range(self.samples_per_prompt)]
            seen[row] += 1
        return collate(
            [prompt for prompt, _ in mine],
            self.pad_id,
            samples=[sample for _, sample in mine],
            teacher_pad_id=self.teacher_pad_id,
        )

    def _identity(self) -> dict[str, int]:
        return {
            "rows": len(self.prompts),
            "fingerprint": self._fingerprint,
            "seed": self.order.seed,
            "prompt_batch": self.prompt_batch,
        }

    def state_dict(self) -> dict[str, int]:
        """Position and identity of the data, whole numbers only."""
        return {"batches": self.num_finished, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after ``state_dict``'s last finished batch; another number of ranks is fine. Where the run was told that its
        data may differ, another order is walked from its start.

        Raises:
            InputError: when the data, the seed or the batch size is another.
        """
        what = {
            "rows": "`PromptDataModule.train` must have as many rows as in the checkpoint",
            "fingerprint": "`PromptDataModule.train` must have the row ids and shares of the checkpoint (as a hash)",
            "seed": "`PromptDataModule.seed` must be the checkpoint's",
            "prompt_batch": "`PromptDataModule.prompt_batch` must be the checkpoint's",
        }
        for name, value in self._identity().items():
            if state_dict.get(name) != value and self.may_differ:
                rank_zero_warn(
                    "the training prompts, their order or the batch are not the checkpoint's: from the first one on"
                )
                return
            if state_dict.get(name) != value:
                raise InputError(
                    f"{what[name]}, {state_dict.get(name)}, got {value}; restore the setting, or start a new run from "
                    "the exported student"
                )
        self._handed_out = int(state_dict["batches"])
        self._processed_before = None


def looking_ahead(loader: object) -> PromptLoader:
    """The training loader, which knows the batch to come.

    Raises:
        InputError: it is another.
    """
    if not isinstance(loader, PromptLoader):
        raise InputError(
            f"`model.sampler.ahead` must be 0 with training data of `{type(loader).__name__}`: only PromptDataModule knows the "
            "batch to come; set it to 0"
        )
    return loader


class EvaluationLoader:
    """Prompts in file order, once; every rank gets the same number of batches and rows.

    A global batch is ``batch`` prompts, the last one shorter; rank r gets every world-th of them from r. What does not
    divide is filled by repeating the batch's first prompt with ``counted=False``.
    """

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        *,
        batch: int,
        pad_id: int = 0,
        teacher_pad_id: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.prompts, self.batch_size = prompts, batch
        self.pad_id, self.teacher_pad_id = pad_id, teacher_pad_id
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return math.ceil(len(self.prompts) / self.batch_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        for start in range(0, len(self.prompts), self.batch_size):
            rows = list(self.prompts[start : start + self.batch_size])
            fill = -len(rows) % self.world
            flags = [True] * len(rows) + [False] * fill
            yield collate(
                (rows + rows[:1] * fill)[self.rank :: self.world],
                self.pad_id,
                teacher_pad_id=self.teacher_pad_id,
                counted=flags[self.rank :: self.world],
            )
