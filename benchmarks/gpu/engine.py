"""The vLLM engine: tokens a second, seconds of start, sleep, wake and new weights, agreement with the scorer."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.decoding import GAPS, HALF, asked, prompts
from benchmarks.gpu.sizes import EOS, random_model
from lit_opd.models import StudentSettings, load_tokenizer
from lit_opd.models.weights import StudentWeights
from lit_opd.rollout import VLLMEngine
from lit_opd.rollout.weights import Way
from lit_opd.scoring.model import ScoringModel

ROWS, TOKENS = 32, 256
MEMORY_FRACTION = 0.4


def run(bench: Bench) -> None:
    """Eager first, then with weights by CUDA IPC, then with CUDA graphs, each with an engine of its own."""
    if importlib.util.find_spec("vllm") is None or not bench.on_gpu:
        bench.skip("engine", "vllm is not installed" if bench.on_gpu else "no GPU")
        return
    folder = bench.models()
    eager: dict[str, Any] = {"enforce_eager": True}
    for name, options, way in (("eager", eager, "folder"), ("CUDA IPC", eager, "ipc"), ("CUDA graphs", {}, "folder")):
        bench.attempt(name, lambda options=options, way=way: measured(bench, folder, options, way))  # type: ignore[misc]


def measured(bench: Bench, folder: Path, options: dict[str, Any], way: Way) -> dict[str, Any]:
    """Figures of one engine, whose weights travel by ``way``."""
    model = random_model(bench.sizes.student, bench.sizes.vocabulary, dtype=torch.bfloat16, device=bench.device, seed=0)
    policy = ScoringModel(model, vocabulary=bench.sizes.vocabulary)
    sampler = VLLMEngine(
        str(bench.folder / "vllm-student"),
        max_new_tokens=TOKENS,
        memory_fraction=MEMORY_FRACTION,
        engine_options=options,
        weights=way,
    )
    sampler.check(tokens=TOKENS + 64, vocabulary=bench.sizes.vocabulary)

    source = str(folder / "student")
    student = StudentWeights(policy, StudentSettings(source), load_tokenizer(source, "student"), stop_ids=(EOS,))
    found: dict[str, Any] = {}

    def timed(name: str, call: Any) -> Any:
        start = time.monotonic()
        out = call()
        found[name] = round(time.monotonic() - start, 2)
        return out

    timed("start_s", lambda: sampler.prepare(student, 0))
    batch, settings = prompts(bench, ROWS), asked(bench, TOKENS)
    timed("first_s", lambda: sampler.sample(policy, batch, settings))
    rollout = timed("sample_s", lambda: sampler.sample(policy, batch, settings))
    timed("new_weights_s", lambda: sampler.prepare(student, 1))
    with torch.no_grad():
        gap = (policy(rollout).logprobs - rollout.sampler_logprobs).abs().mean()
    if float(gap) > GAPS[HALF]:
        raise AssertionError(f"a mean gap of {float(gap):.3g} nats, above {GAPS[HALF]}")
    return {**found, "tokens_per_s": round(ROWS * TOKENS / found["sample_s"]), "gap": float(gap)}
