"""Sampling from vLLM servers that hold a copy of the student."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from lit_opd.distributed import gather_objects, shared_failure
from lit_opd.errors import InputError, ServerError, require
from lit_opd.rollout.ahead import Ahead, Row, collected, from_state, to_state
from lit_opd.rollout.base import Sampler, SamplingSettings, Seconds, finish
from lit_opd.rollout.sync import WeightSync
from lit_opd.rollout.weights import StudentWeights
from lit_opd.servers.client import Malformed, Servers, checked_logprob
from lit_opd.streams import stream_seed
from lit_opd.types import PromptBatch, Rollout

ENGINE = "vllm"
STARTED_WITH = 0  # version of the student the run starts from
LEAST_BIAS = -100.0  # nats, the least that servers take as a bias of a logit
LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]
_TRIES = 3  # samplings of one batch whose servers went away


class VLLMSampler(Sampler):
    """Samples from servers that speak vLLM's ``/v1/completions`` with token-id prompts; one request a row, each with a seed
    of its own, so that a row's tokens do not depend on the others (as far as the server's arithmetic does not).

    Keep ``PolicyLoss.importance_cap``: server and trainer never compute exactly the same log-probs.

    Args:
        urls: addresses such as http://host:8000; several share the load.
        model: the name the servers must serve; None takes the only one they serve.
        sync: how new weights reach the servers before the first batch and after every update; None never pushes, and the
            servers go on sampling from the student they started with (recorded as weights version 0); evaluating a checkpoint
            is then refused.
        max_logprob_gap: nats; an update whose mean |student - sampler log-prob| is larger is an error. None compares the first
            step alone: a warning above what half precision explains, an error above ten times that.
        logprobs_mode: what the servers were started with (``--logprobs-mode``). Raw log-probs are those of the sampled
            distribution only at temperature 1, top_p 1 and top_k 0: anything else needs processed ones.
        max_concurrency: requests in flight at once, all servers together.
        timeout: seconds a request may take as a whole.
        retry_seconds: how long a failing request is tried again, with growing pauses.
        start_seconds: the same before the run, for a server that is not up yet.
        max_response_bytes: longest answer that is read.
        api_key_env: environment variable with the servers' key, None for none.
        ahead: 1 samples each batch while the one before it trains, so by weights that are one batch older (recorded as the
            rollout's weights version); 0 samples a batch when it is trained on.
        max_new_tokens: response slots, >= 1.
        temperature: > 0; scoring divides the logits by the same value.
        top_p: nucleus mass in (0, 1].
        top_k: candidates, 0 for all.
        stop_token_ids: ids that end a response, default those of the model's generation config and tokenizer.
    Raises:
        InputError: a value outside its range, or log-probs that would not be those of the sampled distribution.
    """

    in_process = False
    continues = heeds_room = True
    seconds: Seconds

    def __init__(
        self,
        urls: list[str],
        model: str | None = None,
        sync: WeightSync | None = None,
        max_logprob_gap: float | None = 0.5,
        logprobs_mode: LogprobsMode = "raw_logprobs",
        max_concurrency: int = 256,
        timeout: float = 1800.0,
        retry_seconds: float = 300.0,
        start_seconds: float = 30.0,
        max_response_bytes: int = 64 * 2**20,
        api_key_env: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop_token_ids: list[int] | None = None,
        ahead: int = 0,
    ) -> None:
        super().__init__(max_new_tokens, temperature, top_p, top_k, stop_token_ids)
        self.max_logprob_gap, self.logprobs_mode, self.sync = max_logprob_gap, logprobs_mode, sync
        name = type(self).__name__
        require(
            max_logprob_gap is None or max_logprob_gap > 0, f"{name}.max_logprob_gap", "> 0 or null", max_logprob_gap
        )
        if logprobs_mode == "raw_logprobs" and not _plain(temperature, top_p, top_k):
            raise InputError(
                f"`VLLMSampler.logprobs_mode` must be processed_logprobs when temperature {temperature}, top_p {top_p}, top_k "
                f"{top_k} are not 1, 1, 0, got {logprobs_mode}; start the servers with --logprobs-mode processed_logprobs"
            )
        self.servers = Servers(
            urls,
            model=model,
            field="model.sampler",
            max_concurrency=max_concurrency,
            timeout=timeout,
            retry_seconds=retry_seconds,
            start_seconds=start_seconds,
            max_response_bytes=max_response_bytes,
            api_key_env=api_key_env,
        )
        # weights the servers have; None until a run has pushed its own
        self._version = STARTED_WITH if sync is None else None
        self._student: StudentWeights | None = None
        self._told_stale = False
        require(ahead in (0, 1) and not isinstance(ahead, bool), f"{name}.ahead", "0 or 1 batches", ahead)
        self.ahead = ahead
        self._ahead: Ahead | None = None
        self.seconds = Seconds("weights")

    def check(self, *, tokens: int | None, vocabulary: int) -> None:
        """Every server answers, serves the model, holds ``tokens``, and samples a token after the vocabulary's last one with
        ids and log-probs in its answer."""
        self.servers.check(tokens=tokens)
        prompt = [vocabulary - 1]
        asked = SamplingSettings(max_new_tokens=1, stop_ids=(), pad_id=0, vocabulary=vocabulary)
        body = _request(asked) | {"prompt": [prompt], "seed": 0}
        self.servers.probe(body, lambda choices: sampled_tokens(choices[0], prompt, asked))
        if self.sync is not None:
            self.sync.check(self.servers)

    def make_room(self, tokens: int, *, field: str) -> None:
        """See ``Sampler.make_room``; the servers' context is asked for where ``check`` was not called yet."""
        with shared_failure():
            if self.servers.window is None:
                self.servers.check(tokens=None)
            window = self.servers.window
            if window is not None and window < tokens:
                raise InputError(
                    f"`{field}` must leave room in the servers' context of {window} tokens, got rows of up to {tokens}; lower "
                    f"it, or start them with --max-model-len {tokens}"
                )

    def check_student(self, adapter_rank: int | None) -> None:
        """The servers can take its weights."""
        if self.sync is not None:
            self.sync.check_student(adapter_rank)

    def prepare(self, student: StudentWeights, weights_version: int) -> None:
        """Push the student's weights unless the servers have them; called on every rank."""
        if self._version == weights_version:
            return
        if self.sync is None:
            self._say_stale()
            return
        if self._ahead is not None:
            self._ahead.wait()  # weights that change under a request would give a row two versions
            gather_objects([])  # nor under another rank's: not every way of the weights waits for all ranks
        self._student, self._version = student, None  # of no version until they arrived
        with self.seconds("weights"):
            self.sync.write(student)
            self._push()
        self._version = weights_version

    def forget_weights(self) -> None:
        """See ``Sampler.forget_weights``; without ``sync`` the servers have what they started with."""
        if self.sync is not None:
            self._version = None

    def check_loaded(self) -> None:
        """See ``Sampler.check_loaded``."""
        if self.sync is None:
            raise InputError(
                "`model.sampler.sync` must be set where a checkpoint is evaluated (--ckpt_path), got null: the servers would "
                "answer with the weights they started with; set it, or export the checkpoint, start the servers with that "
                "folder, and give it as model.student.path without --ckpt_path"
            )

    def _say_stale(self) -> None:
        """Once a sampler: it holds for every batch after the first update."""
        if not self._told_stale:
            self._told_stale = True
            warnings.warn(
                "`model.sampler.sync` is null: from the first update on the servers sample from the weights they started "
                f"with, recorded as version {STARTED_WITH} on every rollout; set it to train on-policy",
                stacklevel=3,
            )

    def _push(self) -> None:
        """Bring the student's weights to the servers; a failure of one rank is every rank's."""
        assert self.sync is not None and self._student is not None
        with shared_failure():
            self.sync.bring(self._student, self.servers)

    def begin(self, prompts: PromptBatch, settings: SamplingSettings) -> None:
        """See ``Sampler.begin``; requests go out from a thread of their own."""
        if self.servers.model is None:
            self.servers.check(tokens=None)
        version = settings.weights_version if self._version is None else self._version
        lost, keys = self.servers.num_lost, tuple(prompts.row_keys.tolist())
        rows = self.servers.completing(*self._requests(prompts, settings))
        self._ahead = Ahead(keys, settings, version, rows, lost=lost)

    def forget_ahead(self) -> None:
        """See ``Sampler.forget_ahead``."""
        if self._ahead is not None:
            self._ahead.drop()
            self._ahead = None

    def ahead_state(self) -> dict[str, Any] | None:
        """See ``Sampler.ahead_state``."""
        return None if self._ahead is None else to_state(self._ahead, lost=self.servers.num_lost)

    def restore_ahead(self, state: Mapping[str, Any] | None, settings: SamplingSettings) -> None:
        """See ``Sampler.restore_ahead``."""
        self._ahead = from_state(state, settings) if state is not None and self.ahead else None

    def _begun(self, prompts: PromptBatch, settings: SamplingSettings) -> Rollout | None:
        """The responses to a batch that was begun, taken once; called on every rank."""
        ahead = self._ahead
        if ahead is None or ahead.settings.domain != settings.domain:
            return None
        self._ahead = None
        rows = collected(ahead, prompts.row_keys.tolist(), lost=self.servers.num_lost)
        return None if rows is None else self._rollout(prompts, rows, ahead.settings, version=ahead.version)

    @torch.no_grad()
    def sample(self, model: Any, prompts: PromptBatch, settings: SamplingSettings) -> Rollout:
        """One response a row, [B, T <= max_new_tokens]; see ``Sampler.sample``. ``model`` is not read.

        The log-probs are NaN where they are not known: an evaluation at another temperature, top-p or top-k on servers
        that give raw ones.

        Raises:
            ServerError: the servers failed for good.
        """
        self._refuse_stop(settings)
        if self.servers.model is None:
            self.servers.check(tokens=None)
        begun = self._begun(prompts, settings)
        if begun is not None:
            return begun
        for _ in range(_TRIES):
            lost = self.servers.num_lost
            try:
                with shared_failure():
                    rows = self._sampled(prompts, settings)
            except ServerError:  # on every rank
                if self.sync is None or self.sync.answers_without or not self._lost_since(lost):
                    raise
            else:  # on every rank: that its own rows arrived says nothing of the others'
                if self.sync is None or not self._lost_since(lost):
                    return self._rollout(prompts, rows, settings)
            with self.seconds("weights"):
                self._push()  # a server that went away may be back with the weights it starts with
        with shared_failure():
            raise self.servers.error(f"went away in each of {_TRIES} samplings of one batch")

    def _lost_since(self, count: int) -> bool:
        """Whether any rank lost a server since it had lost ``count``; called on every rank."""
        return any(gather_objects([self.servers.num_lost > count]))

    def _sampled(self, prompts: PromptBatch, settings: SamplingSettings) -> list[Row]:
        return self.servers.complete(*self._requests(prompts, settings))

    def _requests(
        self, prompts: PromptBatch, settings: SamplingSettings
    ) -> tuple[list[dict[str, Any]], Callable[[list[dict[str, Any]], int], Row]]:
        """A body a row, and what reads its answer."""
        texts, common, rooms = row_texts(prompts), _request(settings), settings.rooms(len(prompts))

        def parse(choices: list[dict[str, Any]], index: int) -> tuple[list[int], list[float]]:
            return sampled_tokens(choices[0], texts[index], replace(settings, max_new_tokens=rooms[index]))

        rows = zip(texts, row_seeds(prompts, settings), rooms, strict=True)
        return [common | {"prompt": [text], "seed": seed, "max_tokens": room} for text, seed, room in rows], parse

    def _rollout(
        self, prompts: PromptBatch, rows: list[Row], settings: SamplingSettings, *, version: int | None = None
    ) -> Rollout:
        """The record of ``rows``; ``version`` of the weights that sampled, default those that the servers have."""
        known = settings.greedy or self.logprobs_mode == "processed_logprobs"
        if not known and not _plain(settings.temperature, settings.top_p, settings.top_k):
            rows = [(tokens, [math.nan] * len(values)) for tokens, values in rows]
        if version is None:
            version = settings.weights_version if self._version is None else self._version
        return as_rollout(prompts, rows, settings, version=version)


def row_texts(prompts: PromptBatch) -> list[list[int]]:
    """Prompt ids of every row, without padding."""
    ids, mask = prompts.ids.cpu(), prompts.mask.cpu()
    return [row[valid].tolist() for row, valid in zip(ids, mask, strict=True)]


def row_seeds(prompts: PromptBatch, settings: SamplingSettings) -> list[int]:
    """A seed a row, from (seed, step, domain, row key); of one that goes on from its own step and its tokens too."""
    keys = prompts.row_keys.tolist()
    begun = settings.begun or [(settings.step, 0)] * len(keys)
    return [
        stream_seed(settings.seed, step, settings.domain, key, *([drawn] if drawn else []))
        for key, (step, drawn) in zip(keys, begun, strict=True)
    ]


def as_rollout(
    prompts: PromptBatch, rows: list[tuple[list[int], list[float]]], settings: SamplingSettings, *, version: int
) -> Rollout:
    """The record of sampled rows.

    Args:
        prompts: B rows.
        rows: token ids and log-probs (nats) of every row.
        settings: what was asked for.
        version: of the weights that sampled.
    """
    columns = max(len(tokens) for tokens, _ in rows)
    ids = torch.full((len(rows), columns), settings.pad_id, dtype=torch.int64)
    logprobs = torch.zeros(len(rows), columns, dtype=torch.float32)
    for row, (tokens, values) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        logprobs[row, : len(values)] = torch.tensor(values)
    device = prompts.ids.device
    settings = replace(settings, weights_version=version)
    lengths = torch.tensor([len(tokens) for tokens, _ in rows], device=device)
    return finish(prompts, ids.to(device), logprobs.to(device), settings, engine=ENGINE, lengths=lengths)


def _plain(temperature: float, top_p: float, top_k: int) -> bool:
    return temperature == 1.0 and top_p == 1.0 and top_k == 0


def _request(settings: SamplingSettings) -> dict[str, Any]:
    """What all rows ask for; our stop ids only, whatever the server's model names as its own."""
    return {
        "max_tokens": settings.max_new_tokens,
        "temperature": 0.0 if settings.greedy else settings.temperature,
        "top_p": 1.0 if settings.greedy else settings.top_p,
        "top_k": 0 if settings.greedy else settings.top_k,
        "stop_token_ids": list(settings.stop_ids),
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        **only_tokens(settings),
    }


def only_tokens(settings: SamplingSettings) -> dict[str, Any]:
    """What keeps vLLM from sampling embedding rows that name no token: the shorter of two lists; nothing where all do.

    Processed log-probs are those of the distribution that remains. Raw ones still count the mass of those rows.
    """
    unused = settings.unused_ids
    if not unused:
        return {}
    tokens = set(range(settings.vocabulary)) - set(unused)
    if len(tokens) < len(unused):
        return {"allowed_token_ids": sorted(tokens)}
    return {"logit_bias": {str(token): LEAST_BIAS for token in unused}}


def sampled_tokens(
    choice: dict[str, Any], prompt: list[int], settings: SamplingSettings
) -> tuple[list[int], list[float]]:
    """Token ids and log-probs (nats) of one choice.

    Args:
        choice: with "token_ids", "logprobs" and "prompt_token_ids".
        prompt: token ids that were sent.
        settings: what was asked for.
    Raises:
        Malformed: something is missing, of another length, or of another prompt.
    """
    tokens, found = choice.get("token_ids"), choice.get("logprobs")
    values = found.get("token_logprobs") if isinstance(found, dict) else None
    if not isinstance(tokens, list) or not isinstance(values, list):
        raise Malformed("has no token_ids or no log-probs of sampled tokens; vLLM 0.10.2 or later gives both")
    if choice.get("prompt_token_ids", prompt) not in (prompt, None):
        raise Malformed("is of another prompt")
    if len(values) != len(tokens) or not 1 <= len(tokens) <= settings.max_new_tokens:
        raise Malformed(
            f"has {len(tokens)} tokens and {len(values)} log-probs, 1 to {settings.max_new_tokens} were asked for"
        )
    if not all(type(token) is int and 0 <= token < settings.vocabulary for token in tokens):
        raise Malformed(f"has token ids outside [0, {settings.vocabulary}), which student and teacher share")
    if unused := sorted(set(tokens).intersection(settings.unused_ids)):
        raise Malformed(f"has token ids that the tokenizer does not have, {unused}; does the server heed logit_bias?")
    stopped = tokens[-1] in settings.stop_ids
    if any(token in settings.stop_ids for token in tokens[:-1]) or not (
        stopped or len(tokens) == settings.max_new_tokens
    ):
        raise Malformed(f"does not end at its first stop id or after {settings.max_new_tokens} tokens")
    return tokens, [checked_logprob(value, f"at position {at}") for at, value in enumerate(values)]
