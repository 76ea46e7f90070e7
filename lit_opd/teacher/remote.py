"""A teacher behind vLLM servers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_opd.errors import InputError, require
from lit_opd.models.loading import load_config, load_tokenizer
from lit_opd.scoring.listed import Listed
from lit_opd.scoring.model import ScoringModel
from lit_opd.scoring.stops import StopClass
from lit_opd.servers.client import Servers
from lit_opd.teacher.answers import answer_bytes, asked_logprobs, response_entries, sampled_logprobs, top_lists
from lit_opd.teacher.base import StopMass, Teacher
from lit_opd.types import Rollout, TokenScores, TopK

STOP_SHARE = 1e-4  # of the mass of stop tokens that may be left out
Bound = Literal["lower", "upper"]


class RemoteTeacher(Teacher):
    """Log-probs from servers that speak vLLM's ``/v1/completions`` with token-id prompts and ``prompt_logprobs``.

    Prompt and response go out as one prompt of token ids; the answer holds the log-prob of each, and with ``top_k`` those of
    the K likeliest tokens at each place. With that, ``Divergence`` works by a bucket for the rest (``top_k`` of its own, at
    most K), and what reads the teacher's top-k list. Servers score at temperature 1 only, and give neither exact entropies
    nor a divergence over the full vocabulary. Their softmax runs over every row of the teacher's embedding, padding rows
    included.

    Where all servers are vLLM with its route of token ids (``--enable-scale-out``) and its second model runner, a divergence
    over the student's likeliest tokens asks for just those, in binary.

    Args:
        urls: addresses such as http://host:8000; several share the load.
        tokenizer_path: folder or hub id with the teacher's config and tokenizer; weights are not read.
        model: the name the servers must serve; None takes the only one they serve.
        max_concurrency: requests in flight at once, all servers together.
        rows_per_request: responses a request carries.
        timeout: seconds a request may take as a whole.
        retry_seconds: how long a failing request is tried again, with growing pauses.
        start_seconds: the same before the run, for a server that is not up yet.
        max_response_bytes: longest answer that is read; a token takes about 80 bytes, times K + 1 with ``top_k``.
        api_key_env: environment variable with the servers' key, None for none.
        pad_token: the tokenizer's pad token where it has none of its own.
        trust_remote_code: run the tokenizer's own Python code; off unless you trust its author.
        top_k: K, at most what the servers were started with (``--max-logprobs``); None for sampled tokens only.
        entropy_bound: what stands for the teacher's entropy: "lower", the listed tokens and the rest as one token, or "upper",
            the rest spread evenly; needs ``top_k``. None for none.
        stop_mass: as for ``LocalTeacher``. With "sum" stop tokens that the list at the end of a response does not hold, and that
            may matter by 1e-4 nats, are asked for by further prompts, each a response with another end.
    Raises:
        InputError: a value outside its range.
    """

    def __init__(
        self,
        urls: list[str],
        tokenizer_path: str,
        model: str | None = None,
        max_concurrency: int = 32,
        rows_per_request: int = 4,
        timeout: float = 600.0,
        retry_seconds: float = 300.0,
        start_seconds: float = 30.0,
        max_response_bytes: int = 64 * 2**20,
        api_key_env: str | None = None,
        pad_token: str | None = None,
        trust_remote_code: bool = False,
        top_k: int | None = None,
        entropy_bound: Bound | None = None,
        stop_mass: StopMass = "own",
    ) -> None:
        super().__init__()
        if rows_per_request < 1:
            raise InputError(f"`RemoteTeacher.rows_per_request` must be >= 1, got {rows_per_request}")
        is_count = isinstance(top_k, int) and not isinstance(top_k, bool) and top_k >= 1
        require(top_k is None or is_count, "RemoteTeacher.top_k", "an integer >= 1 or null", top_k)
        bounds = (None, *get_args(Bound))
        require(entropy_bound in bounds, "RemoteTeacher.entropy_bound", "lower, upper or null", entropy_bound)
        told = top_k is not None or entropy_bound is None
        require(told, "RemoteTeacher.entropy_bound", "null unless top_k is set", entropy_bound)
        require(stop_mass in get_args(StopMass), "RemoteTeacher.stop_mass", "own or sum", stop_mass)
        self.stop_mass = stop_mass
        self.urls, self.tokenizer_path, self.model = list(urls), tokenizer_path, model
        self.rows_per_request, self.top_k, self.entropy_bound = rows_per_request, top_k, entropy_bound
        self.pad_token, self.trust_remote_code = pad_token, trust_remote_code
        self._vocabulary: int | None = None  # leading entries that count, told by ``load``
        self.servers = Servers(
            urls,
            model=model,
            field=self.field,
            max_concurrency=max_concurrency,
            timeout=timeout,
            retry_seconds=retry_seconds,
            start_seconds=start_seconds,
            max_response_bytes=max_response_bytes,
            api_key_env=api_key_env,
        )

    @property
    def provides(self) -> frozenset[str]:
        """The top-k list and the entropy's bound, where they were asked for."""
        asked = {"teacher_topk": self.top_k, "teacher_entropy": self.entropy_bound}
        return frozenset(name for name, value in asked.items() if value is not None)

    @property
    def list_size(self) -> int:
        """``top_k``."""
        return self.top_k or 0

    def tokenizers(self) -> list[Any]:
        """The teacher's tokenizer and embedding rows, from ``tokenizer_path``."""
        field, code = f"{self.field}.tokenizer_path", self.trust_remote_code
        tokenizer = load_tokenizer(self.tokenizer_path, field, pad_token=self.pad_token, trust_remote_code=code)
        return [(tokenizer, self._embedding_rows)]

    @cached_property
    def _config(self) -> Any:
        field = f"{self.field}.tokenizer_path"
        return load_config(self.tokenizer_path, field, trust_remote_code=self.trust_remote_code)

    @property
    def _embedding_rows(self) -> int:
        return int(self._config.get_text_config().vocab_size)

    # -- before a run ------------------------------------------------------------------------------------------------

    @property
    def window(self) -> int | None:
        """Of the model, or of the servers where theirs is smaller; one token is sampled after what they score."""
        model = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        servers = None if self.servers.window is None else self.servers.window - 1
        return min((window for window in (model, servers) if window is not None), default=None)

    def check(self, *, temperature: float, tokens: int | None) -> None:
        """Temperature 1; every server answers, serves the model, holds ``tokens`` and the one it must sample, scores the
        vocabulary's last token, and lists ``top_k`` tokens."""
        self._require_temperature(temperature)
        self._require_room(tokens)
        self.servers.field = self.field
        self.servers.check(tokens=None if tokens is None else tokens + 1)
        last = self._embedding_rows - 1  # a server with a smaller vocabulary refuses it
        self.servers.probe(_body([[last, last]], 0), lambda choices: _read(choices[0], [last], [last], None))
        if self.top_k is not None:
            self._check_lists(self.top_k, last)

    def _check_lists(self, k: int, last: int) -> None:
        refused = self.servers.refusal(_body([[last, last]], k), lambda choices: _read(choices[0], [last], [last], k))
        if refused is not None:
            raise InputError(
                f"`{self.field}.top_k` must be at most what the servers list (--max-logprobs), got {k}: {refused[0]}; lower it, "
                f"or start them with --max-logprobs {k}"
            )

    def _require_room(self, tokens: int | None) -> None:
        """The lists are fewer than the vocabulary, and an answer of full rows can be read."""
        if self.top_k is None:
            return
        require(
            self.top_k < self._embedding_rows,
            f"{self.field}.top_k",
            f"below the {self._embedding_rows} entries of the vocabulary",
            self.top_k,
        )
        limit = self.servers.max_response_bytes
        if tokens is None or answer_bytes(self.rows_per_request, tokens, self.top_k) <= limit:
            return
        one = answer_bytes(1, tokens, self.top_k)
        remedy = f"set it to {limit // one}" if limit >= one else f"set it to 1 and `max_response_bytes` to {one}"
        raise InputError(
            f"`{self.field}.rows_per_request` must leave an answer below `max_response_bytes`, {limit}, got "
            f"{self.rows_per_request} with rows of up to {tokens} tokens and top_k {self.top_k}, about {one} bytes each; {remedy}"
        )

    def ask_candidates(self, k: int) -> str | None:
        """A small request to every server, by the route that scores chosen ids."""
        last = self._embedding_rows - 1
        lacking: list[bool] = []

        def parse(answer: dict[str, Any]) -> None:
            lacking.append(answer.get("prompt_token_id_logprobs") is None)  # a version that does not know the field
            if not lacking[-1]:
                asked_logprobs(answer, (1, k + 1))

        refused = self.servers.refusal(_chosen_body([last, last], [list(range(k + 1))]), parse, generates=True)
        self.takes_candidates = refused is None and not any(lacking)
        if self.takes_candidates:
            return None
        why = refused[0] if refused is not None else "no prompt_token_id_logprobs in the answer"
        return (
            f"the servers of `{self.field}` do not score chosen tokens ({why}); start newer ones with --enable-scale-out and "
            f"--max-logprobs {k + 1}"
        )

    def attach(self, student: ScoringModel) -> None:
        """Take note of ids for which the student has no token."""
        self.unused_ids = student.unused

    def load(self, *, vocabulary: int) -> None:
        """Ask the servers for their model, where ``check`` has not."""
        self._vocabulary, rows = vocabulary, self._embedding_rows
        entries = vocabulary - len(self.unused_ids)
        require(
            self.list_size < entries, f"{self.field}.top_k", f"below the student's {entries} tokens", self.list_size
        )
        if rows > vocabulary:
            warnings.warn(
                f"`{self.field}`: the servers' softmax runs over all {rows} embedding rows of the teacher, while its tokenizer "
                f"has {vocabulary} ids; log-probs are lower by what lies on the other {rows - vocabulary}, next to nothing in a "
                "trained model",
                stacklevel=2,
            )
        if self.servers.model is None:
            self.servers.check(tokens=None)

    # -- scores ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self, rollout: Rollout, *, temperature: float = 1.0, requires: frozenset[str] = frozenset()
    ) -> TokenScores:
        """Log-probs, [B, T] nats, and what of ``provides`` is required; see ``Teacher.score``.

        Raises:
            ServerError: the servers failed for good.
        """
        k = self._ready(temperature, requires)
        rows, prompts, responses = _tokens(rollout)
        found = self._asked(prompts, responses, k)
        return self._merged(rollout, rows, self._summed(prompts, responses, found), requires)

    def _asked(self, prompts: list[list[int]], responses: list[list[int]], k: int | None) -> list[_Row]:
        """What the servers say of each response, with lists of ``k`` where that is not None."""
        size = self.rows_per_request
        chunks = [slice(start, start + size) for start in range(0, len(prompts), size)]

        def parse(choices: list[dict[str, Any]], index: int) -> list[_Row]:
            told = zip(choices, prompts[chunks[index]], responses[chunks[index]], strict=True)
            return [_read(choice, prompt, response, k) for choice, prompt, response in told]

        texts = _joined(prompts, responses)
        answers = self.servers.complete([_body(texts[chunk], k or 0) for chunk in chunks], parse)
        return [row for answer in answers for row in answer]

    def _summed(self, prompts: list[list[int]], responses: list[list[int]], found: list[_Row]) -> list[_Row]:
        """``found`` with the mass of all stop tokens where a response, or a turn of it, ends at one."""
        stops = self._stops
        if stops is None:
            return found
        ends = [
            (row, at)
            for row, response in enumerate(responses)
            for at, token in enumerate(response)
            if token in stops.sampled
        ]
        known = {(row, at): found[row].known(responses[row][at], stops.ids, at=at) for row, at in ends}
        asked = [(end, stop) for end in ends for stop in _missing(found[end[0]], known[end], stops.ids, at=end[1])]
        texts = [prompts[row] + responses[row][:at] for (row, at), _ in asked]
        for (end, stop), answer in zip(asked, self._asked(texts, [[stop] for _, stop in asked], None), strict=True):
            known[end][stop] = float(answer.logprobs[-1])
        for row, at in ends:
            logprobs = found[row].logprobs.copy()
            logprobs[at] = numpy.logaddexp.reduce(list(known[row, at].values()))
            found[row] = replace(found[row], logprobs=logprobs)
        return found

    @cached_property
    def _stops(self) -> StopClass | None:
        """What a stop token is scored with; None where that is its own mass."""
        if self.stop_mass == "own":
            return None
        ((tokenizer, _),) = self.tokenizers()
        return self._stop_class(self.tokenizer_path, tokenizer)

    @torch.no_grad()
    def score_candidates(
        self,
        rollout: Rollout,
        candidates: Tensor,
        *,
        temperature: float = 1.0,
        requires: frozenset[str] = frozenset(),
    ) -> TokenScores:
        """As ``score``, with log-probs of ``candidates``, int64 [B, T, K]; each row is a request.

        Raises:
            ServerError: the servers failed for good.
        """
        k = self._ready(temperature, requires)
        rows, prompts, responses = _tokens(rollout)
        ids = torch.cat([rollout.response_ids.unsqueeze(-1), candidates], -1).cpu()
        read = rollout.read.cpu()
        chosen = [ids[row, read[row]].tolist() for row in rows]

        def parse(answer: dict[str, Any], index: int) -> _Row:
            asked = asked_logprobs(answer, (len(chosen[index]), len(chosen[index][0])))
            row = _Row(asked[:, 0]) if k is None else _read(answer, prompts[index], responses[index], k)
            return replace(row, candidates=asked[:, 1:])

        bodies = [_chosen_body(*pair, k) for pair in zip(_joined(prompts, responses), chosen, strict=True)]
        found = self._summed(prompts, responses, self.servers.generate(bodies, parse))
        scores = self._merged(rollout, rows, found, requires)
        return replace(
            scores, candidates=TopK(candidates, _spread(rollout, rows, found, "candidates", candidates.shape[-1]))
        )

    def _ready(self, temperature: float, requires: frozenset[str]) -> int | None:
        """K of the lists that are read; None where none is."""
        self._require_temperature(temperature)
        if requires - self.provides:
            have = f"log-probs and {sorted(self.provides)}" if self.provides else "log-probs only"
            raise InputError(
                f"`{self.field}` RemoteTeacher must give {sorted(requires - self.provides)}, got one that gives {have}; set "
                "`top_k` for lists and `entropy_bound` for entropies, or take a LocalTeacher"
            )
        if self.servers.model is None:
            self.servers.check(tokens=None)
        return self.top_k if requires else None

    def _merged(self, rollout: Rollout, rows: list[int], found: list[_Row], requires: frozenset[str]) -> TokenScores:
        """The answers to ``rows`` in one record, what is required of it."""
        scores = TokenScores(_spread(rollout, rows, found, "logprobs"))
        if not requires:
            return scores
        ids, logprobs = (_spread(rollout, rows, found, name, self.list_size) for name in ("ids", "listed"))
        lists = self._known(TopK(ids, logprobs))
        entropy = self._entropy(lists, rollout.mask) if "teacher_entropy" in requires else None
        return replace(scores, entropy=entropy, topk=lists if "teacher_topk" in requires else None)

    def _known(self, lists: TopK) -> TopK:
        """``lists`` without tokens that the student does not have: theirs is no log-prob of an entry, but mass of the rest."""
        foreign = lists.ids >= (self._vocabulary or self._embedding_rows)
        if self.unused_ids:
            foreign |= torch.isin(lists.ids, lists.ids.new_tensor(self.unused_ids))
        return TopK(lists.ids.masked_fill(foreign, 0), lists.logprobs.masked_fill(foreign, -torch.inf))

    def _entropy(self, lists: TopK, mask: Tensor) -> Tensor:
        """The bound of the entropy, [B, T] nats, 0 where masked."""
        lower, upper = Listed(lists.ids, lists.logprobs).entropy_bounds(self._embedding_rows)
        bound = lower if self.entropy_bound == "lower" else upper
        return torch.where(mask, bound, 0.0).float()

    def _require_temperature(self, temperature: float) -> None:
        if temperature != 1.0:
            raise InputError(
                f"`model.sampler.temperature` must be 1 with `RemoteTeacher`, whose servers score at temperature 1 only, got "
                f"{temperature}"
            )


