"""What servers answer about a prompt's tokens, read entry by entry; what is not as it was asked for is no answer."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy
from numpy.typing import NDArray

from lit_opd.servers.client import CLAMPED, ROUNDING, SHOWN, Malformed, checked_logprob

MASS_ROUNDING = 1e-3  # that the mass of listed tokens may lie above 1; bfloat16 heads round that much
NPY = b"\x93NUMPY"  # how such a file begins
ID_DIGITS = 18  # of a token id, which an int64 holds
ENTRY_BYTES, POSITION_BYTES = 80, 4  # of JSON, as vLLM 0.32 writes an entry of prompt_logprobs and what surrounds them


def answer_bytes(rows: int, tokens: int, top_k: int) -> int:
    """About how long the answer to ``rows`` prompts of ``tokens`` each is."""
    return rows * tokens * (POSITION_BYTES + ENTRY_BYTES * (top_k + 1))


def response_entries(choice: dict[str, Any], prompt: int, response: list[int]) -> list[dict[str, Any]]:
    """What the server says of each response position: {token id: {"logprob": nats}}.

    Args:
        choice: with "prompt_logprobs": one entry a token, None for the first.
        prompt: its tokens.
        response: token ids, scored.
    Raises:
        Malformed: log-probs are missing, of another number, or of other tokens.
    """
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list):
        raise Malformed("has no prompt_logprobs")
    if len(entries) != prompt + len(response):
        raise Malformed(f"has {len(entries)} prompt_logprobs for {prompt + len(response)} tokens")
    for position, token in enumerate(response, start=prompt):
        entry = entries[position]
        if not isinstance(entry, dict) or not isinstance(entry.get(str(token)), dict):
            raise Malformed(f"has no log-prob of token {token} at position {position}")
    return entries[prompt:]


def sampled_logprobs(entries: list[dict[str, Any]], response: list[int], *, first: int) -> list[float]:
    """Log-probs of the response tokens, nats.

    Args:
        entries: of ``response_entries``.
        response: token ids.
        first: position of the first one, for errors.
    """
    return [
        checked_logprob(entry[str(token)].get("logprob"), f"of token {token} at position {position}")
        for position, (entry, token) in enumerate(zip(entries, response, strict=True), start=first)
    ]


def top_lists(
    entries: list[dict[str, Any]], response: list[int], k: int, *, first: int
) -> tuple[NDArray[numpy.int64], NDArray[numpy.float32]]:
    """The ``k`` likeliest tokens at each position, likeliest first: ids and log-probs, [T, K] each.

    vLLM lists them, and the position's own token beside them where it is none of them.

    Args:
        entries: of ``response_entries``.
        response: token ids.
        k: that were asked for.
        first: position of the first entry, for errors.
    Raises:
        Malformed: there are more or fewer, log-probs are not usable, or their mass is above 1.
    """
    names: list[str] = []
    values: list[Any] = []
    for position, (entry, token) in enumerate(zip(entries, response, strict=True), start=first):
        own = str(token) if len(entry) > k else None
        listed = [(name, value) for name, value in entry.items() if name != own]
        if len(listed) != k or (own is None and not _among(entry, token, k)):
            raise Malformed(f"lists {len(entry)} tokens at position {position}, not the {k} likeliest")
        names += [name for name, _ in listed]
        values += [value.get("logprob") if isinstance(value, dict) else None for _, value in listed]
    shape = len(entries), k
    ids, logprobs = _ids(names).reshape(shape), _numbers(values).reshape(shape)
    order = numpy.argsort(-logprobs, axis=-1, kind="stable")
    _require_mass(logprobs)
    likeliest = numpy.take_along_axis(logprobs, order, -1).astype(numpy.float32)
    return numpy.take_along_axis(ids, order, -1), likeliest


def _among(entry: dict[str, Any], token: int, k: int) -> bool:
    """Whether the position's own token is one of the ``k`` likeliest, as far as the server says its rank."""
    rank = entry[str(token)].get("rank")
    return not isinstance(rank, int) or rank <= k


def _ids(names: list[str]) -> NDArray[numpy.int64]:
    wrong = next((name for name in names if not (name.isascii() and name.isdigit() and len(name) <= ID_DIGITS)), None)
    if wrong is not None:
        raise Malformed(f"lists {wrong[:SHOWN]!r}, which is no token id")
    return numpy.array([int(name) for name in names], numpy.int64)


def _numbers(values: list[Any]) -> NDArray[numpy.float64]:
    """As ``checked_logprob``, of many at once."""
    if set(map(type, values)) <= {float, int}:
        found = numpy.array(values, numpy.float64)
        if bool(((found > CLAMPED) & (found <= ROUNDING)).all()):
            return numpy.minimum(found, 0.0)
    return numpy.array([checked_logprob(value, "of a listed token") for value in values])


def _require_mass(logprobs: NDArray[numpy.float64]) -> None:
    """At temperature 1, of one softmax: logits, or log-probs of another temperature, rarely pass."""
    mass = float(numpy.exp(logprobs).sum(-1).max(initial=0.0))
    if mass > 1 + MASS_ROUNDING:
        raise Malformed(f"lists tokens with a mass of {mass:.4g}, more than 1")


def asked_logprobs(answer: dict[str, Any], shape: tuple[int, int]) -> NDArray[numpy.float32]:
    """Log-probs of tokens that were asked for by id, [T, K] nats, from "prompt_token_id_logprobs": base64 of a .npy file.

    Raises:
        Malformed: they are missing, of another shape, not finite, clamped or above 0.
    """
    text = answer.get("prompt_token_id_logprobs")
    if not isinstance(text, str):
        raise Malformed("has no prompt_token_id_logprobs")
    try:
        data = base64.b64decode(text, validate=True)
        if not data.startswith(NPY):  # numpy would unpack an archive
            raise ValueError("no .npy file")
        found = numpy.load(io.BytesIO(data), allow_pickle=False)
    except (
        Exception
    ) as error:  # base64, numpy and Python's own reader of a header raise many types; memory: it says its own size
        raise Malformed(f"has prompt_token_id_logprobs that cannot be read ({type(error).__name__})") from error
    if not isinstance(found, numpy.ndarray) or found.shape != shape or found.dtype.kind != "f":
        raise Malformed(f"has prompt_token_id_logprobs that are no {shape[0]} x {shape[1]} numbers")
    if found.size:
        for extreme in (found.min(), found.max()):  # NaN is both
            checked_logprob(float(extreme), "of tokens that were asked for")
    return numpy.minimum(found.astype(numpy.float32), 0.0)
