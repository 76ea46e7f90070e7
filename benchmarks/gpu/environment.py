"""What the figures depend on: device, driver, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench, in_gib

PACKAGES = (
    "torch",
    "transformers",
    "lightning",
    "triton",
    "vllm",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "flash-attn",
)


def run(bench: Bench) -> None:
    """One row."""
    device = {"device": _cpu(), "memory_gib": None, "gpus": 0}
    if bench.on_gpu:
        seen = torch.cuda.get_device_properties(0)
        device = {"device": seen.name, "memory_gib": in_gib(seen.total_memory), "gpus": torch.cuda.device_count()}
    bench.note(
        "environment",
        date=datetime.date.today().isoformat(),
        **device,
        cores=len(os.sched_getaffinity(0)),
        driver=_said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        cuda=torch.version.cuda,
        python=platform.python_version(),
        versions={name: found for name in PACKAGES if (found := _version(name)) is not None},
        commit=_said("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
        tiny=bench.sizes.run_steps[0] < 10,
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    """First line of what a program prints; None where there is no such program or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)
