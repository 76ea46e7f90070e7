"""What every sampling engine promises."""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lit_opd.distributed import is_rank_zero
from lit_opd.errors import InputError, require
from lit_opd.rollout.weights import StudentWeights
from lit_opd.streams import row_uniforms
from lit_opd.types import FinishReason, PromptBatch, Provenance, Rollout, Waiting

_INSIDE = ("sampler", "fresh")  # what samplers around another one call it in their constructors


class EarlyStop(Protocol):
    """What may end rows of a batch before their stop id, while they are written; see ``RatioStop``."""

    chunk: int  # tokens between two looks

    def collapsed(self, rows: Tensor, ids: Tensor, logprobs: Tensor, columns: int) -> Tensor:
        """bool [R], rows that end now.

        Args:
            rows: int64 [R], those of the batch that are still written.
            ids: int64 [B, T].
            logprobs: [B, T] nats, the sampler's.
            columns: how many of them are written.
        """

    def select(self, rows: Tensor) -> None:
        """Go on with ``rows`` of those still written, int64 [R]."""

    def cut(self, rollout: Rollout, *, pad_id: int) -> Rollout:
        """``rollout`` [B, T] as sampled, without what stands after the end of a row."""


@dataclass(frozen=True, eq=False)
class Spoken:
    """One turn of R rows, on the host.

    Args:
        ids: int64 [R, n]; what stands after a row's length has no meaning.
        logprobs: [R, n] nats under the sampled distribution.
        lengths: R counts, each from 1 to the room the row had.
        stopped: R flags, True where the last token is a stop id.
    """

    ids: Tensor
    logprobs: Tensor
    lengths: list[int]
    stopped: list[bool]


class Conversation(Protocol):
    """Rows that are answered between their turns. Every rank makes the same calls, also one without a row left."""

    provenance: Provenance

    def speak(self, room: Sequence[int]) -> Spoken:
        """The next turn of every row.

        Args:
            room: R counts, the tokens that each row may have, >= 1.
        """

    def hear(self, rows: Sequence[int], heard: Sequence[Sequence[int]]) -> None:
        """Go on with some rows.

        Args:
            rows: places among the R rows of the last turn, ascending.
            heard: token ids that each of them reads next, at least one.
        """

    def forget(self) -> None:
        """Go on without any row."""


@dataclass(frozen=True)
class SamplingSettings:
    """One call's worth of sampling settings.

    Args:
        max_new_tokens: response slots, >= 1.
        stop_ids: token ids that end a response.
        pad_id: fills finished rows.
        vocabulary: leading vocabulary entries that may be sampled.
        temperature: > 0.
        top_p: nucleus mass in (0, 1].
        top_k: candidates, 0 for all.
        greedy: take the likeliest token; temperature, top_p and top_k do not apply.
        seed: run seed.
        step: optimizer step; row r's tokens depend on (seed, step, domain, row key r) and the weights only.
        domain: keeps evaluation's random streams apart from training's.
        weights_version: optimizer steps the weights have seen, recorded on the rollout.
        budgeted: ``max_new_tokens`` is a length budget, and rows that reach it are marked as cut by it.
        stop: makes, of the prompts and these settings, what may end a row early; see ``RatioStop``. None for nothing.
        unused_ids: rows of the student's embedding that name no token, ascending, for engines with weights of their own;
            the student's ``ScoringModel`` knows them itself.
        replay: how many rows a ``ReplaySampler`` may answer with what it has saved: "none" outside training, "some", or "all".
        begun: of each row, the optimizer step in which it was begun and the tokens it has since, which are part of the prompt:
            its random numbers are those that follow. Empty where all rows begin now.
        together: something compares or reads the samples of one prompt, which so end in one batch; see ``PartialSampler``.
        room: of each row the tokens it may have, from 1 to ``max_new_tokens``; empty where all may have as many. For samplers
            that heed it.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    vocabulary: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False
    seed: int = 0
    step: int = 0
    domain: int = 0
    weights_version: int = 0
    budgeted: bool = False
    stop: Callable[[PromptBatch, SamplingSettings], EarlyStop] | None = None
    unused_ids: tuple[int, ...] = ()
    replay: Literal["none", "some", "all"] = "none"
    begun: tuple[tuple[int, int], ...] = ()
    together: bool = False
    room: tuple[int, ...] = ()

    def rooms(self, rows: int) -> tuple[int, ...]:
        """The tokens that each of so many rows may have."""
        return self.room or (self.max_new_tokens,) * rows

    def uniforms(self, row_keys: Tensor) -> Tensor:
        """The random numbers of the rows, float64 [B, max_new_tokens].

        Args:
            row_keys: int64 [B].
        """
        if not self.begun:
            return row_uniforms(self.seed, row_keys, self.step, self.max_new_tokens, domain=self.domain)
        found = torch.empty(len(row_keys), self.max_new_tokens, dtype=torch.float64, device=row_keys.device)
        for step, drawn in dict.fromkeys(self.begun):
            rows = [row for row, own in enumerate(self.begun) if own == (step, drawn)]
            keys = row_keys[torch.tensor(rows, device=row_keys.device)]
            found[rows] = row_uniforms(self.seed, keys, step, self.max_new_tokens, domain=self.domain, first=drawn)
        return found

    def provenance(self, engine: str) -> Provenance:
        """The record of how a rollout came about."""
        if self.greedy:
            return Provenance(engine, temperature=0.0, weights_version=self.weights_version)
        return Provenance(engine, self.temperature, self.top_p, self.top_k, self.weights_version)


@dataclass(frozen=True)
class TextFacts:
    """What a sampler that reads texts must know of the run.

    Args:
        encode: ids of a text, in which a special token's name is text.
        decode: text of ids, without special tokens.
        stop_ids: ids that end a response.
        end_id: the one that a text is ended with.
        vocabulary: leading entries that count.
        prompts: ids of every training prompt by row id; None where they are not known.
        samples: responses a prompt.
        texts: last user turn of every training prompt by row id, for a sampler that asks for them (``reads_texts``).
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    stop_ids: tuple[int, ...]
    end_id: int
    vocabulary: int
    prompts: Mapping[str, Tensor] | None = None
    samples: int = 1
    texts: Mapping[str, str] = field(default_factory=dict)


