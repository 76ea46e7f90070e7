"""Talking to vLLM's OpenAI-compatible servers: bounded in time, size and tries, and only with the hosts that were configured.

Standard library only. ``http.client`` follows no redirect and reads no proxy setting, so a request reaches the host in
the URL or fails. Every request has a connection of its own and a watchdog that cuts it at the time-out, since a socket's
time-out alone never ends an answer that trickles in.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from lit_opd.distributed import is_rank_zero
from lit_opd.types import InputError, ServerError

COMPLETIONS, MODELS = "/v1/completions", "/v1/models"
FIRST_DELAY, LONGEST_DELAY = 0.25, 15.0  # seconds between tries, doubling
MALFORMED_TRIES = 3  # an answer that is whole but wrong rarely gets better
SHOWN = 300  # characters of a server's own message in errors
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


class Malformed(Exception):
    """An answer arrived whole, but is not what was asked for."""


class _Transient(Exception):
    """No usable answer this time."""


class _Lost(_Transient):
    """No connection, or one that broke: the server may have been restarted."""


class _Refused(Exception):
    """An answer that another try will not change."""


@dataclass
class _Server:
    """One address, and how busy it is."""

    url: str
    host: str
    port: int | None
    secure: bool
    prefix: str
    in_flight: int = 0
    rests_until: float = 0.0


def _parsed(url: str, field: str) -> _Server:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # whose text may hold a password that stands where the port was looked for
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
    return _Server(f"{parts.scheme}://{parts.netloc}{prefix}", parts.hostname, port, parts.scheme == "https", prefix)


class Servers:
    """Several servers of one model, the least busy first.

    Args:
        urls: addresses such as http://host:8000.
        model: the name they must serve; None takes the only one they serve.
        field: what errors call the owner, such as "model.teacher".
        max_concurrency: requests in flight at once, all servers together.
        timeout: seconds a request may take as a whole.
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
        self.num_lost = 0  # connections refused or broken so far
        self._lock = threading.Lock()

    # -- before a run ------------------------------------------------------------------------------------------------

    def check(self, *, tokens: int | None, seconds: float | None = None) -> None:
        """Every server answers, serves the expected model, and its context holds ``tokens``.

        Args:
            tokens: prompt, response and one more; None where it is not known.
            seconds: how long a server that does not answer is asked again; default ``start_seconds``.
        Raises:
            ServerError: a server does not answer, or something else does.
            InputError: another model, a context that is too short, or no key where one is configured.
        """
        self._require_key()
        limit = self.start_seconds if seconds is None else seconds
        for server in self.servers:
            # a program that accepts and never answers must not hold the run for `timeout`
            ask = partial(self._served, timeout=max(limit, 1.0))
            served = self._asked_at_start(ask, server, limit, advised=seconds is None)
            names = sorted(served)
            if self.model is None and len(served) == 1:
                self.model = names[0]
            if self.model not in served:
                raise InputError(
                    f"`{self.field}.model` must be one of {names}, which {server.url} serves, got {self.model!r}; "
                    "set it, or start the server with --served-model-name"
                )
            window = served[self.model]
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

        def once(server: _Server) -> None:
            answer = self._exchange(server, "POST", COMPLETIONS, {"model": self.model, **NEUTRAL, **body})
            parse(self._choices(answer, len(body["prompt"])))

        for server in self.servers:
            self._asked_at_start(once, server, self.start_seconds)

    def _asked_at_start(
        self, once: Callable[[_Server], Answer], server: _Server, seconds: float, *, advised: bool = True
    ) -> Answer:
        advice = (
            "is a vLLM server running there? Start it, read its log, correct the address, or raise "
            f"`{self.field}.start_seconds` ({self.start_seconds:g})"
        )
        return self._retried(
            once, threading.Event(), only=server, seconds=seconds, advice=advice if advised else None, announce=True
        )

    def _require_key(self) -> None:
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise InputError(
                f"`{self.field}.api_key_env` must name an environment variable with the servers' key, got "
                f"{self.api_key_env!r}, which is not set; set it on every machine of the run"
            )

    def _served(self, server: _Server, timeout: float) -> dict[str, int | None]:
        """Context length by model name."""
        answer = self._exchange(server, "GET", MODELS, None, timeout=min(timeout, self.timeout))
        cards = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
            raise Malformed("has no list of models under /v1/models")
        return {str(card["id"]): card.get("max_model_len") for card in cards}

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
        if not bodies:
            return []
        stop = threading.Event()
        pool = ThreadPoolExecutor(min(self.max_concurrency, len(bodies)), thread_name_prefix="completions")

        def ask(index: int) -> Answer:
            def once(server: _Server) -> Answer:
                body = {"model": self.model, **NEUTRAL, **bodies[index]}
                answer = self._exchange(server, "POST", COMPLETIONS, body)
                return parse(self._choices(answer, len(body["prompt"])), index)

            return self._retried(once, stop)

        try:
            futures = [pool.submit(ask, index) for index in range(len(bodies))]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = next((future for future in futures if future in done and future.exception()), None)
            return [future.result() for future in ([failed] if failed else futures)]
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _choices(self, answer: Any, count: int) -> list[dict[str, Any]]:
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            raise Malformed("has no choices")
        if answer.get("model") != self.model:
            raise Malformed(f"comes from the model {answer.get('model')!r}, not {self.model!r}")
        choices = answer["choices"]
        if not all(isinstance(choice, dict) for choice in choices):
            raise Malformed("has choices that are no objects")
        by_index = {choice.get("index"): choice for choice in choices}
        if len(choices) != count or set(by_index) != set(range(count)):
            raise Malformed(f"has {len(choices)} choices for {count} prompts, or their indices are wrong")
        return [by_index[index] for index in range(count)]

    def post_to_all(self, path: str, body: dict[str, Any]) -> None:
        """Post ``body`` to every server in turn.

        Raises:
            ServerError: a server failed for good, or answered {"success": false}.
        """

        def post(server: _Server) -> None:
            data = self._exchange(server, "POST", path, body, as_json=False)
            if b'"success":false' in data.replace(b" ", b""):
                raise _Transient(f"could not do {path} yet")

        for server in self.servers:
            self._retried(post, threading.Event(), only=server)

    # -- one request, again and again --------------------------------------------------------------------------------

    def _retried(
        self,
        once: Callable[[_Server], Answer],
        stop: threading.Event,
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
                return once(server)
            except _Refused as error:
                raise self._failure(server, str(error), tries + 1, advice) from error
            except (_Transient, Malformed) as error:
                tries, malformed = tries + 1, malformed + isinstance(error, Malformed)
                first_failure = min(first_failure, time.monotonic())
                over = time.monotonic() + delay > first_failure + seconds
                if over or malformed >= MALFORMED_TRIES or stop.is_set():
                    raise self._failure(server, str(error), tries, advice) from error
                if announce and tries == 1 and is_rank_zero():
                    print(f"{server.url} {error}; asking again for up to {seconds:g} s", file=sys.stderr, flush=True)
                self._failed(server, delay, lost=isinstance(error, _Lost))
            finally:
                self._give_back(server)
            stop.wait(delay)
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
        urls = ", ".join(server.url for server in self.servers)
        return ServerError(
            f"`{self.field}.urls`: {urls} {what}; look at the servers' logs, then go on with --ckpt_path last"
        )

    def _borrow(self, only: _Server | None) -> _Server:
        """The least busy server, one that just failed only where all did."""
        with self._lock:
            now = time.monotonic()
            server = only or min(self.servers, key=lambda s: (s.rests_until > now, s.in_flight))
            server.in_flight += 1
            return server

    def _give_back(self, server: _Server) -> None:
        with self._lock:
            server.in_flight -= 1

    def _failed(self, server: _Server, delay: float, *, lost: bool) -> None:
        with self._lock:
            server.rests_until = time.monotonic() + 2 * delay
            self.num_lost += lost

    def _exchange(
        self, server: _Server, method: str, path: str, body: Any, *, as_json: bool = True, timeout: float | None = None
    ) -> Any:
        """One request and its answer, JSON unless ``as_json`` is False."""
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        key = os.environ.get(self.api_key_env, "") if self.api_key_env is not None else ""
        if key:
            headers["Authorization"] = f"Bearer {key}"
        status, data = _send(
            server,
            method,
            path,
            body=None if body is None else json.dumps(body).encode(),
            headers=headers,
            timeout=self.timeout if timeout is None else timeout,
            limit=self.max_response_bytes,
        )
        text = data.decode(errors="replace")
        shown = (text.replace(key, "***") if key else text)[:SHOWN]
        if status != http.client.OK:
            raise (_Transient if status in RETRIED else _Refused)(f"answered with HTTP status {status}: {shown}")
        try:
            return json.loads(data) if as_json else data
        except (ValueError, RecursionError) as error:
            raise _Transient(f"answered with what is no JSON: {shown!r}") from error


def _send(
    server: _Server, method: str, path: str, *, body: bytes | None, headers: dict[str, str], timeout: float, limit: int
) -> tuple[int, bytes]:
    """HTTP status and content of one request; the connection is cut at the time-out."""
    kind = http.client.HTTPSConnection if server.secure else http.client.HTTPConnection
    connection = kind(server.host, server.port, timeout=timeout)
    expired = threading.Event()
    try:
        connection.connect()
        watchdog = threading.Timer(timeout, _cut, (connection.sock, expired))
        watchdog.daemon = True
        watchdog.start()
        try:
            connection.request(method, server.prefix + path, body=body, headers=headers)
            response = connection.getresponse()
            if (response.length or 0) > limit:
                raise _too_long(limit)
            data = response.read(limit + 1)
        finally:
            watchdog.cancel()
    except ssl.SSLCertVerificationError as error:
        raise _Refused(
            f"has a certificate that is not trusted ({error.verify_message}); put its authority's certificate into the file "
            "that SSL_CERT_FILE names"
        ) from error
    except ssl.SSLError as error:
        if error.reason not in NO_TLS:
            raise _Lost(f"broke off its encrypted connection ({error.reason})") from error
        raise _Refused("does not speak https on this port; write http://") from error
    except (OSError, http.client.HTTPException) as error:
        late = expired.is_set() or isinstance(error, TimeoutError)
        if late:
            raise _Transient(f"gave no whole answer within {timeout:g} s") from error
        reason = " ".join(str(error).split())
        raise _Lost(f"could not be reached or broke off ({type(error).__name__}: {reason})") from error
    finally:
        connection.close()
    if len(data) > limit:
        raise _too_long(limit)
    if expired.is_set():
        raise _Transient(f"gave no whole answer within {timeout:g} s")
    if response.length:  # read() with a bound does not complain about a missing rest
        raise _Lost(f"broke off {response.length} bytes before the end of its answer")
    return response.status, data


def _too_long(limit: int) -> _Refused:
    return _Refused(f"answered with more than {limit} bytes; lower `rows_per_request` or raise `max_response_bytes`")


def _cut(sock: socket.socket, expired: threading.Event) -> None:
    """End whatever waits on the socket."""
    expired.set()
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:  # it is closed already
        pass


def checked_logprob(value: Any, where: str) -> float:
    """A log-prob from an answer, nats.

    Raises:
        Malformed: it is missing, no number, not finite, clamped or above 0.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not CLAMPED < value <= ROUNDING:
        raise Malformed(f"has no usable log-prob {where}: {value!r}")
    return min(float(value), 0.0)
