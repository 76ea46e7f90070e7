"""What every teacher promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_opd.errors import InputError
from lit_opd.models.sharding import Placement
from lit_opd.models.student import StudentSettings
from lit_opd.models.vocabulary import configured_stops
from lit_opd.scoring.model import ScoringModel
from lit_opd.scoring.shared import SharedHead
from lit_opd.scoring.stops import StopClass
from lit_opd.scoring.tiles import Head
from lit_opd.types import LIST_LENGTH, Rollout, TokenScores

StopMass = Literal["own", "sum"]

# name in a signal's requirements -> name in the model's forward
SCORE_WANTS = {"teacher_entropy": "entropy", "teacher_topk": "topk"}


class Teacher(nn.Module, ABC):
    """Scores tokens it did not sample. Frozen; in neither the optimizer nor the checkpoint."""

    field = "model.teacher"  # what errors call it; the module renames a reference model
    shares_student = False  # it reads the student's own tokenizer, configuration and weights
    longest_row: int | None = (
        None  # tokens of a prompt and response, which the module knows before ``load``; None for unknown
    )

    stop_mass: StopMass = "own"  # what a sampled stop token is scored with: its own mass, or that of all stop tokens
    stop_ids: tuple[int, ...] = ()  # at which a response of the student ends, which the module knows before ``load``
    unused_ids: tuple[int, ...] = ()  # below the last id that counts, which name no token; known before ``load``
    takes_candidates = False  # whether ``score_candidates`` can be called; ``ask_candidates`` finds out

    @property
    @abstractmethod
    def provides(self) -> frozenset[str]:
        """What this teacher can give beyond log-probs: "teacher_entropy", "teacher_topk", "token_kl" and
        "teacher_distribution"; the last two need ``full_head``."""

    @property
    def list_size(self) -> int:
        """K of the lists of its likeliest tokens ("teacher_topk")."""
        return LIST_LENGTH

    def ask_candidates(self, k: int) -> str | None:
        """Find out, before a run, whether ``score_candidates`` takes ``k`` tokens a position, and note it.

        Returns:
            why not; None where it can.
        """
        return f"`{type(self).__name__}` lists its own likeliest tokens only"

    @abstractmethod
    def tokenizers(self) -> list[Any]:
        """(tokenizer, embedding rows) of every model behind this teacher, without loading weights."""

    def revision(self) -> str | None:
        """What names the very weights behind this teacher, wherever their files lie; None where they change, or where only a
        server has them."""
        return None

    def check(self, *, temperature: float, tokens: int | None) -> None:
        """What can be checked without weights, before a run.

        Args:
            temperature: of sampling and scoring.
            tokens: the longest prompt and response together, None where it is not known.
        Raises:
            InputError: this teacher cannot score such a run.
        """

    def check_data(self, rows_by_teacher: dict[str | None, str]) -> None:
        """What the data names, before a run.

        Args:
            rows_by_teacher: every teacher name in the data (None where a row has none) with the first row that has it.
        Raises:
            InputError: a name this teacher does not know.
        """

    def check_student(self, settings: StudentSettings) -> None:
        """What this teacher needs of the student, before a run.

        Raises:
            InputError: the student lacks it.
        """

    def attach(self, student: ScoringModel) -> None:
        """Take note of the student, for a teacher that shares its weights."""

    def know_longest_row(self, tokens: int | None) -> None:
        """Note, before ``load``, how long a prompt and response may be together; None where that is not known."""
        for part in self.modules():
            if isinstance(part, Teacher):
                part.longest_row = tokens

    def know_stop_ids(self, ids: tuple[int, ...]) -> None:
        """Note, before ``load``, at which ids a response of the student ends."""
        for part in self.modules():
            if isinstance(part, Teacher):
                part.stop_ids = ids

    def know_unused_ids(self, ids: tuple[int, ...]) -> None:
        """Note, before ``load``, which ids name no token, where the student does not say (``attach``)."""
        for part in self.modules():
            if isinstance(part, Teacher):
                part.unused_ids = ids

    def know_tokenizer(self, tokenizer: Any) -> None:
        """Note, before ``load``, the student's tokenizer, for a teacher that has another."""

    @property
    def prompt_tokenizer(self) -> Any:
        """The tokenizer of the prompts that only the teacher reads; None where it is the student's."""
        return None

    @property
    def window(self) -> int | None:
        """Tokens of a prompt and response that it can read; None where that is not known."""
        return getattr(self.reader_config, "max_position_embeddings", None)

    def require_aligned(self, aligned: int, tokens: int) -> None:
        """A batch of ``tokens`` has a score for ``aligned`` of them.

        Raises:
            InputError: too few.
        """

    @property
    def sums_stops(self) -> bool:
        """Whether it, or a teacher inside it, scores a stop token with the mass of all."""
        return any(isinstance(part, Teacher) and part.stop_mass == "sum" for part in self.modules())

    def _stop_class(self, path: str, tokenizer: Any) -> StopClass:
        """The student's stop ids, and with them those of the model at ``path``."""
        if not self.stop_ids:
            raise RuntimeError(f"{type(self).__name__}.know_stop_ids has not been called")
        return StopClass(self.stop_ids, tuple(sorted({*self.stop_ids, *configured_stops(path, tokenizer)})))

    @abstractmethod
    def load(self, *, vocabulary: int) -> None:
        """Load the weights; ``vocabulary`` leading entries count. Idempotent."""

    def shard(self, place: Placement) -> None:
        """Spread the weights over the ranks as ``place`` does; nothing to do for a teacher that holds none here."""

    def load_sharded(self, place: Placement, *, vocabulary: int) -> None:
        """For FSDP2: ``load``, then ``shard``; a teacher that can read its shards alone does that instead. Idempotent."""
        self.load(vocabulary=vocabulary)
        self.shard(place)

    @abstractmethod
    def score(
        self, rollout: Rollout, *, temperature: float = 1.0, requires: frozenset[str] = frozenset()
    ) -> TokenScores:
        """Log-probs of the sampled tokens.

        Args:
            rollout: B rows.
            temperature: divides the logits, as for the student.
            requires: optional fields, a subset of ``provides``.
        Returns:
            [B, T] nats, 0 where masked; with ``states`` where ``full_head`` is to be asked next and they save it a forward.
        """

    def score_candidates(
        self,
        rollout: Rollout,
        candidates: Tensor,
        *,
        temperature: float = 1.0,
        requires: frozenset[str] = frozenset(),
    ) -> TokenScores:
        """As ``score``, with log-probs of further tokens: those of ``candidates``, int64 [B, T, K], in the field of that name."""
        raise InputError(f"`{self.field}`: {self.ask_candidates(candidates.shape[-1])}")

    @property
    def reader_config(self) -> Any:
        """The text configuration of the one model in this process that can read responses while they are written, without
        loading weights; None where there is none."""
        return None

    def reader(self) -> ScoringModel:
        """The model of ``reader_config``."""
        raise InputError(f"`{type(self).__name__}` has no model in this process that could read responses along")

    def full_head(self, rollout: Rollout, *, states: Tensor | None = None) -> Head | SharedHead:
        """Hidden states of the valid tokens and the output head, for full-vocabulary divergences; of a teacher with another
        vocabulary what both have in common.

        Args:
            rollout: B rows.
            states: [N, H], what ``score`` gave for the same rows, on any device; None to compute them.
        """
        raise InputError(f"`{type(self).__name__}` gives log-probs of sampled tokens only, not the full vocabulary")

    def on_device(self, device: torch.device) -> AbstractContextManager[None]:
        """Hold the weights on ``device`` while the block scores a whole batch; for a teacher kept elsewhere between batches."""
        return nullcontext()

    def head_on_device(self, device: torch.device) -> AbstractContextManager[None]:
        """Hold on ``device``, while the block runs, what ``full_head`` reads where it is given states: all weights, for a teacher
        that does not tell them apart."""
        return self.on_device(device)

    def whole_head(self) -> AbstractContextManager[None]:
        """Keep what ``full_head`` returned usable while the block runs; a sharded teacher would free the weight."""
        return nullcontext()


def revisions(scorers: Iterable[Teacher]) -> dict[str, str]:
    """Of every teacher that reads files, alone or inside others: its revision by its own setting; after ``load``."""
    found: dict[str, str] = {}
    for part in (part for scorer in scorers for part in scorer.modules()):
        inner = [below for below in part.modules() if isinstance(below, Teacher) and below is not part]
        revision = None if inner or not isinstance(part, Teacher) else part.revision()
        if revision is not None and isinstance(part, Teacher):  # teachers of a user's own class may share a setting
            name = f"{part.field}.path"
            found[name] = f"{found.get(name, '')} {revision}".strip()
    return found