class Seconds:
    """Wall seconds by name, added up until they are logged.

    Args:
        names: all there are; one that did not occur is 0.
    """

    def __init__(self, *names: str) -> None:
        self._sums = dict.fromkeys(names, 0.0)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the block, also one that fails."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._sums[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The sums since the last call."""
        found, self._sums = self._sums, dict.fromkeys(self._sums, 0.0)
        return found


class Sampler(ABC):
    """Draws responses from the student.

    Args:
        max_new_tokens: response slots, >= 1.
        temperature: > 0; scoring divides the logits by the same value.
        top_p: nucleus mass in (0, 1].
        top_k: candidates, 0 for all.
        stop_token_ids: ids that end a response, default those of the model's generation config and tokenizer.
    Raises:
        InputError: a value outside its range.
    """

    stops_early = False  # True for an engine that heeds ``SamplingSettings.stop``
    continues = False  # True for one that heeds ``SamplingSettings.begun``, as ``uniforms`` does
    heeds_room = False  # True for one that heeds ``SamplingSettings.room``
    in_process = True  # False for an engine with memory of its own
    memory_fraction = 0.0  # of a rank's device memory, taken by such an engine while it samples
    sleep = True  # the engine gives most of that back between rollouts
    max_logprob_gap: float | None = None  # nats, bound on the step's mean |student - sampler log-prob|
    seconds: Seconds | None = None  # what such an engine spends beside sampling, logged as time/NAME
    ahead = 0  # batches it samples while an earlier one trains, see ``begin``
    reads_rows = False  # it asks for the data rows behind the prompts
    reads_texts = False  # it compares the texts of the training prompts before the run
    tools: Sequence[Mapping[str, Any]] | None = None  # JSON schemas that prompts are rendered with

    def __init__(
        self,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop_token_ids: list[int] | None = None,
    ) -> None:
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.top_p, self.top_k, self.stop_token_ids = top_p, top_k, stop_token_ids
        name = type(self).__name__
        require(
            max_new_tokens >= 1, f"{name}.max_new_tokens", ">= 1; a response needs at least one token", max_new_tokens
        )
        require(
            0 < temperature < math.inf, f"{name}.temperature", "> 0; greedy decoding cannot be trained on", temperature
        )
        require(0 < top_p <= 1, f"{name}.top_p", "in (0, 1]", top_p)
        require(top_k >= 0, f"{name}.top_k", ">= 0 (0 keeps all candidates)", top_k)

    @property
    def engine(self) -> Sampler:
        """What draws the tokens; itself, or the sampler inside."""
        return self

    def _refuse_stop(self, settings: SamplingSettings) -> None:
        if settings.stop is not None:
            raise InputError(
                f"`SamplingSettings.stop` must be None for {type(self).__name__}, got {settings.stop!r}; use DecodeSampler"
            )

    def know_texts(self, facts: TextFacts) -> None:  # noqa: B027
        """Read what is sampled from where that is saved; before a run, again at its start.

        Raises:
            InputError: it does not fit to the run.
        """

    def revision(self) -> str | None:
        """What names the saved responses that it reads; None where it reads none."""
        return None

    def check(self, *, tokens: int | None, vocabulary: int) -> None:  # noqa: B027
        """What can be checked before a run.

        Args:
            tokens: the longest prompt and response together, None where it is not known.
            vocabulary: embedding rows of the student.
        """

    def make_room(self, tokens: int, *, field: str) -> None:  # noqa: B027
        """Rows may be asked for that are longer than those of training and validation; before a run.

        Args:
            tokens: the longest prompt and response together.
            field: the setting that asks for them, for errors.
        Raises:
            InputError: an engine of its own cannot hold them.
        """

    def check_student(self, adapter_rank: int | None) -> None:  # noqa: B027
        """What can be checked of the student before a run.

        Args:
            adapter_rank: of its LoRA, None without.
        Raises:
            InputError: its weights cannot reach the engine in the configured way.
        """

    def prepare(self, student: StudentWeights, weights_version: int) -> None:  # noqa: B027
        """Bring the engine to the student's weights before it samples; nothing to do for one that reads the student itself.

        Args:
            student: gives the weights: as a Hugging Face folder when it is called, or unit by unit; on every rank or none.
            weights_version: optimizer steps the weights have seen.
        """

    def forget_weights(self) -> None:  # noqa: B027
        """The next ``prepare`` brings the student's weights, whatever version the engine has: a run starts, and the student may
        have others under the same number of steps, such as a checkpoint's."""

    def check_loaded(self) -> None:  # noqa: B027
        """The weights of a checkpoint that is only evaluated will reach the engine.

        Raises:
            InputError: they will not, so others would be measured.
        """

    def kept_awake(self) -> AbstractContextManager[None]:
        """While calls of ``sample`` follow one another: an engine that gives its memory back between rollouts does so after
        the last of them, and keeps its prefix cache until then. Entered and left on every rank."""
        return nullcontext()

    def begin(self, prompts: PromptBatch, settings: SamplingSettings) -> None:
        """Start to sample a batch of training prompts and return; ``sample`` of the same rows takes the responses. Called on
        every rank, with weights that ``prepare`` brought.

        Args:
            prompts: B left-padded prompts.
            settings: of the step that will train on them.
        """
        raise NotImplementedError(f"{type(self).__name__} samples nothing ahead")

    def forget_ahead(self) -> None:  # noqa: B027
        """Drop what was begun: a new run starts."""

    def ahead_state(self) -> dict[str, Any] | None:
        """For a checkpoint: what was begun, once it has arrived; None where nothing was, or it failed. Called on every rank."""
        return None

    def restore_ahead(self, state: Mapping[str, Any] | None, settings: SamplingSettings) -> None:  # noqa: B027
        """Go on with what ``ahead_state`` kept; ``settings`` are those of training now."""

    def trained_rows(self, batch: int) -> tuple[int, int]:
        """Fewest and most rows that a step may train on.

        Args:
            batch: rows of the data's batch on a rank.
        """
        return batch, batch

    def take_unfinished(self) -> Waiting | None:
        """What was sampled in the step, and what waits after it; None for a sampler that ends every row in its step. With this
        the step has been made: what ended in it counts as trained on."""
        return None

    def say_unfinished(self) -> None:  # noqa: B027
        """Training ends: say what still waits. Called on every rank."""

    def forget_unfinished(self) -> None:  # noqa: B027
        """Drop the rows that wait: a new run starts."""

    def unfinished_state(self) -> list[dict[str, Any]] | None:
        """For a checkpoint: the rows of all ranks that wait after the last step that was made; None for a sampler that ends
        every row in its step. Called on every rank."""
        return None

    def restore_unfinished(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Go on with what ``unfinished_state`` kept; a sampler that cannot says that it is dropped."""
        if state and is_rank_zero():
            warnings.warn(
                f"the checkpoint holds {len(state)} responses that were to be continued: they are dropped, since "
                f"{type(self).__name__} continues none",
                stacklevel=2,
            )

    def attach(self, tokenizer: Any, encoder: Any | None) -> None:  # noqa: B027
        """Take note of how prompts are rendered, before a run.

        Args:
            tokenizer: the student's.
            encoder: the data module's ``PromptEncoder``; None where it has none.
        """

    def converse(self, model: Any, prompts: PromptBatch, settings: SamplingSettings) -> Conversation | None:
        """A conversation that goes on from the keys and values it has; None where each turn is sampled anew.

        Args:
            model: the student's ``ScoringModel``.
            prompts: B rows.
            settings: see ``SamplingSettings``; ``max_new_tokens`` bounds all turns and answers of a row together.
        """
        return None

    @abstractmethod
    def sample(self, model: Any, prompts: PromptBatch, settings: SamplingSettings) -> Rollout:
        """One response a row.

        Args:
            model: the student's ``ScoringModel``.
            prompts: B left-padded prompts on the model's device.
            settings: see ``SamplingSettings``.
        Returns:
            a rollout of B rows, T <= max_new_tokens.
        """


def engine_options(model: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the engine in a config's ``model``: of the innermost sampler, which draws the tokens."""
    given: Any = model.get("sampler")
    found: Any = {}
    while isinstance(given, Mapping):
        found = given.get("init_args") or {}
        given = next((found[name] for name in _INSIDE if found.get(name)), None)
    return dict(found)


def finish(
    prompts: PromptBatch,
    ids: Tensor,
    logprobs: Tensor,
    settings: SamplingSettings,
    *,
    engine: str,
    lengths: Tensor | None = None,
) -> Rollout:
    """The record of sampled columns: lengths from the first stop id, masks from lengths, finish reasons.

    Args:
        prompts: B rows.
        ids: int64 [B, T]; what stands after a row's first stop id is ignored.
        logprobs: [B, T] nats under the sampled distribution.
        settings: what was asked for.
        engine: recorded as provenance.
        lengths: int64 [B], columns that were written; None where all were, up to the first stop id.
    """
    slots = ids.shape[1]
    columns = torch.arange(slots, device=ids.device)
    written = torch.ones_like(ids, dtype=torch.bool) if lengths is None else columns < lengths.unsqueeze(-1)
    # the padding may be a stop id
    stops = torch.isin(ids, torch.tensor(settings.stop_ids, dtype=ids.dtype, device=ids.device)) & written
    first = torch.where(stops.any(-1), stops.int().argmax(-1), slots)
    mask = written & (columns <= first.unsqueeze(-1))
    cut = FinishReason.BUDGET if settings.budgeted else FinishReason.LENGTH
    reason = torch.where(first < slots, int(FinishReason.STOP), int(cut)).to(torch.int8)
    return Rollout(
        prompts=prompts,
        response_ids=torch.where(mask, ids, settings.pad_id),
        mask=mask,
        sampler_logprobs=logprobs,
        finish_reason=reason,
        provenance=settings.provenance(engine),
    )


def require_room(model: Any, prompts: PromptBatch, settings: SamplingSettings) -> None:
    """An InputError unless prompts and responses fit into the model's context window."""
    window = getattr(model.causal_lm.config, "max_position_embeddings", None)
    longest = int(prompts.ids.shape[1])
    if window is not None and longest + settings.max_new_tokens > window:
        raise InputError(
            f"`model.sampler.max_new_tokens` must leave room in the context window of {window} tokens: prompts of {longest} "
            f"and responses of {settings.max_new_tokens} need {longest + settings.max_new_tokens}; lower it or "
            "`data.max_prompt_tokens`"
        )


@contextmanager
def cached_casts(device: torch.device) -> Iterator[None]:
    """Under autocast, cast each weight once for the whole rollout: Lightning's context casts them at every use.

    The copies are dropped afterwards, before any weight changes.
    """
    if autocast_dtype(device) is None:
        yield
        return
    try:
        with casts_kept(device, True):
            yield
    finally:
        torch.clear_autocast_cache()


def casts_kept(device: torch.device, kept: bool) -> AbstractContextManager[Any]:
    """Under autocast, whether it keeps what it casts from now on; nothing without it."""
    dtype = autocast_dtype(device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype, cache_enabled=kept)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on a device; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
