"""A local HTTP server that answers as vLLM's ``/v1/completions`` does, by running a tiny transformers model."""

from __future__ import annotations

import base64
import io
import json
import queue
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoModelForCausalLM

EOS = 1
Fault = Callable[["FakeServer", BaseHTTPRequestHandler, dict], bool]  # True: the fault has answered


PHASES = {
    "/init_weight_transfer_engine": "init", "/start_weight_update": "start", "/update_weights": "update",
    "/finish_weight_update": "finish",
}  # fmt: skip


class Transfer:
    """The worker side of vLLM's weight transfer by NCCL, its group a queue; strict about phases and fields."""

    def __init__(self) -> None:
        self.version, self.workers = "0.32.0", 1
        self.wire: queue.Queue[torch.Tensor] = queue.Queue()
        self.joined: dict[str, Any] | None = None
        self.phases: list[str] = []
        self.loaded: set[str] = set()
        self.fails: str | None = None  # the phase that answers with an error

    def phase(self, name: str, body: dict[str, Any], model: Any) -> str | None:
        """What is wrong, None where it was done."""
        self.phases.append(name)
        if name == self.fails:
            return f"{name} broke"
        if name == "init":
            self.joined = body["init_info"]
        elif name == "update":
            return self._load(body["update_info"], model)
        elif name == "start":
            self.loaded = set()
        return None

    @torch.no_grad()
    def _load(self, info: dict[str, Any], model: Any) -> str | None:
        if self.phases[-2] not in ("start", "update") or set(info) != {"names", "dtype_names", "shapes"}:
            return f"unexpected after {self.phases}: {sorted(info)}"
        own = model.state_dict()
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            value = self.wire.get(timeout=10)
            if str(value.dtype) != f"torch.{dtype}" or list(value.shape) != shape or own[name].shape != value.shape:
                return f"{name} is another"
            own[name].copy_(value)
            self.loaded.add(name)
        return None


