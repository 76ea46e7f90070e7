"""A teacher behind vLLM servers."""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lit_opd.errors import InputError
from lit_opd.models.loading import load_config, load_tokenizer
from lit_opd.servers.client import Malformed, Servers, checked_logprob
from lit_opd.teacher.base import Teacher
from lit_opd.types import Rollout, TokenScores


class RemoteTeacher(Teacher):
    """Log-probs from servers that speak vLLM's ``/v1/completions`` with token-id prompts and ``prompt_logprobs``.

    Prompt and response go out as one prompt of token ids; the answer holds the log-prob of each. Servers give log-probs
    of given tokens at temperature 1 and nothing else: no entropies, no top-k, no divergence over the full vocabulary.
    Their softmax runs over every row of the teacher's embedding, padding rows included.

    Args:
        urls: addresses such as http://host:8000; several share the load.
        tokenizer_path: folder or hub id with the teacher's config and tokenizer; weights are not read.
        model: the name the servers must serve; None takes the only one they serve.
        max_concurrency: requests in flight at once, all servers together.
        rows_per_request: responses a request carries.
        timeout: seconds a request may take as a whole.
        retry_seconds: how long a failing request is tried again, with growing pauses.
        start_seconds: the same before the run, for a server that is not up yet.
        max_response_bytes: longest answer that is read; a token takes about 100 bytes.
        api_key_env: environment variable with the servers' key, None for none.
        pad_token: the tokenizer's pad token where it has none of its own.
        trust_remote_code: run the tokenizer's own Python code; off unless you trust its author.
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
    ) -> None:
        super().__init__()
        if rows_per_request < 1:
            raise InputError(f"`RemoteTeacher.rows_per_request` must be >= 1, got {rows_per_request}")
        self.urls, self.tokenizer_path, self.model = list(urls), tokenizer_path, model
        self.rows_per_request = rows_per_request
        self.pad_token, self.trust_remote_code = pad_token, trust_remote_code
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
        """Nothing beyond log-probs."""
        return frozenset()

    def tokenizers(self) -> list[Any]:
        """The teacher's tokenizer and embedding rows, from ``tokenizer_path``."""
        field, code = f"{self.field}.tokenizer_path", self.trust_remote_code
        tokenizer = load_tokenizer(self.tokenizer_path, field, pad_token=self.pad_token, trust_remote_code=code)
        return [(tokenizer, self._config.get_text_config().vocab_size)]

    @cached_property
    def _config(self) -> Any:
        field = f"{self.field}.tokenizer_path"
        return load_config(self.tokenizer_path, field, trust_remote_code=self.trust_remote_code)

    def check(self, *, temperature: float, tokens: int | None) -> None:
        """Temperature 1; every server answers, serves the model, holds ``tokens`` and the one it must sample, and scores the
        vocabulary's last token."""
        self._require_temperature(temperature)
        self.servers.field = self.field
        self.servers.check(tokens=None if tokens is None else tokens + 1)
        last = self._config.get_text_config().vocab_size - 1  # a server with a smaller vocabulary refuses it
        body = {"prompt": [[last, last]], "prompt_logprobs": 0, "max_tokens": 1}
        self.servers.probe(body, lambda choices: response_logprobs(choices[0], [last], [last]))

    def load(self, *, vocabulary: int) -> None:
        """Ask the servers for their model, where ``check`` has not."""
        rows = self._config.get_text_config().vocab_size
        if rows > vocabulary:
            warnings.warn(
                f"`{self.field}`: the servers' softmax runs over all {rows} embedding rows of the teacher, while its tokenizer "
                f"has {vocabulary} ids; log-probs are lower by what lies on the other {rows - vocabulary}, next to nothing in a "
                "trained model",
                stacklevel=2,
            )
        if self.servers.model is None:
            self.servers.check(tokens=None)

    @torch.no_grad()
    def score(
        self, rollout: Rollout, *, temperature: float = 1.0, requires: frozenset[str] = frozenset()
    ) -> TokenScores:
        """Log-probs, [B, T] nats; see ``Teacher.score``.

        Raises:
            ServerError: the servers failed for good.
        """
        self._require_temperature(temperature)
        if requires:
            raise InputError(f"`RemoteTeacher` gives log-probs only, not {sorted(requires)}")
        if self.servers.model is None:
            self.servers.check(tokens=None)
        rows = rollout.mask.any(-1).nonzero().squeeze(-1).tolist()
        prompts, responses, sampled = _tokens(rollout)
        chunks = [rows[start : start + self.rows_per_request] for start in range(0, len(rows), self.rows_per_request)]

        def parse(choices: list[dict[str, Any]], index: int) -> list[list[float]]:
            pairs = zip(chunks[index], choices, strict=True)
            return [response_logprobs(choice, prompts[row], responses[row], sampled[row]) for row, choice in pairs]

        bodies = [
            {"prompt": [prompts[row] + responses[row] for row in chunk], "prompt_logprobs": 0, "max_tokens": 1}
            for chunk in chunks
        ]
        answers = self.servers.complete(bodies, parse)
        out = torch.zeros(rollout.mask.shape, dtype=torch.float32)
        for chunk, found in zip(chunks, answers, strict=True):
            for row, logprobs in zip(chunk, found, strict=True):
                out[row, rollout.mask[row].cpu()] = torch.tensor(logprobs)
        return TokenScores(logprobs=out.to(rollout.mask.device))

    def _require_temperature(self, temperature: float) -> None:
        if temperature != 1.0:
            raise InputError(
                f"`model.sampler.temperature` must be 1 with `RemoteTeacher`, whose servers score at temperature 1 only, got "
                f"{temperature}"
            )