@dataclass(frozen=True)
class _Row:
    """What a server says of one response of T tokens, nats.

    Args:
        logprobs: [T], of the sampled tokens.
        ids: [T, K], the likeliest tokens; None where they were not asked for.
        listed: [T, K], theirs.
        candidates: [T, C], of tokens that were chosen; None for none.
    """

    logprobs: NDArray[numpy.float32]
    ids: NDArray[numpy.int64] | None = None
    listed: NDArray[numpy.float32] | None = None
    candidates: NDArray[numpy.float32] | None = None

    def known(self, token: int, ids: tuple[int, ...], *, at: int = -1) -> dict[int, float]:
        """What is known of ``ids`` at a position, where ``token`` was sampled: log-probs by id."""
        known = {token: float(self.logprobs[at])}
        if self.ids is not None and self.listed is not None:
            pairs = zip(self.ids[at].tolist(), self.listed[at].tolist(), strict=True)
            known |= {name: logprob for name, logprob in pairs if name in ids}
        return known


def _missing(row: _Row, known: dict[int, float], ids: tuple[int, ...], *, at: int = -1) -> list[int]:
    """Which of ``ids`` are not ``known`` at a position and may matter: none is likelier than the last listed."""
    missing = [stop for stop in ids if stop not in known]
    most = 1.0 if row.listed is None else float(numpy.exp(row.listed[at, -1]))
    return missing if len(missing) * most > STOP_SHARE * numpy.exp(list(known.values())).sum() else []