class FakeServer(ThreadingHTTPServer):
    """``faults`` are taken one a completion request, from the front; ``requests`` counts those that were answered."""

    daemon_threads = True

    def __init__(self, path: str, *, model: str, window: int, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.causal_lm = AutoModelForCausalLM.from_pretrained(path)
        self.max_logprobs = 64  # as ``--max-logprobs``
        self.scores_ids = False  # whether the route of token ids is there, and knows chosen ids
        self.served_model, self.window = model, window
        self.lock = threading.Lock()
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        self.requests, self.reloads = 0, 0
        self.broken_resets: list[bool] = []  # which of the next requests for an empty prefix cache are hung up on
        self.transfer = Transfer()
        self.path, self.adapters = path, {}  # names that were loaded, with their merged models
        self.key: str | None = None
        self.secure = False

    @property
    def url(self) -> str:
        return f"http{'s' * self.secure}://127.0.0.1:{self.server_address[1]}"

    def encrypt(self, certificate: Path, key: Path) -> None:
        """Speak TLS from now on."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.secure = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        choices = [self._choice(index, prompt, body) for index, prompt in enumerate(body["prompt"])]
        return {"model": body["model"], "choices": choices[::-1]}  # vLLM promises no order

    def _choice(self, index: int, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        ids, start = list(prompt), len(prompt)
        generator = torch.Generator().manual_seed(body.get("seed", 0) % 2**32)
        values: list[float] = []
        while len(values) < body["max_tokens"] and not (values and ids[-1] in body.get("stop_token_ids", [EOS])):
            logprobs = _allowed(self.logprobs(ids, body["model"])[-1], body)
            greedy = body["temperature"] == 0
            token = int(logprobs.argmax() if greedy else torch.multinomial(logprobs.exp(), 1, generator=generator))
            ids.append(token)
            values.append(float(logprobs[token]))
        choice: dict[str, Any] = {"index": index, "finish_reason": "stop", "text": ""}
        if "prompt_logprobs" in body:
            choice["prompt_logprobs"] = self._listed(prompt, body["prompt_logprobs"])
        if body.get("return_token_ids"):
            choice |= {"token_ids": ids[start:], "prompt_token_ids": prompt, "logprobs": {"token_logprobs": values}}
        return choice

    def _listed(self, prompt: list[int], k: int) -> list[dict[str, Any] | None]:
        """As vLLM writes it: the position's own token first, then the k likeliest; each token once."""
        entries: list[dict[str, Any] | None] = [None]
        for row, own in zip(self.logprobs(prompt), prompt[1:], strict=False):
            ranks = row.argsort(descending=True).argsort() + 1
            tokens = dict.fromkeys([own, *row.topk(k).indices.tolist()])
            entries.append(
                {str(t): {"logprob": float(row[t]), "rank": int(ranks[t]), "decoded_token": f"t{t}"} for t in tokens}
            )
        return entries

    @torch.no_grad()
    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """As ``/inference/v1/generate``."""
        ids, settings = body["token_ids"], body["sampling_params"]
        answer = {"model": body["model"], "choices": [{"index": 0, "token_ids": [EOS]}], "prompt_logprobs": None}
        if settings.get("prompt_logprobs") is not None:
            answer["prompt_logprobs"] = self._listed(ids, settings["prompt_logprobs"])
        start, chosen = settings["prompt_logprob_start"], settings["prompt_logprob_token_ids"]
        assert len(chosen) == len(ids) - 1 - start
        rows = self.logprobs(ids)[start : start + len(chosen)]
        values = io.BytesIO()
        numpy.save(values, rows.gather(-1, torch.tensor(chosen)).numpy())
        answer["prompt_token_id_logprobs"] = base64.b64encode(values.getvalue()).decode()
        return answer

    def load_adapter(self, name: str, path: str) -> None:
        """A copy of the model with the adapter of a PEFT folder."""
        from peft import PeftModel

        self.adapters[name] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.path), path)

    def logprobs(self, ids: list[int], name: str | None = None) -> torch.Tensor:
        return self.adapters.get(name, self.causal_lm)(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def _allowed(logprobs: torch.Tensor, body: dict[str, Any]) -> torch.Tensor:
    """Processed as vLLM does: a bias on some logits, or some tokens only."""
    bias = torch.zeros_like(logprobs)
    for token, value in (body.get("logit_bias") or {}).items():
        bias[int(token)] = max(-100.0, min(100.0, value))
    if (only := body.get("allowed_token_ids")) is not None:
        bias[[token for token in range(len(bias)) if token not in only]] = -torch.inf
    return (logprobs + bias).log_softmax(-1)


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def reply(self, data: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def refused(self) -> bool:
        """True where the key is not the server's; the answer repeats what was sent, as a careless proxy might."""
        sent = self.headers.get("Authorization")
        if self.server.key is None or sent == f"Bearer {self.server.key}":
            return False
        self.reply(json.dumps({"error": f"{sent} is not authorised"}).encode(), 401)
        return True

    def do_GET(self) -> None:
        if self.refused():
            return
        known = {
            "/version": {"version": self.server.transfer.version},
            "/get_world_size": {"world_size": self.server.transfer.workers},
        }
        if self.path in known:
            return self.reply(json.dumps(known[self.path]).encode())
        window = {"max_model_len": self.server.window}
        cards = [{"id": name, "parent": self.server.served_model, **window} for name in self.server.adapters]
        cards.append({"id": self.server.served_model, "parent": None, **window})
        self.reply(json.dumps({"data": cards}).encode())

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        if self.path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            with server.lock:
                server.causal_lm = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"])
                server.reloads += 1
            return self.reply(b"")
        if self.path == "/reset_prefix_cache":
            if server.broken_resets and server.broken_resets.pop(0):
                self.close_connection = True
                return
            return self.reply(b'{"success": true}')
        if self.path == "/v1/load_lora_adapter":
            with server.lock:
                server.load_adapter(body["lora_name"], body["lora_path"])
            return self.reply(b"Success")
        if self.path == "/v1/unload_lora_adapter":
            known = server.adapters.pop(body["lora_name"], None) is not None
            return self.reply(b"Success" if known else b'{"error": "cannot be found"}', 200 if known else 404)
        if self.path in PHASES:
            refused = server.transfer.phase(PHASES[self.path], body, server.causal_lm)
            return self.reply(
                json.dumps({"error": refused} if refused else {"message": "done"}).encode(), 500 if refused else 200
            )
        with server.lock:
            fault = server.faults.pop(0) if server.faults else server.always
        rows = server.causal_lm.config.vocab_size
        if self.path == "/inference/v1/generate":
            return self.generated(fault, body)
        if (wanted := body.get("prompt_logprobs", 0)) > server.max_logprobs:
            said = f"Requested prompt logprobs of {wanted}, which is greater than max allowed: {server.max_logprobs}"
            return self.reply(json.dumps({"error": {"message": said}}).encode(), 400)
        if any(token >= rows for prompt in body["prompt"] for token in prompt):
            return self.reply(b'{"error": {"message": "Token id is out of vocabulary"}}', 400)
        if fault is None or not fault(server, self, body):
            with server.lock:
                server.requests += 1
                if body["model"] not in (server.served_model, *server.adapters):
                    return self.reply(b'{"error": {"message": "The model does not exist"}}', 404)
                data = json.dumps(server.complete(body)).encode()
            self.reply(data)

    def generated(self, fault: Fault | None, body: dict[str, Any]) -> None:
        server = self.server
        if not server.scores_ids:
            return self.reply(b'{"error": {"message": "Scale-out endpoints are disabled"}}', 403)
        if any(len(row) > server.max_logprobs for row in body["sampling_params"]["prompt_logprob_token_ids"]):
            return self.reply(b'{"error": {"message": "Set max_logprobs (--max-logprobs)"}}', 400)
        if fault is None or not fault(server, self, body):
            with server.lock:
                server.requests += 1
                data = json.dumps(server.generate(body)).encode()
            self.reply(data)


# -- faults: what a proxy or a sick server does ------------------------------------------------------------------------


def fine(server: FakeServer, handler: Any, body: dict) -> bool:
    """No fault: the right answer."""
    return False


def status(code: int, **headers: str) -> Fault:
    return lambda server, handler, body: handler.reply(b"no", code, **headers) or True


def delay(seconds: float) -> Fault:
    return lambda server, handler, body: bool(time.sleep(seconds))


def raw(data: bytes, length: int | None = None) -> Fault:
    return lambda server, handler, body: handler.reply(data, length=length) or True


def cut(server: FakeServer, handler: Any, body: dict) -> bool:
    data = json.dumps(server.complete(body)).encode()
    handler.reply(data[: len(data) // 2], length=len(data))
    handler.close_connection = True
    return True


def hang_up(server: FakeServer, handler: Any, body: dict) -> bool:
    handler.close_connection = True
    return True


def trickle(server: FakeServer, handler: Any, body: dict) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    try:
        for _ in range(100):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.1)
    except OSError:
        pass
    return True


def changed(change: Callable[[dict], Any]) -> Fault:
    """The right answer after ``change``."""

    def fault(server: FakeServer, handler: Any, body: dict) -> bool:
        answer = server.generate(body) if "token_ids" in body else server.complete(body)
        change(answer)
        handler.reply(json.dumps(answer).encode())
        return True

    return fault


@contextmanager
def serving(path: str, *, model: str = "tiny", window: int = 64) -> Iterator[FakeServer]:
    server = FakeServer(path, model=model, window=window)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
