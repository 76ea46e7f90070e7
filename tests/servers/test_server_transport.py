"""What a request may cost and where it may go: total time, bytes, hosts, connections, keys; against scripted sockets."""

from __future__ import annotations

import gzip
import json
import logging
import os
import signal
import socket
import threading
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from lit_opd.errors import InputError, ServerError
from lit_opd.servers.client import Servers

SECRET = "sk-not-for-logs"
MIB = 2**20
ANSWER = json.dumps({"model": "tiny", "choices": [{"index": 0}]}).encode()
Script = Callable[[socket.socket, int], Any]  # what is done with the connection after its N-th request, from 0


class Listening:
    """A server that follows a script, and what it saw."""

    def __init__(self, script: Script) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.script, self.heads, self.connections, self.hung_up = script, [], 0, 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection = self.socket.accept()[0]
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            reader = connection.makefile("rb")
            while head := _head(reader):
                lengths = [
                    line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-length")
                ]
                reader.read(int(lengths[0]) if lengths else 0)
                self.heads.append(head.lower())
                if self.script(connection, len(self.heads) - 1) is False:
                    return
        self.hung_up += 1


def _head(reader: Any) -> str:
    lines = [b""]
    while (line := reader.readline()) not in (b"", b"\r\n"):
        lines.append(line)
    return b"".join(lines).decode("latin-1")


@contextmanager
def listening(script: Script) -> Iterator[Listening]:
    running = Listening(script)
    try:
        yield running
    finally:
        running.socket.shutdown(socket.SHUT_RDWR)  # closing alone does not end the waiting accept
        running.socket.close()


def says(data: bytes, status: str = "200 OK", **headers: str) -> Script:
    """One answer to every request; the connection stays open."""
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    whole = f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n{''.join(lines)}\r\n".encode() + data
    return lambda connection, index: connection.sendall(whole)


def silent(connection: socket.socket, index: int) -> None:
    """No answer; the connection stays open."""


def client(url: str, **changes: Any) -> Servers:
    settings = {"max_concurrency": 4, "timeout": 5.0, "retry_seconds": 0.0, "start_seconds": 0.0}
    return Servers([url], **({"model": "tiny", "field": "here", "max_response_bytes": MIB} | settings | changes))


def ask(servers: Servers, count: int = 1) -> list[Any]:
    return servers.complete([{"prompt": [[1]], "max_tokens": 1}] * count, lambda choices, index: index)


def soon(true: Callable[[], bool]) -> bool:
    for _ in range(100):
        if true():
            return True
        time.sleep(0.05)
    return False


# -- time --------------------------------------------------------------------------------------------------------------


def dripping(start: bytes, drop: bytes) -> Script:
    """A byte or so every 20 ms for ten seconds."""

    def script(connection: socket.socket, index: int) -> None:
        connection.sendall(start)
        for _ in range(500):
            connection.sendall(drop)
            time.sleep(0.02)

    return script


