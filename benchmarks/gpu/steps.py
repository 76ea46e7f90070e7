"""Whole training steps: seconds by phase, tokens a second, and the peak beside preflight's estimate."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, in_gib
from benchmarks.gpu.sizes import PROMPTS, STUDENT, TEACHER, StepSize
from benchmarks.timed import Timed
from lit_opd.models.student import StudentSettings
from lit_opd.module import OPDModule
from lit_opd.preflight.estimate import estimate
from lit_opd.preflight.plan import read_plan
from lit_opd.prompts import PromptDataModule
from lit_opd.rollout import DecodeSampler, Sampler, SamplingSettings
from lit_opd.rollout.base import finish
from lit_opd.teacher import LocalTeacher
from lit_opd.types import PromptBatch, Rollout

MIXED = "bf16-mixed"


class RandomSampler(Sampler):
    """Random ids in no time, so that a step is scoring and update; its log-probs are made up and not compared."""

    max_logprob_gap = math.inf

    @torch.no_grad()
    def sample(self, model: Any, prompts: PromptBatch, settings: SamplingSettings) -> Rollout:
        """[B, max_new_tokens]."""
        shape, device = (len(prompts), settings.max_new_tokens), prompts.ids.device
        draw = torch.Generator(device=device).manual_seed(settings.step)
        ids = torch.randint(2, settings.vocabulary, shape, generator=draw, device=device)
        return finish(prompts, ids, torch.zeros(shape, device=device), settings, engine="random")


class Watch(L.Callback):
    """A row of figures a step."""

    def __init__(self, bench: Bench, timed: dict[str, Timed]) -> None:
        self.bench, self.timed = bench, timed
        self.steps: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        self.start = self.bench.clock()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step ended."""
        row = {"step": self.bench.clock() - self.start, **{name: timed.taken() for name, timed in self.timed.items()}}
        row["update"] = row["step"] - sum(row[name] for name in self.timed)
        self.steps.append(row)
        self.tokens = int(outputs["step"].sampled_tokens)
        trainer.should_stop = trainer.should_stop or self.bench.seconds_left < 3 * row["step"]


def run(bench: Bench) -> None:
    """One row a shape."""
    folder = bench.models()
    for size in bench.sizes.steps:
        bench.attempt(size.name, lambda size=size: measured(bench, str(folder), size))  # type: ignore[misc]


def module_of(folder: str, size: StepSize) -> OPDModule:
    """What is trained; nothing ends a response."""
    kind: Callable[..., Sampler] = DecodeSampler if size.sampled else RandomSampler
    module = OPDModule(
        StudentSettings(f"{folder}/{STUDENT}", gradient_checkpointing=size.recompute),
        LocalTeacher(f"{folder}/{TEACHER}", dtype="bfloat16"),
        sampler=kind(max_new_tokens=size.tokens),
        token_budget=size.budget,
        seed=0,
    )
    module.__dict__["stop_ids"] = ()
    return module


def measured(bench: Bench, folder: str, size: StepSize) -> dict[str, Any]:
    """The figures of a shape."""
    module = module_of(folder, size)
    data = PromptDataModule(f"{folder}/{PROMPTS}", prompt_batch=size.rows, max_prompt_tokens=64)
    watch = Watch(
        bench,
        {
            "sampling": Timed(module.sampler, "sample", bench.clock),
            "teacher": Timed(module.teacher, "score", bench.clock),
        },
    )
    accelerator = "gpu" if bench.on_gpu else "cpu"
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=MIXED,
        max_steps=bench.sizes.step_repeats + 1,
        logger=False,
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    bench.reset_peak()
    started = time.monotonic()
    trainer.fit(module, datamodule=data)
    peak = bench.peak()
    plan = read_plan({"accelerator": accelerator, "devices": 1, "precision": MIXED}, strategy="auto", memory_gb=None)
    steps = watch.steps[1:] or watch.steps
    row = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    return {
        **{f"{name}_s": round(value, 4) for name, value in row.items()},
        "tokens": watch.tokens,
        "tokens_per_s_update": round(watch.tokens / row["update"]),
        "tokens_per_s_trained": round(watch.tokens / (row["update"] + row["teacher"])),
        "first_step_s": round(watch.steps[0]["step"], 2),
        "whole_s": round(time.monotonic() - started, 1),
        "peak_gib": in_gib(peak),
        "estimated_gib": in_gib(estimate(module, data, plan).peak),
        "finite": _finite(module),
    }


def _finite(module: OPDModule) -> bool:
    found: list[Tensor] = [parameter.isfinite().all() for parameter in module.parameters()]
    return bool(torch.stack(found).all())
