"""Talking to vLLM's OpenAI-compatible servers: bounded in time, size and tries, and only with the hosts that were configured.

httpx's transport without its client: no redirect is followed, no proxy setting, .netrc or cookie is read, and nothing is
decompressed, so a request reaches the host in the URL or fails. Requests run in an event loop, where each is cancelled when
its time is over, since time-outs of single reads never end an answer that trickles in. A connection lasts as long as a call
has requests for it.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import ssl
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from lit_opd.distributed import is_rank_zero
from lit_opd.errors import InputError, ServerError

COMPLETIONS, MODELS = "/v1/completions", "/v1/models"
GENERATE = "/inference/v1/generate"  # token ids in and out; newer vLLM scores chosen ids there
FIRST_DELAY, LONGEST_DELAY = 0.25, 15.0  # seconds between tries, doubling
MALFORMED_TRIES = 3  # an answer that is whole but wrong rarely gets better
SHOWN = 300  # characters of a server's own message in errors
KEPT = 2.0  # seconds a connection waits for its next request; vLLM's own servers hang up after 5
KEY = re.compile("[!-~]+")  # what a header can hold, without spaces
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})  # HTTP statuses
CLAMPED = -9999.0  # what vLLM writes for log-probs of -inf
ROUNDING = 1e-3  # nats a log-prob may lie above 0
NO_TLS = frozenset(
    {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"}
)  # what plain text looks like to TLS

# vLLM takes defaults from the model's generation_config.json (Qwen3's has top-p 0.95), so every setting is sent
NEUTRAL = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip

Answer = TypeVar("Answer")
Http = httpx.AsyncHTTPTransport


class Malformed(Exception):
    """An answer arrived whole, but is not what was asked for."""


class _Transient(Exception):
    """No usable answer this time."""


class _Lost(_Transient):
    """No connection, or one that broke: the server may have been restarted."""


class _Refused(Exception):
    """An answer that another try will not change.

    Args:
        said: what it was.
        status: of HTTP, None where it was none of its making.
    """

    def __init__(self, said: str, status: int | None = None) -> None:
        super().__init__(said)
        self.status = status


@dataclass
class _Server:
    """One address, and how busy it is."""

    url: str
    in_flight: int = 0
    rests_until: float = 0.0


def _parsed(url: str, field: str) -> _Server:
    try:
        parts = urlsplit(url)
        httpx.URL(url)
        parts.port  # noqa: B018
    except (ValueError, httpx.InvalidURL):  # whose text may hold a password that stands where the port was looked for
        raise InputError(
            f"`{field}` must be addresses such as http://host:8000, got one whose host cannot be read or whose port is no number "
            "from 0 to 65535; correct it"
        ) from None
    plain = not (parts.query or parts.fragment or "@" in parts.netloc + parts.path)
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise InputError(
            f"`{field}` must be addresses such as http://host:8000 without user, password or query; got one that is not "
            f"(host {parts.hostname!r}); a key goes into an environment variable, see api_key_env"
        )
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return _Server(f"{parts.scheme}://{parts.netloc}{prefix}")


class Servers:
    """Several servers of one model, the least busy first.

    Args:
        urls: addresses such as http://host:8000.
        model: the name they must serve; None takes the only one they serve.
        field: what errors call the owner, such as "model.teacher".
        max_concurrency: requests in flight at once, all servers together.
        timeout: seconds a request may take as a whole, from its connection to the last byte of its answer.
        retry_seconds: from the first failure of a request, how long it is tried again.
        start_seconds: the same for the questions before the run.
        max_response_bytes: longest answer that is read.
        api_key_env: environment variable with the servers' key, None for none.
    Raises:
        InputError: a value outside its range.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        model: str | None,
        field: str,
        max_concurrency: int,
        timeout: float,
        retry_seconds: float,
        max_response_bytes: int,
        api_key_env: str | None = None,
        start_seconds: float = 30.0,
    ) -> None:
        self.field, self.model = field, model
        self.window: int | None = None  # tokens that all of them hold, where ``check`` was told
        limits = {"max_concurrency": max_concurrency, "timeout": timeout, "max_response_bytes": max_response_bytes}
        for name, value in limits.items():
            if not 0 < value < math.inf:
                raise InputError(f"`{field}.{name}` must be > 0 and finite, got {value}")
        for name, value in {"retry_seconds": retry_seconds, "start_seconds": start_seconds}.items():
            if not 0 <= value < math.inf:
                raise InputError(f"`{field}.{name}` must be >= 0 and finite, got {value}")
        if not urls or isinstance(urls, str):
            raise InputError(f"`{field}.urls` must be a list of at least one address, got {urls!r}")
        self.servers = [_parsed(url, f"{field}.urls") for url in urls]
        self.max_concurrency, self.timeout, self.retry_seconds = max_concurrency, timeout, retry_seconds
        self.max_response_bytes, self.api_key_env, self.start_seconds = max_response_bytes, api_key_env, start_seconds
        self.num_lost = (
            0  # connections refused or broken so far, and answers that what was asked for is not there (any more)
        )

    # -- before a run ------------------------------------------------------------------------------------------------

    @property
    def urls(self) -> list[str]:
        """Their addresses."""
        return [server.url for server in self.servers]

    def check(self, *, tokens: int | None, seconds: float | None = None) -> None:
        """Every server answers, serves the expected model, and its context holds ``tokens``.

        Args:
            tokens: prompt, response and one more; None where it is not known.
            seconds: how long a server that does not answer is asked again; default ``start_seconds``.
        Raises:
            ServerError: a server does not answer, or something else does.
            InputError: another model, a context that is too short, or no key where one is configured.
        """
        self._key()
        limit = self.start_seconds if seconds is None else seconds
        for server in self.servers:
            # a program that accepts and never answers must not hold the run for `timeout`
            ask = partial(self._served, timeout=max(limit, 1.0))
            served = self._asked_at_start(ask, server, limit, advised=seconds is None)
            names = sorted(name for name, (_, adapter) in served.items() if not adapter)
            if self.model is None and len(names) == 1:
                self.model = names[0]
            if self.model not in served:
                raise InputError(
                    f"`{self.field}.model` must be one of {self._hidden(names)}, which {server.url} serves, got {self.model!r}; "
                    "set it, or start the server with --served-model-name"
                )
            window, _ = served[self.model]
            if window is not None:
                self.window = window if self.window is None else min(self.window, window)
            if tokens is not None and window is not None and window < tokens:
                raise InputError(
                    f"`{self.field}.urls`: {server.url} has a context of {window} tokens, but prompt, response and one more "
                    f"need {tokens}; start it with --max-model-len {tokens}"
                )

    def probe(self, body: dict[str, Any], parse: Callable[[list[dict[str, Any]]], Any]) -> None:
        """One small request to every server, so that what its answers lack is known before the run.

        Args:
            body: as for ``complete``.
            parse: reads the choices; may raise ``Malformed``.
        Raises:
            ServerError: a server refuses the request, breaks off, or its answer lacks something.
        """

        async def once(http: Http, server: _Server) -> None:
            parse(await self._completed(http, server, body))

        for server in self.servers:
            self._asked_at_start(once, server, self.start_seconds)

    def refusal(
        self, body: dict[str, Any], parse: Callable[[Any], Any], *, generates: bool = False
    ) -> tuple[str, int | None] | None:
        """As ``probe``, for what a server need not be able to do.

        Args:
            body: as for ``complete``, or for ``generate``.
            parse: reads what theirs reads; may raise ``Malformed``.
            generates: ask by ``generate``.
        Returns:
            what the first server that refused said, with its HTTP status; None where all could.
        Raises:
            ServerError: a server breaks off, or its answer lacks something.
        """
        refused: list[tuple[str, int | None]] = []
        ask = self._generated if generates else self._completed

        async def once(http: Http, server: _Server) -> None:
            try:
                parse(await ask(http, server, body))
            except _Refused as error:
                refused.append((f"{server.url} {self._hidden(error)}", error.status))

        for server in self.servers:
            self._asked_at_start(once, server, self.start_seconds)
        return refused[0] if refused else None

    def _asked_at_start(
        self,
        once: Callable[[Http, _Server], Awaitable[Answer]],
        server: _Server,
        seconds: float,
        *,
        advised: bool = True,
    ) -> Answer:
        advice = (
            "is a vLLM server running there? Start it, read its log, correct the address, or raise "
            f"`{self.field}.start_seconds` ({self.start_seconds:g})"
        )
        ask = partial(
            self._retried, once, only=server, seconds=seconds, advice=advice if advised else None, announce=True
        )
        return self._run([ask])[0]

    def _key(self) -> str:
        """The servers' key, empty where none is configured."""
        if self.api_key_env is None:
            return ""
        key = os.environ.get(self.api_key_env, "")
        if not KEY.fullmatch(key):
            wrong = "holds a space, a line end or a letter outside ASCII" if key else "is not set"
            raise InputError(
                f"`{self.field}.api_key_env` must name an environment variable with the servers' key, got "
                f"{self.api_key_env!r}, which {wrong}; set it on every machine of the run"
            )
        return key

    async def _served(self, http: Http, server: _Server, timeout: float) -> dict[str, tuple[int | None, bool]]:
        """Context length, and whether it is an adapter of another one, by model name."""
        answer = await self._exchange(http, server, "GET", MODELS, None, timeout=min(timeout, self.timeout))
        cards = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
            raise Malformed("has no list of models under /v1/models")
        windows = [card.get("max_model_len") for card in cards]
        if wrong := [window for window in windows if window is not None and type(window) is not int]:
            raise Malformed(f"has a max_model_len that is no whole number, {str(wrong[0])[:SHOWN]!r}")
        return {str(card["id"]): (card.get("max_model_len"), card.get("parent") is not None) for card in cards}

    # -- requests ----------------------------------------------------------------------------------------------------

    def complete(
        self, bodies: Sequence[dict[str, Any]], parse: Callable[[list[dict[str, Any]], int], Answer]
    ) -> list[Answer]:
        """Post completions concurrently; the answers are in the order of the requests.

        Args:
            bodies: requests; each "prompt" is a list of token-id lists. The model's name is added.
            parse: from the choices of a request (one a prompt, in order) and its index to a result; may raise ``Malformed``.
        Raises:
            ServerError: a request failed for good; the others are given up.
        """
        return self._run(self._completions(bodies, parse))

    def _completions(
        self, bodies: Sequence[dict[str, Any]], parse: Callable[[list[dict[str, Any]], int], Answer]
    ) -> list[Callable[[Http], Awaitable[Answer]]]:
        async def once(index: int, http: Http, server: _Server) -> Answer:
            return parse(await self._completed(http, server, bodies[index]), index)

        return [partial(self._retried, partial(once, index)) for index in range(len(bodies))]

    def completing(
        self, bodies: Sequence[dict[str, Any]], parse: Callable[[list[dict[str, Any]], int], Answer]
    ) -> Future[list[Answer]]:
        """As ``complete``, but returns at once; what it would raise is the exception of the future."""
        return self._begun(self._completions(bodies, parse))

    def generate(
        self, bodies: Sequence[dict[str, Any]], parse: Callable[[dict[str, Any], int], Answer]
    ) -> list[Answer]:
        """As ``complete``, by vLLM's route of token ids: one prompt a request.

        Args:
            bodies: "token_ids" and "sampling_params"; the model's name is added.
            parse: from the whole answer of a request and its index to a result; may raise ``Malformed``.
        Raises:
            ServerError: a request failed for good; the others are given up.
        """

        async def once(index: int, http: Http, server: _Server) -> Answer:
            return parse(await self._generated(http, server, bodies[index]), index)

        return self._run([partial(self._retried, partial(once, index)) for index in range(len(bodies))])

    async def _completed(self, http: Http, server: _Server, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The choices of one request, one a prompt, in order."""
        answer = await self._exchange(http, server, "POST", COMPLETIONS, {"model": self.model, **NEUTRAL, **body})
        return self._choices(answer, len(body["prompt"]))

    async def _generated(self, http: Http, server: _Server, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request by the route of token ids."""
        sent = {"model": self.model, **body, "sampling_params": NEUTRAL | body["sampling_params"]}
        answer = await self._exchange(http, server, "POST", GENERATE, sent)
        self._require_model(answer)
        return answer  # type: ignore[no-any-return]

    def _require_model(self, answer: Any) -> None:
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            raise Malformed("has no choices")
        if answer.get("model") != self.model:
            raise Malformed(f"comes from the model {answer.get('model')!r}, not {self.model!r}")

    def _choices(self, answer: Any, count: int) -> list[dict[str, Any]]:
        self._require_model(answer)
        choices = answer["choices"]
        if not all(isinstance(choice, dict) for choice in choices):
            raise Malformed("has choices that are no objects")
        by_index = {choice["index"]: choice for choice in choices if type(choice.get("index")) is int}
        if len(choices) != count or set(by_index) != set(range(count)):
            raise Malformed(f"has {len(choices)} choices for {count} prompts, or their indices are wrong")
        return [by_index[index] for index in range(count)]

    def post_to_all(self, path: str, body: dict[str, Any], *, done: int | None = None) -> None:
        """Post ``body`` to every server in turn.

        Args:
            path: of the endpoint.
            body: as JSON.
            done: an HTTP status that is as good as success, such as 404 of what is to be removed.
        Raises:
            ServerError: a server failed for good, or answered {"success": false}.
        """

        async def post(http: Http, server: _Server) -> None:
            """One try; returns where the server did it, or answered with the status ``done``."""
            try:
                data = await self._exchange(http, server, "POST", path, body, as_json=False)
            except _Refused as error:
                if done is None or error.status != done:
                    raise
                return
            if b'"success":false' in data.replace(b" ", b""):
                raise _Transient(f"could not do {path} yet")

        for server in self.servers:
            self._run([partial(self._retried, post, only=server)])

    def posting(self, path: str, bodies: Sequence[dict[str, Any]]) -> Future[Any]:
        """Post a body to each server, in the order of ``urls``, all at once and never again: for what servers and caller do
        together. Returns at once; the result is none, or the ``ServerError`` of the first server that failed.
        """

        async def post(body: dict[str, Any], http: Http, server: _Server) -> None:
            await self._exchange(http, server, "POST", path, body, as_json=False)

        pairs = zip(self.servers, bodies, strict=True)
        jobs = [partial(self._retried, partial(post, body), only=server, seconds=0.0) for server, body in pairs]
        return self._begun(jobs)

    def get_each(self, path: str) -> list[dict[str, Any]]:
        """The JSON objects that the servers answer with, in the order of ``urls``.

        Raises:
            ServerError: a server does not answer, or with something else.
        """

        async def get(http: Http, server: _Server) -> dict[str, Any]:
            answer = await self._exchange(http, server, "GET", path, None)
            if not isinstance(answer, dict):
                raise Malformed(f"has no object under {path}")
            return answer

        return [self._asked_at_start(get, server, self.start_seconds) for server in self.servers]

    def _run(self, jobs: Sequence[Callable[[Http], Awaitable[Answer]]]) -> list[Answer]:
        """What ``jobs`` return, in their order; one that fails, and what interrupts the caller, gives all others up."""
        future = self._begun(jobs)
        try:
            return future.result()
        finally:
            future.cancel()  # of no effect once it has ended

    def _begun(self, jobs: Sequence[Callable[[Http], Awaitable[Answer]]]) -> Future[list[Answer]]:
        return asyncio.run_coroutine_threadsafe(self._together(jobs), _loop(os.getpid()))

    async def _together(self, jobs: Sequence[Callable[[Http], Awaitable[Answer]]]) -> list[Answer]:
        """As ``_run``: workers that take job after job, each with a connection of its own."""
        secure = any(server.url.startswith("https:") for server in self.servers)
        # a context without authorities, which takes no time to make, is enough for connections that are not encrypted
        trusted = ssl.create_default_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        waiting, answers = iter(enumerate(jobs)), {}

        async def work() -> None:  # one pool for all would look through all connections at every request
            async with Http(verify=trusted, trust_env=False, limits=httpx.Limits(keepalive_expiry=KEPT)) as http:
                for index, job in waiting:
                    answers[index] = await job(http)

        workers = [asyncio.ensure_future(work()) for _ in range(min(self.max_concurrency, len(jobs)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)  # their connections are closed then
        return [answers[index] for index in range(len(jobs))]

    # -- one request, again and again --------------------------------------------------------------------------------

    async def _retried(
        self,
        once: Callable[[Http, _Server], Awaitable[Answer]],
        http: Http,
        only: _Server | None = None,
        *,
        seconds: float | None = None,
        advice: str | None = None,
        announce: bool = False,
    ) -> Answer:
        """``once`` until it succeeds or ``seconds`` (default ``retry_seconds``) have passed since it first failed."""
        delay, tries, malformed, first_failure = FIRST_DELAY, 0, 0, math.inf
        seconds = self.retry_seconds if seconds is None else seconds
        while True:
            server = self._borrow(only)
            try:
                return await once(http, server)
            except _Refused as error:
                self.num_lost += error.status == httpx.codes.NOT_FOUND
                raise self._failure(server, self._hidden(error), tries + 1, advice) from self._shareable(error)
            except (_Transient, Malformed) as error:
                tries, malformed = tries + 1, malformed + isinstance(error, Malformed)
                first_failure = min(first_failure, time.monotonic())
                over = time.monotonic() + delay > first_failure + seconds
                if over or malformed >= MALFORMED_TRIES:
                    raise self._failure(server, self._hidden(error), tries, advice) from self._shareable(error)
                if announce and tries == 1 and is_rank_zero():
                    print(
                        f"{server.url} {self._hidden(error)}; asking again for up to {seconds:g} s",
                        file=sys.stderr,
                        flush=True,
                    )
                server.rests_until = time.monotonic() + 2 * delay
                self.num_lost += isinstance(error, _Lost)
            finally:
                server.in_flight -= 1
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY)

    def _failure(self, server: _Server, what: str, tries: int, advice: str | None = None) -> ServerError:
        advice = advice or (
            f"look at the server's log, restart it, or raise `{self.field}.retry_seconds` ({self.retry_seconds:g}) or "
            f"`timeout` ({self.timeout:g}); then go on with --ckpt_path last"
        )
        return ServerError(
            f"`{self.field}.urls`: {server.url} {what} ({tries} {'try' if tries == 1 else 'tries'}); {advice}"
        )

    def error(self, what: str) -> ServerError:
        """The error for something that went wrong beside the requests themselves."""
        urls = ", ".join(self.urls)
        return ServerError(
            f"`{self.field}.urls`: {urls} {what}; look at the servers' logs, then go on with --ckpt_path last"
        )

    def _borrow(self, only: _Server | None) -> _Server:
        """The least busy server, one that just failed only where all did."""
        now = time.monotonic()
        server = only or min(self.servers, key=lambda s: (s.rests_until > now, s.in_flight))
        server.in_flight += 1
        return server

    async def _exchange(
        self,
        http: Http,
        server: _Server,
        method: str,
        path: str,
        body: Any,
        *,
        as_json: bool = True,
        timeout: float | None = None,
    ) -> Any:
        """One request and its answer, JSON unless ``as_json`` is False."""
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        content = None if body is None else json.dumps(body).encode()
        request = httpx.Request(method, server.url + path, headers=headers, content=content)
        status, data = await self._send(http, request, self.timeout if timeout is None else timeout)
        if status != httpx.codes.OK:
            said = f"answered with HTTP status {status}: {self._shown(data.decode(errors='replace'))}"
            raise _Transient(said) if status in RETRIED else _Refused(said, status)
        try:
            return json.loads(data) if as_json else data
        except (ValueError, RecursionError) as error:
            shown = self._shown(data.decode(errors="replace"))
            raise _Transient(f"answered with what is no JSON: {shown!r}") from error

    async def _send(self, http: Http, request: httpx.Request, timeout: float) -> tuple[int, bytes]:
        """HTTP status and content of one request, cancelled at the time-out."""
        try:
            async with asyncio.timeout(timeout), aclosing(await http.handle_async_request(request)) as response:
                return response.status_code, await self._content(response)
        except TimeoutError:
            raise _Transient(f"gave no whole answer within {timeout:g} s") from None
        except (httpx.TransportError, OSError) as error:  # a TLS error while reading is an OSError
            raise self._broken(_cause(error)) from None  # httpx's own texts may repeat what the server sent

    async def _content(self, response: httpx.Response) -> bytes:
        """The answer as it was sent: never decompressed, and no more than is allowed."""
        limit, data = self.max_response_bytes, bytearray()
        too_long = _Refused(
            f"answered with more than {limit} bytes; lower `rows_per_request` or raise `max_response_bytes`"
        )
        if int(response.headers.get("Content-Length", 0)) > limit:
            raise too_long
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity" and response.status_code == httpx.codes.OK:
            raise _Refused(
                f"answered compressed ({self._shown(encoding)}), which was not asked for; turn it off at the server or its proxy"
            )
        async for part in response.aiter_raw():
            data += part
            if len(data) > limit:
                raise too_long
        return bytes(data)

    def _broken(self, cause: BaseException) -> Exception:
        """What the ``cause`` of a connection's end says about the server."""
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _Refused(
                f"has a certificate that is not trusted ({cause.verify_message}); put its authority's certificate into the "
                "file that SSL_CERT_FILE names"
            )
        if isinstance(cause, ssl.SSLError):
            if cause.reason in NO_TLS:
                return _Refused("does not speak https on this port; write http://")
            return _Lost(f"broke off its encrypted connection ({cause.reason})")
        reason = self._shown(" ".join(f"{type(cause).__name__}: {cause}".split()).rstrip(": "))
        return _Lost(f"could not be reached or broke off ({reason})")

    def _shown(self, text: str) -> str:
        """The start of what a server wrote, without the key."""
        return self._hidden(text)[:SHOWN]

    def _hidden(self, what: object) -> str:
        """As text, without the key, which a server may send back in any place of its answer."""
        key, text = self._key(), str(what)
        return text.replace(key, "***") if key else text

    def _shareable(self, error: Exception) -> Exception | None:
        """The cause that a traceback may show."""
        return error if self._hidden(error) == str(error) else None


def _cause(error: BaseException) -> BaseException:
    """The system's or the encryption's error beneath those that httpx and what it builds on put around it, else ``error``."""
    found: BaseException = error
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, BaseExceptionGroup):
            below = below.exceptions[0]
        if isinstance(below, OSError) and not isinstance(below, ssl.SSLWantReadError):
            found = below
        below = below.__cause__ or below.__context__
    return found


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of all requests of a process, by its id: a forked one has no thread of its parent's.

    In a thread of its own, so that signals reach the caller at once and a notebook's own loop is not in the way.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="requests", daemon=True).start()
    return loop


def checked_logprob(value: Any, where: str) -> float:
    """A log-prob from an answer, nats.

    Raises:
        Malformed: it is missing, no number, not finite, clamped or above 0.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not CLAMPED < value <= ROUNDING:
        raise Malformed(f"has no usable log-prob {where}: {value!r}")
    return min(float(value), 0.0)