def _read(choice: dict[str, Any], prompt: list[int], response: list[int], k: int | None) -> _Row:
    """One response from what holds its "prompt_logprobs", with lists of ``k`` where that is not None."""
    first = len(prompt)
    entries = response_entries(choice, first, response)
    logprobs = numpy.array(sampled_logprobs(entries, response, first=first), numpy.float32)
    return _Row(logprobs) if k is None else _Row(logprobs, *top_lists(entries, response, k, first=first))


def _body(texts: list[list[int]], k: int) -> dict[str, Any]:
    """A request for the log-probs of all tokens of ``texts`` and of the ``k`` likeliest at each place."""
    return {"prompt": texts, "prompt_logprobs": k, "max_tokens": 1}


def _chosen_body(text: list[int], chosen: list[list[int]], k: int | None = None) -> dict[str, Any]:
    """A request for the log-probs of ``chosen`` tokens at the last places of ``text``, and of the ``k`` likeliest."""
    settings: dict[str, Any] = {"max_tokens": 1, "detokenize": False, "prompt_logprobs": k}
    start = len(text) - 1 - len(chosen)  # a place is scored by what stands before it
    settings |= {"prompt_logprob_token_ids": chosen, "prompt_logprob_start": start}
    return {"token_ids": text, "sampling_params": settings}