def _tokens(rollout: Rollout) -> tuple[list[list[int]], list[list[int]], list[list[bool]]]:
    """Prompt and response ids of every row, without padding, and which of the response were sampled; the teacher's own prompt
    where the batch has one."""
    prompts = rollout.prompts
    own = prompts.teacher_ids is not None
    ids, mask = (prompts.teacher_ids, prompts.teacher_mask) if own else (prompts.ids, prompts.mask)
    read = rollout.mask if rollout.observed is None else rollout.mask | rollout.observed
    return _rows(ids, mask), _rows(rollout.response_ids, read), _rows(rollout.mask, read)  # type: ignore[arg-type, return-value]


def _rows(ids: Tensor, mask: Tensor) -> list[list[int]]:
    ids, mask = ids.cpu(), mask.cpu()
    return [row[valid].tolist() for row, valid in zip(ids, mask, strict=True)]


def response_logprobs(
    choice: dict[str, Any], prompt: list[int], response: list[int], sampled: list[bool] | None = None
) -> list[float]:
    """The log-probs of the sampled response tokens in one choice, nats.

    Args:
        choice: with "prompt_logprobs": one entry a token, {token id: {"logprob": nats}}, None for the first.
        prompt: token ids.
        response: token ids.
        sampled: which of them are scored; None for all.
    Raises:
        Malformed: log-probs are missing, of another number, or of other tokens.
    """
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list):
        raise Malformed("has no prompt_logprobs")
    if len(entries) != len(prompt) + len(response):
        raise Malformed(f"has {len(entries)} prompt_logprobs for {len(prompt) + len(response)} tokens")
    found = []
    for position, token in enumerate(response, start=len(prompt)):
        if sampled is not None and not sampled[position - len(prompt)]:
            continue
        entry = entries[position]
        if not isinstance(entry, dict) or not isinstance(entry.get(str(token)), dict):
            raise Malformed(f"has no log-prob of token {token} at position {position}")
        found.append(checked_logprob(entry[str(token)].get("logprob"), f"of token {token} at position {position}"))
    return found
