"""Sampling: seconds of a decode step, agreement of samplers and scorer, and what a step launches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sizes import PAD, PROMPT, random_model
from lit_opd.rollout import DecodeSampler, Sampler, SamplingSettings, TransformersSampler
from lit_opd.scoring.model import ScoringModel
from lit_opd.types import PromptBatch

MIXED, HALF, FULL = "bf16-mixed", "bf16 weights", "float32"
SAMPLERS: tuple[type[Sampler], ...] = (DecodeSampler, TransformersSampler)
PARITY_ROWS, PARITY_TOKENS = 8, 32
GAPS = {MIXED: 0.02, HALF: 0.05, FULL: 1e-4}  # nats, mean |sampler - scorer| that is taken for rounding
PROFILE_ROWS, PROFILE_TOKENS = 32, 8
TOP_OPERATIONS = 8


def policies(bench: Bench) -> Iterator[tuple[str, ScoringModel, AbstractContextManager[Any]]]:
    """The student in each precision, and the context it runs in."""
    for name, dtype in ((MIXED, torch.float32), (HALF, torch.bfloat16), (FULL, torch.float32)):
        model = random_model(bench.sizes.student, bench.sizes.vocabulary, dtype=dtype, device=bench.device, seed=0)
        # Lightning's context: weights are cast at every use
        mixed = torch.autocast(bench.device, torch.bfloat16, cache_enabled=False)
        yield name, ScoringModel(model, vocabulary=bench.sizes.vocabulary), mixed if name == MIXED else nullcontext()
        del model
        if bench.on_gpu:
            torch.cuda.empty_cache()


def prompts(bench: Bench, rows: int) -> PromptBatch:
    """Random prompts of ``PROMPT`` tokens."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, bench.sizes.vocabulary, (rows, PROMPT), generator=draw).to(bench.device)
    keys = torch.arange(rows, device=bench.device)
    return PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), keys, tuple(map(str, range(rows))))


def asked(bench: Bench, tokens: int) -> SamplingSettings:
    """So many tokens of every row: nothing ends one."""
    return SamplingSettings(max_new_tokens=tokens, stop_ids=(), pad_id=PAD, vocabulary=bench.sizes.vocabulary)


def decode(bench: Bench) -> None:
    """Milliseconds a decode step (one token a row), without the prefill."""
    tokens, first = bench.sizes.decode_tokens, 1
    for weights, policy, context in policies(bench):
        for rows in bench.sizes.decode_rows:
            for kind in SAMPLERS:
                sampler, batch = kind(max_new_tokens=tokens + first), prompts(bench, rows)

                def seconds(count: int) -> float:
                    return bench.median_seconds(lambda: sampler.sample(policy, batch, asked(bench, count)), 1)  # noqa: B023

                def run() -> dict[str, Any]:
                    with context:  # noqa: B023
                        step = (seconds(tokens + first) - seconds(first)) / tokens
                    return {"ms": round(1000 * step, 2), "tokens_per_s": round(rows / max(step, 1e-9))}  # noqa: B023

                bench.attempt(f"{weights}, {kind.__name__}, {rows} rows", run)


def parity(bench: Bench) -> None:
    """Do sampler and scorer give the same log-probs, and both samplers the same tokens?"""
    for weights, policy, context in policies(bench):

        def run() -> dict[str, Any]:
            """Mean and largest gap of each sampler from the scorer, nats, and how often both drew the same token."""
            found: dict[str, Any] = {}
            ids = []
            for kind in SAMPLERS:
                sampler = kind(max_new_tokens=PARITY_TOKENS)
                with context:  # noqa: B023
                    rollout = sampler.sample(policy, prompts(bench, PARITY_ROWS), asked(bench, PARITY_TOKENS))  # noqa: B023
                    with torch.no_grad():
                        scored = policy(rollout).logprobs  # noqa: B023
                gap = (scored - rollout.sampler_logprobs).abs()
                found[f"{kind.__name__} mean"], found[f"{kind.__name__} most"] = float(gap.mean()), float(gap.max())
                ids.append(rollout.response_ids)
            found["tokens equal"] = float((ids[0] == ids[1]).float().mean())
            worst = max(found[f"{kind.__name__} mean"] for kind in SAMPLERS)
            if worst > GAPS[weights]:  # noqa: B023
                raise AssertionError(f"a mean gap of {worst:.3g} nats, above {GAPS[weights]}")  # noqa: B023
            return found

        bench.attempt(weights, run)


def profile(bench: Bench) -> None:
    """Launches, and milliseconds of the processor and the device, of a few decode steps."""
    rows = min(PROFILE_ROWS, max(bench.sizes.decode_rows))
    for weights, policy, context in policies(bench):
        if weights == FULL:
            continue

        def run() -> dict[str, Any]:
            """Launches of a rollout, its milliseconds on device and CPU, and its slowest operations with their counts."""
            sampler, batch = DecodeSampler(max_new_tokens=PROFILE_TOKENS), prompts(bench, rows)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
            with context:  # noqa: B023
                sampler.sample(policy, batch, asked(bench, PROFILE_TOKENS))  # noqa: B023
                with torch.profiler.profile(activities=activities) as seen:
                    sampler.sample(policy, batch, asked(bench, PROFILE_TOKENS))  # noqa: B023
                    bench.synchronise()
            events = seen.key_averages()
            launches = [event for event in events if "LaunchKernel" in event.key or "GraphLaunch" in event.key]
            device = sum(getattr(event, "self_device_time_total", 0.0) for event in events)
            top = sorted(
                events, key=lambda event: -getattr(event, "self_device_time_total", 0.0) or -event.self_cpu_time_total
            )
            return {
                "launches": sum(event.count for event in launches),
                "device_ms": round(device / 1000, 2),
                "cpu_ms": round(sum(event.self_cpu_time_total for event in events) / 1000, 2),
                "top": [[event.key[:60], event.count] for event in top[:TOP_OPERATIONS]],
            }

        bench.attempt(f"{weights}, {rows} rows, {PROFILE_TOKENS} tokens", run)