def _tokens(rollout: Rollout) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """The rows that have a valid token, and their prompt and response ids without padding, what an environment answered
    included; the teacher's own prompt where the batch has one."""
    prompts = rollout.prompts
    own = prompts.teacher_ids is not None
    ids, mask = (prompts.teacher_ids, prompts.teacher_mask) if own else (prompts.ids, prompts.mask)
    rows: list[int] = rollout.mask.any(-1).nonzero().squeeze(-1).tolist()
    return rows, _rows(ids, mask, rows), _rows(rollout.response_ids, rollout.read, rows)  # type: ignore[arg-type]


def _rows(ids: Tensor, mask: Tensor, rows: list[int]) -> list[list[int]]:
    ids, mask = ids.cpu(), mask.cpu()
    return [ids[row][mask[row]].tolist() for row in rows]


def _joined(prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[list[int]]:
    return [prompt + response for prompt, response in zip(prompts, responses, strict=True)]


def _spread(rollout: Rollout, rows: list[int], found: list[_Row], name: str, *width: int) -> Tensor:
    """The field ``name`` of the answers to ``rows``, [B, T, *width] on the rollout's device, 0 where masked."""
    mask, read = rollout.mask.cpu(), rollout.read.cpu()
    values = [torch.from_numpy(numpy.ascontiguousarray(getattr(row, name))) for row in found]
    out = torch.zeros(*mask.shape, *width, dtype=torch.int64 if name == "ids" else torch.float32)
    for row, value in zip(rows, values, strict=True):
        out[row, mask[row]] = value[mask[row, read[row]]]
    return out.to(rollout.mask.device)