DRIPS = {
    "status line": dripping(b"HTTP/1.1 200 ", b"O"),
    "interim answers": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "header": dripping(b"HTTP/1.1 200 OK\r\nLong: ", b"x"),
    "body": dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
    "chunks": dripping(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "nothing": silent,
}


@pytest.mark.parametrize("where", sorted(DRIPS))
def test_an_answer_that_drips_is_cut_when_the_whole_time_is_over(where):
    with listening(DRIPS[where]) as server:
        start = time.monotonic()
        with pytest.raises(ServerError, match="gave no whole answer within 0.5 s"):
            ask(client(server.url, timeout=0.5))
        assert 0.5 <= time.monotonic() - start < 3.0


def test_a_handshake_that_nobody_answers_is_cut_too():
    with listening(silent) as server:
        start = time.monotonic()
        with pytest.raises(ServerError, match="gave no whole answer within 0.5 s"):
            ask(client(server.url.replace("http:", "https:"), timeout=0.5))
        assert time.monotonic() - start < 3.0


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found"])
def test_an_endless_answer_is_read_up_to_the_limit(status):
    sent = []

    def flood(connection: socket.socket, index: int) -> None:
        connection.sendall(f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        while True:
            connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
            sent.append(65536)

    with listening(flood) as server, pytest.raises(ServerError, match="answered with more than 1048576 bytes"):
        ask(client(server.url))
    assert sum(sent) < 30 * MIB  # the rest lies in the sockets' buffers


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found"])
def test_a_small_answer_that_unpacks_to_a_huge_one_is_refused_packed(status):
    bomb = gzip.compress(bytes(200 * MIB), compresslevel=9)
    assert len(bomb) < MIB
    with listening(says(bomb, status, Content_Encoding="gzip")) as server:
        tracemalloc.start()
        try:
            with pytest.raises(ServerError, match=r"compressed \(gzip\)|404"):
                ask(client(server.url, retry_seconds=60.0))
            assert tracemalloc.get_traced_memory()[1] < 20 * MIB
        finally:
            tracemalloc.stop()
        assert len(server.heads) == 1 and "accept-encoding: identity" in server.heads[0]


# -- hosts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(code):
    with listening(says(ANSWER)) as other, listening(says(b"", f"{code} Moved", Location=other.url)) as server:
        with pytest.raises(ServerError, match=f"HTTP status {code}"):
            ask(client(server.url))
        with pytest.raises(ServerError, match=f"HTTP status {code}"):
            client(server.url).check(tokens=None)
        assert not other.connections


def test_proxies_and_passwords_of_the_environment_and_cookies_are_left_alone(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with listening(says(ANSWER)) as proxy, listening(says(ANSWER, Set_Cookie="a=b")) as server:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert ask(client(server.url, max_concurrency=1), 3) == [0, 1, 2]
        assert len(server.heads) == 3 and not proxy.connections
        assert not any("authorization" in head or "cookie" in head for head in server.heads)


@pytest.mark.parametrize("index", [[0], {}, True, 0.0, None, "0"])
def test_an_index_that_is_no_number_is_no_answer(index):
    answer = json.dumps({"model": "tiny", "choices": [{"index": index}]}).encode()
    with listening(says(answer)) as server, pytest.raises(ServerError, match="their indices are wrong"):
        ask(client(server.url))


def test_a_window_that_is_no_number_is_no_answer():
    answer = json.dumps({"data": [{"id": "tiny", "max_model_len": "4096"}]}).encode()
    with listening(says(answer)) as server, pytest.raises(ServerError, match="max_model_len that is no whole number"):
        client(server.url).check(tokens=10)


# -- keys --------------------------------------------------------------------------------------------------------------


ECHOES = {
    "model": says(json.dumps({"model": f"key {SECRET}", "choices": [{"index": 0}]}).encode()),
    "body": says(SECRET.encode(), "401 Unauthorized"),
    "no JSON": says(f"{{{SECRET}".encode()),
    "encoding": says(b"", Content_Encoding=SECRET),
    "status line": lambda connection, index: connection.sendall(f"Bearer {SECRET}\r\n\r\n".encode()),
    "header": lambda connection, index: connection.sendall(f"HTTP/1.1 200 OK\r\n{SECRET}\r\n\r\n".encode()),
}


@pytest.mark.parametrize("where", sorted(ECHOES))
def test_a_key_that_comes_back_is_in_no_error_and_no_traceback(where, monkeypatch, caplog):
    monkeypatch.setenv("THE_KEY", SECRET)
    caplog.set_level(logging.INFO)
    with listening(ECHOES[where]) as server, pytest.raises(ServerError) as caught:
        ask(client(server.url, api_key_env="THE_KEY"))
    assert f"authorization: bearer {SECRET}" in server.heads[0]
    assert SECRET not in "".join(traceback.format_exception(caught.value)) + caplog.text


def test_a_key_among_the_models_is_not_shown(monkeypatch):
    monkeypatch.setenv("THE_KEY", SECRET)
    with listening(says(json.dumps({"data": [{"id": SECRET}]}).encode())) as server:
        with pytest.raises(InputError, match=r"must be one of \['\*\*\*'\]") as caught:
            client(server.url, api_key_env="THE_KEY").check(tokens=None)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("key", [f"{SECRET}\n", f"{SECRET} ", f"{SECRET}é", f"a\r\nHost: {SECRET}"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key, monkeypatch):
    monkeypatch.setenv("THE_KEY", key)
    with listening(says(ANSWER)) as server:
        for call in (ask, lambda servers: servers.check(tokens=None)):
            with pytest.raises(InputError, match="api_key_env.*'THE_KEY', which holds a space") as caught:
                call(client(server.url, api_key_env="THE_KEY"))
            assert SECRET not in "".join(traceback.format_exception(caught.value))
        assert not server.heads


# -- connections -------------------------------------------------------------------------------------------------------


def test_requests_of_a_call_share_connections_and_leave_none_open():
    with listening(says(ANSWER)) as server:
        assert ask(client(server.url), 40) == list(range(40))
        assert len(server.heads) == 40 and server.connections <= 4
        assert soon(lambda: server.hung_up == server.connections)


def test_what_broke_says_how():
    with listening(lambda connection, index: False) as server:
        servers = client(server.url)
        with pytest.raises(ServerError, match=r"broke off \(\w+: Server disconnected without sending a response"):
            ask(servers)
    with pytest.raises(ServerError, match=r"broke off \(ConnectionRefusedError: .*127.0.0.1"):
        ask(servers)


@pytest.mark.parametrize("url", ["http://host:99999", "http://[::1", "http://host/\x00"])
def test_an_address_that_no_request_could_reach_is_refused_at_once(url):
    with pytest.raises(InputError, match="here.urls"):
        client(url)


def test_one_failure_gives_the_other_requests_up():
    fails = says(b"no", "404 Not Found")

    def script(connection: socket.socket, index: int) -> None:
        if index == 3:
            fails(connection, index)

    with listening(script) as server:
        with pytest.raises(ServerError, match="404"):
            ask(client(server.url, timeout=600.0), 8)
        assert soon(lambda: server.hung_up == 4)


def test_an_interruption_ends_the_call_and_its_requests_at_once():
    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with listening(silent) as server:
        servers, before = client(server.url, timeout=600.0), signal.signal(signal.SIGALRM, interrupt)
        try:
            start = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            with pytest.raises(KeyboardInterrupt):
                ask(servers, 8)
            assert time.monotonic() - start < 3.0
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
        assert server.connections == 4 and soon(lambda: server.hung_up == 4)
        server.script = says(ANSWER)
        assert ask(servers) == [0]


def test_a_forked_process_asks_by_itself():
    with listening(says(ANSWER)) as server:
        servers = client(server.url)
        ask(servers)
        child = os.fork()
        if child == 0:
            os._exit(0 if ask(servers) == [0] else 1)
        ended = soon(lambda: os.waitpid(child, os.WNOHANG)[0] == child)
        if not ended:
            os.kill(child, signal.SIGKILL)
        assert ended and len(server.heads) == 2
