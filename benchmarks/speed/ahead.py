"""Seconds a step with and without sampling ahead, against a server in a process of its own that answers after a known time.

    python -m benchmarks.speed.ahead --latency 4 --steps 6

The server draws random tokens, so only time is measured: a step without overlap takes sampling plus training, one with it the
longer of the two.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any

import lightning as L

from lit_opd.models.student import StudentSettings
from lit_opd.module import OPDModule
from lit_opd.prompts import PromptDataModule
from lit_opd.rollout import VLLMSampler
from lit_opd.shipped import shipped_path
from lit_opd.teacher import LocalTeacher

ASSETS = "lit_opd/testbed/assets"
LETTERS, TOKENS, WARM = (4, 60), 48, 2  # token ids that are drawn; a response; steps that are not counted


class _Slow(BaseHTTPRequestHandler):
    latency = 0.0

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def _answer(self, found: dict[str, Any]) -> None:
        data = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        """What it serves."""
        self._answer({"data": [{"id": "slow", "parent": None, "max_model_len": 4096}]})

    def do_POST(self) -> None:
        """Random tokens, after a while."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(self.latency if body["max_tokens"] == TOKENS else 0.0)  # the check before a run asks for one token
        draw, count = random.Random(body["seed"]), body["max_tokens"]
        ids = [draw.randrange(*LETTERS) for _ in range(count)]
        choice = {
            "index": 0,
            "token_ids": ids,
            "prompt_token_ids": body["prompt"][0],
            "logprobs": {"token_logprobs": [-4.0] * count},
        }
        self._answer({"model": "slow", "choices": [choice]})


class _Server(ThreadingHTTPServer):
    request_queue_size = 1024  # connections that wait to be taken; with 5, the default, a batch would come in bursts
    daemon_threads = True


def _serve(latency: float, told: Connection) -> None:
    _Slow.latency = latency
    server = _Server(("127.0.0.1", 0), _Slow)
    told.send(server.server_address[1])
    server.serve_forever()


@contextmanager
def slow_server(latency: float) -> Iterator[str]:
    """The address of a server that answers each request after ``latency`` seconds."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(latency, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()


class _Seconds(L.Callback):
    """Of every step, and of sampling in it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.sampling: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Read it."""
        self.steps.append(time.perf_counter() - self._start)
        self.sampling.append(outputs["step"].seconds["sampling"])


def measure(url: str, *, ahead: int, steps: int, rows: int) -> dict[str, float]:
    """Median seconds of a step, and of what is not sampling in it."""
    sampler = VLLMSampler([url], max_new_tokens=TOKENS, max_logprob_gap=float("inf"), ahead=ahead)
    folders = [shipped_path(f"{ASSETS}/{name}") for name in ("student", "teacher")]
    module = OPDModule(StudentSettings(folders[0]), LocalTeacher(folders[1]), sampler, seed=0)
    data = PromptDataModule(train=shipped_path(f"{ASSETS}/train.jsonl"), prompt_batch=rows, max_prompt_tokens=64)
    seconds = _Seconds()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_steps=steps + WARM + 1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[seconds], default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
    counted = slice(WARM, -1)  # after the last step nothing is on its way
    training = [whole - part for whole, part in zip(seconds.steps, seconds.sampling, strict=True)]
    return {"step": statistics.median(seconds.steps[counted]), "training": statistics.median(training[counted])}


def main() -> None:
    """Both ways in one process, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=4.0, help="seconds until the server answers")
    parser.add_argument("--steps", type=int, default=6, help="that are counted")
    parser.add_argument("--rows", type=int, default=128, help="of a batch")
    asked = parser.parse_args()
    with slow_server(asked.latency) as url:
        found = {ahead: measure(url, ahead=ahead, steps=asked.steps, rows=asked.rows) for ahead in (0, 1)}
    longer = max(asked.latency, found[1]["training"])
    for ahead, own in found.items():
        print(f"ahead {ahead}: {own['step']:.2f} s a step, {own['training']:.2f} s of it training")
    print(f"the longer of {asked.latency:.2f} s sampling and {found[1]['training']:.2f} s training: {longer:.2f} s")
    print(f"ahead 1 over the longer one: {found[1]['step'] / longer:.3f}")


if __name__ == "__main__":
    main()
