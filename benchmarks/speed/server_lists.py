"""Bytes and seconds a token of what a server says of one response, by K.

    python -m benchmarks.speed.server_lists
    python -m benchmarks.speed.server_lists --url http://127.0.0.1:8000 --tokenizer Qwen/Qwen3-0.6B

Without a server the answers are made up in the form of vLLM 0.32 (an entry has log-prob, rank and decoded token; ids below
151,936, tokens of 1 to 8 letters), and only their reading is timed: from the bytes to tensors, as ``RemoteTeacher`` does it.
With ``--url`` the answers are the server's, and the seconds are whole requests, one after the other: its forward pass, the
network and the reading.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import string
import time
from collections.abc import Callable
from functools import partial

import httpx
import numpy
import torch

from lit_opd.servers.client import COMPLETIONS
from lit_opd.teacher import RemoteTeacher
from lit_opd.teacher.answers import asked_logprobs
from lit_opd.teacher.remote import _body, _read
from lit_opd.types import PromptBatch, Provenance, Rollout

VOCABULARY, TOKENS, REPEATS = 151_936, 2048, 5
SIZES = (0, 20, 100)


def listed(k: int, response: list[int]) -> bytes:
    """A made-up answer with the ``k`` likeliest tokens and the sampled one at every position."""
    draw = random.Random(k)

    def entry(own: int) -> dict[str, dict[str, object]]:
        """By token id: log-prob, rank and text of the sampled token ``own`` and of ``k`` random ones."""
        ids = [own, *draw.sample(range(VOCABULARY), k)]
        logprobs = sorted((-draw.uniform(6.0, 20.0) for _ in ids[1:]), reverse=True)
        values = zip([-20.5, *logprobs], [k + 7, *range(1, k + 1)], strict=True)
        words = ["".join(draw.choices(string.ascii_letters, k=draw.randint(1, 8))) for _ in ids]
        named = zip(ids, values, words, strict=True)
        return {
            str(token): {"logprob": float(numpy.float32(logprob)), "rank": rank, "decoded_token": word}
            for token, (logprob, rank), word in named
        }

    return json.dumps({"prompt_logprobs": [None, *map(entry, response)]}, separators=(",", ":")).encode()


def chosen(k: int, tokens: int) -> bytes:
    """A made-up answer with the scores of ``k`` chosen tokens and the sampled one at every position."""
    data = io.BytesIO()
    numpy.save(data, -numpy.ones((tokens, k + 1), numpy.float32))
    return json.dumps({"prompt_token_id_logprobs": base64.b64encode(data.getvalue()).decode()}).encode()


def best(run: Callable[[], object]) -> float:
    """The shortest of a few runs, seconds."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _read_listed(data: bytes, response: list[int], k: int) -> None:
    _read(json.loads(data), [0], response, k or None)


def _read_chosen(data: bytes, k: int) -> None:
    asked_logprobs(json.loads(data), (TOKENS, k + 1))


def made_up() -> None:
    """Print a row for each size and form."""
    response = random.Random(0).sample(range(VOCABULARY), TOKENS)
    for k in SIZES:
        data = listed(k, response)
        seconds = best(partial(_read_listed, data, response, k))
        print(f"| likeliest | {k} | {len(data) / TOKENS:,.0f} | {1e6 * seconds / TOKENS:.1f} |")
    for k in SIZES[1:]:
        data = chosen(k, TOKENS)
        seconds = best(partial(_read_chosen, data, k))
        print(f"| chosen | {k} | {len(data) / TOKENS:,.0f} | {1e6 * seconds / TOKENS:.1f} |")


def of_server(url: str, tokenizer: str, tokens: int) -> None:
    """Print the same of a real server's answers."""
    ids = torch.arange(10, 10 + tokens).unsqueeze(0)
    ones = torch.ones_like(ids, dtype=torch.bool)
    prompts = PromptBatch(ids[:, :1], ones[:, :1], torch.arange(1), ("0",))
    rollout = Rollout(prompts, ids, ones, torch.zeros(1, tokens), torch.zeros(1, dtype=torch.int8), Provenance("given"))
    for k in SIZES:
        teacher = RemoteTeacher([url], tokenizer, top_k=k or None)
        teacher.check(temperature=1.0, tokens=tokens + 1)
        body = {"model": teacher.servers.model, **_body(ids.tolist(), k)}
        answer = httpx.post(f"{url}{COMPLETIONS}", json=body, timeout=600.0).raise_for_status()
        seconds = best(partial(teacher.score, rollout, requires=teacher.provides))
        print(f"| likeliest | {k} | {len(answer.content) / tokens:,.0f} | {1e6 * seconds / tokens:.1f} |", flush=True)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--tokenizer")
    parser.add_argument("--tokens", type=int, default=256)
    given = parser.parse_args()
    print("| asked for | K | bytes a token | microseconds a token |\n|---|---|---|---|")
    if given.url is None:
        made_up()
    else:
        of_server(given.url, given.tokenizer, given.tokens)


if __name__ == "__main__":
    main()
