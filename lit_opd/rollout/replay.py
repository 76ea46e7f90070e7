"""Training on responses that were not sampled now, all of them or a share of each batch."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy
import torch
from torch import Tensor

from lit_opd.distributed import gather_rows, is_rank_zero
from lit_opd.errors import InputError, require
from lit_opd.rollout.around import SamplerAround
from lit_opd.rollout.base import Sampler, SamplingSettings, TextFacts
from lit_opd.rollout.decoding.sampler import DecodeSampler
from lit_opd.rollout.saved_responses import SavedResponse, read_responses
from lit_opd.streams import row_key, row_uniforms, stable_hash, stream_seed
from lit_opd.types import FinishReason, PromptBatch, Replayed, Rollout

WhereUnknown = Literal["refuse", "as_student"]
WhereMissing = Literal["error", "sample"]
CHOICE, ROUNDING, ANSWER = (stream_seed(*b"Replay", number) for number in range(3))  # domains of random numbers
MOST_SAMPLES = 256  # of a prompt, that are looked for by their keys


class ReplaySampler(SamplerAround):
    """Answers a share of a training batch with saved responses of the same prompts; the rest is sampled now.

    A response is found by the row id of its prompt. Of several to one prompt a visit begins with one drawn at random and goes
    on with those after it, so samples of a prompt differ as long as there are others. Which rows are sampled now is drawn
    too: of a batch of B rows over all ranks, ``on_policy_fraction`` * B, rounded up or down at random so that the share holds
    on average. Both depend on the seed, the step and the row alone: a resumed run and another number of ranks draw the
    same. Validation, evaluation and prediction never read what is saved.

    Files are rollouts of ``RolloutSamples.save_rollouts_every`` (their sampler's log-probs and weights version are used),
    ``predictions.jsonl`` of the command ``predict``, or lines of texts with the row's id. A text ends with the end token,
    unless its ``finish_reason`` is another than "stop". A response above ``max_new_tokens`` is cut there. A line's ``prompt``
    must hold the last user turn of the prompt with its row id, since ids of other rows may be the same; templates may differ.

    Where the sampler's log-probs are known, ``PolicyLoss.importance_cap`` corrects for it token by token. Prefixes stay those
    of the old policy, and the cap bounds the correction: both bias the gradient, the more the older the rows are. Where
    they are not known nothing can be corrected, see ``unknown_sampler``.

    Args:
        paths: files or folders of rollouts.
        fresh: what samples the other rows, default ``DecodeSampler()``; its settings are those of the run.
        on_policy_fraction: in [0, 1], share of rows that are sampled now; 1 makes sense with ``model.warmup`` only.
        unknown_sampler: what a policy gradient does with a response whose sampler is not known: "refuse", or "as_student",
            which gives it the importance weight 1 as if the student had written it (biased). A divergence and a likelihood
            take the prefixes as they are and need no weight.
        missing: a prompt without a saved response is an "error", or is sampled now ("sample") beyond the share.
        response_column: of the text, in lines.
        id_column: of the row's id, in lines; None: "id" or "row_id", else "FILE STEM-ROW".
    Raises:
        InputError: a value outside its range.
    """

    reads_texts = True

    def __init__(
        self,
        paths: str | list[str],
        fresh: Sampler | None = None,
        on_policy_fraction: float = 0.0,
        unknown_sampler: WhereUnknown = "refuse",
        missing: WhereMissing = "error",
        response_column: str = "response",
        id_column: str | None = None,
    ) -> None:
        self.fresh = fresh if fresh is not None else DecodeSampler()
        own = self.fresh
        super().__init__(own)
        self.paths = [paths] if isinstance(paths, str) else list(paths)
        name = type(self).__name__
        require(bool(self.paths) and all(self.paths), f"{name}.paths", "at least one file or folder", paths)
        remedy = "neither replays nor environments stand inside one another"
        require(own.engine is own, f"{name}.fresh", "a sampler that draws tokens itself", type(own).__name__, remedy)
        require(not own.ahead, f"{name}.fresh.ahead", "0: part of a batch cannot be sampled ahead", own.ahead)
        require(0 <= on_policy_fraction <= 1, f"{name}.on_policy_fraction", "in [0, 1]", on_policy_fraction)
        require(
            unknown_sampler in get_args(WhereUnknown),
            f"{name}.unknown_sampler",
            "refuse or as_student",
            unknown_sampler,
        )
        require(missing in get_args(WhereMissing), f"{name}.missing", "error or sample", missing)
        self.on_policy_fraction, self.unknown_sampler, self.missing = on_policy_fraction, unknown_sampler, missing
        self.response_column, self.id_column = response_column, id_column
        self._saved: dict[str, list[SavedResponse]] | None = None

    # -- what is saved -----------------------------------------------------------------------------------------------

    def know_texts(self, facts: TextFacts) -> None:
        """Read the files once, and see that they answer the data's prompts."""
        if self._saved is None:
            options = {"response_column": self.response_column, "id_column": self.id_column}
            found, empty = read_responses(self.paths, facts, **options)  # type: ignore[arg-type]
            saved: dict[str, list[SavedResponse]] = {}
            for response in found:
                saved.setdefault(response.row_id, []).append(response)
            self._saved = saved
            self._report(facts, empty)
        if facts.prompts is not None:
            self._require_prompts(facts.prompts)

    @property
    def saved(self) -> Mapping[str, Sequence[SavedResponse]]:
        """By row id, once they are read."""
        if self._saved is None:
            raise InputError("`ReplaySampler` must have read its files before it samples: call `know_texts`")
        return self._saved

    @property
    def knows_sampler(self) -> bool:
        """Whether the sampler's log-probs of every response are known."""
        return all(response.logprobs is not None for rows in self.saved.values() for response in rows)

    def lacking(self, prompts: Mapping[str, Any]) -> list[str]:
        """Ids of prompts without a saved response."""
        return [row_id for row_id in prompts if row_id not in self.saved]

    def revision(self) -> str | None:
        """SHA-256 of the responses: ids of row and tokens, and log-probs; None before they are read."""
        if self._saved is None:
            return None
        digest = hashlib.sha256()
        for row_id, rows in self._saved.items():
            for row in rows:
                digest.update(f"{row_id}\0{row.finish_reason}\0{len(row.ids)}\0".encode())
                digest.update(row.ids.tobytes() + (b"" if row.logprobs is None else row.logprobs.tobytes()))
        return digest.hexdigest()

    def _report(self, facts: TextFacts, empty: int) -> None:
        """What is left out, cut or not used, in one warning."""
        prompts, rows = facts.prompts, [row for own in self.saved.values() for row in own]
        cut = sum(len(row.ids) > self.max_new_tokens for row in rows)
        unused = [] if prompts is None else [row for row in rows if row.row_id not in prompts]
        few = 0 if prompts is None else sum(len(own) < facts.samples for own in self.saved.values())
        said = [
            f"{empty} rows without a token to train on are left out" if empty else "",
            f"{cut} are longer than max_new_tokens {self.max_new_tokens} and are cut there" if cut else "",
            f"{len(unused)} answer no prompt of the data and are not used (first: {unused[0].where})" if unused else "",
            f"{few} prompts have fewer than samples_per_prompt {facts.samples}, which repeats them in a batch"
            if few
            else "",
        ]
        if any(said) and is_rank_zero():
            text = "; ".join(filter(None, said))
            warnings.warn(f"`ReplaySampler.paths`: of {len(rows)} responses, {text}", stacklevel=2)

    def _require_prompts(self, prompts: Mapping[str, Tensor]) -> None:
        lacking = self.lacking(prompts)
        if len(lacking) == len(prompts):
            raise InputError(
                f"`ReplaySampler.paths` must answer prompts of the data by their row ids, got such as "
                f"{next(iter(self.saved))!r} for prompts such as {next(iter(prompts))!r}; name the `id_column`"
            )
        if lacking and self.missing == "error":
            raise InputError(
                f"`ReplaySampler.paths` must hold a response to every prompt, got none to {len(lacking)} of {len(prompts)} "
                f"(first: {lacking[0]!r}); leave those out of the data, or set `missing: sample` to sample them now"
            )
        for row_id in prompts.keys() & self.saved.keys():
            for response in self.saved[row_id]:
                _require_same_prompt(response, prompts[row_id].numpy())

    # -- a batch -----------------------------------------------------------------------------------------------------

    def sample(self, model: Any, prompts: PromptBatch, settings: SamplingSettings) -> Rollout:
        """One response a row; ``Rollout.replayed`` says which were not sampled now."""
        if settings.replay == "none":
            return _as_replay(self.fresh.sample(model, prompts, settings))
        now, count = self._sampled_now(prompts, settings)
        fresh = now.nonzero().squeeze(-1).tolist()
        old = (~now).nonzero().squeeze(-1).tolist()
        parts = [self._read(prompts.rows(torch.tensor(old)), settings)] if old else []
        if count:  # some rank samples: engines may talk to each other, so every rank does
            asked = prompts.rows(torch.tensor(fresh or [0]))
            sampled = self.fresh.sample(model, asked, replace(settings, replay="none"))
            parts = [_as_replay(sampled), *parts] if fresh else parts
        origin = parts[0].provenance
        whole = Rollout.joined([replace(part, provenance=origin) for part in parts])
        place = torch.tensor([*fresh, *old]).argsort()
        return replace(whole.rows(place), prompts=prompts)

    def _sampled_now(self, prompts: PromptBatch, settings: SamplingSettings) -> tuple[Tensor, int]:
        """bool [B] on the host, True for rows that are sampled now, and how many there are over all ranks."""
        share = 0.0 if settings.replay == "all" else self.on_policy_fraction
        draws = row_uniforms(settings.seed, prompts.row_keys.cpu(), settings.step, 1, domain=CHOICE).squeeze(-1)
        lacking = torch.tensor([row_id not in self.saved for row_id in prompts.row_ids])
        if bool(lacking.any()) and (settings.replay == "all" or self.missing == "error"):
            raise self._nothing_saved(prompts.row_ids[int(lacking.nonzero()[0])])
        draws[lacking] = -1.0
        device = prompts.ids.device
        ordered = gather_rows(draws.to(device)).cpu().sort().values
        zero = torch.zeros(1, dtype=torch.int64)
        above = float(row_uniforms(settings.seed, zero, settings.step, 1, domain=ROUNDING))
        count = max(math.floor(share * len(ordered) + above), int((ordered < 0).sum()))
        if count == 0:
            return torch.zeros_like(lacking), 0
        return draws <= ordered[min(count, len(ordered)) - 1], count

    def _nothing_saved(self, row_id: str) -> InputError:
        return InputError(f"`ReplaySampler.paths` must hold a response to row {row_id!r} of the data, got none")

    def _read(self, prompts: PromptBatch, settings: SamplingSettings) -> Rollout:
        """Saved responses to all rows."""
        rows = self._chosen(prompts, settings)
        for row, (own, mask) in zip(rows, zip(prompts.ids.cpu(), prompts.mask.cpu(), strict=True), strict=True):
            _require_same_prompt(row, own[mask].numpy())
        lengths = [min(len(row.ids), settings.max_new_tokens) for row in rows]
        shape = len(rows), max(lengths)
        mask = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(-1)
        ids = torch.full(shape, settings.pad_id)
        logprobs = torch.zeros(shape)
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids[place, :length] = torch.from_numpy(row.ids[:length])
            if row.logprobs is not None:
                logprobs[place, :length] = torch.from_numpy(row.logprobs[:length])
        cut = FinishReason.BUDGET if settings.budgeted else FinishReason.LENGTH
        ends = [row.finish_reason if len(row.ids) <= settings.max_new_tokens else int(cut) for row in rows]
        device = prompts.ids.device
        return Rollout(
            prompts=prompts,
            response_ids=ids.to(device),
            mask=mask.to(device),
            sampler_logprobs=logprobs.to(device),
            finish_reason=torch.tensor(ends, dtype=torch.int8, device=device),
            provenance=settings.provenance("replay"),
            drawn=torch.zeros(len(rows), dtype=torch.int64, device=device),
            replayed=Replayed(
                torch.ones(len(rows), dtype=torch.bool),
                torch.tensor([row.logprobs is not None for row in rows]),
                torch.tensor([row.weights_version for row in rows]),
            ).to(device),
        )

    def _chosen(self, prompts: PromptBatch, settings: SamplingSettings) -> list[SavedResponse]:
        """One of the saved responses to each row."""
        names = torch.tensor([stable_hash(row_id) for row_id in prompts.row_ids])
        starts = row_uniforms(settings.seed, names, settings.step, 1, domain=ANSWER).squeeze(-1).tolist()
        found = []
        for row_id, key, start in zip(prompts.row_ids, prompts.row_keys.tolist(), starts, strict=True):
            rows = self.saved[row_id]
            found.append(rows[(int(start * len(rows)) + _sample_number(row_id, key)) % len(rows)])
        return found


@lru_cache(maxsize=2**16)
def _sample_number(row_id: str, key: int) -> int:
    """Which sample of its prompt a row is, as its key says; of another kind of key the key itself."""
    return next((sample for sample in range(MOST_SAMPLES) if row_key(row_id, sample) == key), key)


def _as_replay(sampled: Rollout) -> Rollout:
    """Rows that were sampled now, with the fields that saved ones have."""
    rows = torch.zeros(len(sampled), dtype=torch.bool, device=sampled.mask.device)
    version = torch.full_like(sampled.num_drawn, sampled.provenance.weights_version)
    return replace(sampled, drawn=sampled.num_drawn, replayed=Replayed(rows, ~rows, version))


def _require_same_prompt(response: SavedResponse, prompt: Any) -> None:
    if response.prompt is None or numpy.array_equal(response.prompt, prompt):
        return
    raise InputError(
        f"{response.where}: the response to {response.row_id!r} must be to the data's prompt, got one to another prompt of "
        f"{len(response.prompt)} tokens (the data's has {len(prompt)}); data, template or tokenizer were others"
    )
