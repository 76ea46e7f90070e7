"""Whole runs of the embedded task through ``train.py``, each a process of its own, side by side on the device."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import Bench

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/quickstart.yaml"
STUDENT_FILE = "student/model.safetensors"
SAID_LINES = 4  # of a failed run's output
FSDP2 = ("--trainer.strategy", "ModelParallelStrategy", "--trainer.strategy.tensor_parallel_size", "1")
MIXED = ("--trainer.precision", "bf16-mixed")
LONG, MIDDLE, SHORT = 0, 1, 2  # which of ``Sizes.run_steps``
REFUSED = {"FSDP1": "Lightning refuses FSDP1 on a CPU"}  # of what is not tried there


@dataclass(frozen=True)
class Run:
    """A run of the quickstart.

    Args:
        options: of ``train.py fit`` beside those that all have.
        length: index into ``Sizes.run_steps``.
    """

    options: tuple[str, ...]
    length: int = LONG


def fsdp2(ranks: int) -> tuple[str, ...]:
    """FSDP2 over so many ranks."""
    return (*FSDP2, "--trainer.strategy.data_parallel_size", str(ranks))


RUNS = {
    "float32": Run(()),
    "bf16-mixed": Run(MIXED),
    "DDP": Run((*MIXED, "--trainer.strategy", "ddp")),
    "FSDP2": Run((*MIXED, *fsdp2(1)), MIDDLE),
    "FSDP1": Run((*MIXED, "--trainer.strategy", "FSDPStrategy"), MIDDLE),
    "divergence": Run((*MIXED, "--model.objective", "Divergence", "--model.objective.kind", "reverse_kl"), MIDDLE),
    "TransformersSampler": Run((*MIXED, "--model.sampler", "TransformersSampler"), MIDDLE),
    "LoRA, recomputation": Run(
        (*MIXED, "--model.student.lora", "{rank: 8}", "--model.student.gradient_checkpointing", "true"), SHORT
    ),
    "offload": Run(("--model.teacher.offload", "true"), SHORT),
    "VLLMEngine": Run(
        (
            *MIXED, "--model.sampler", "VLLMEngine", "--model.sampler.max_new_tokens", "48",
            "--model.sampler.memory_fraction", "0.2", "--model.sampler.engine_options", "{enforce_eager: true}",
        ),
        SHORT,
    ),
}  # fmt: skip


def words(bench: Bench, name: str, options: tuple[str, ...], steps: int, *, devices: int = 1) -> list[str]:
    """The arguments of Python for a run in ``folder``."""
    folder = bench.folder / "runs" / name
    given = ["train.py", "fit", "--config", CONFIG, "--run_dir", str(folder), "--wandb.mode", "disabled"]
    given += ["--trainer.accelerator", "gpu" if bench.on_gpu else "cpu", "--trainer.devices", str(devices)]
    given += ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps), "--overwrite", "true"]
    if bench.sizes.val_limit is not None:
        given += ["--data.val_limit", str(bench.sizes.val_limit)]
    return [*given, *(word.replace("{folder}", str(folder)) for word in options)]


def ran(bench: Bench, name: str, arguments: list[str]) -> dict[str, Any]:
    """Figures of a run that ended well.

    Raises:
        RuntimeError: it did not, with the end of what it printed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=max(bench.seconds_left - 2, 1),
    )  # fmt: skip
    if done.returncode != 0:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise RuntimeError(f"status {done.returncode}: {' / '.join(said[-SAID_LINES:])}")
    summary = json.loads((bench.folder / "runs" / name / "summary.json").read_text())
    kept = ("greedy_start", "greedy_end", "reverse_kl_start", "reverse_kl_end", "steps", "seconds")
    return {"wall_s": round(time.monotonic() - start, 1), **{key: summary.get(key) for key in kept}}


def run(bench: Bench) -> None:
    """Each way of running, all at once where the cores allow."""
    todo = []
    for name, one in RUNS.items():
        if not bench.on_gpu and name in REFUSED:
            bench.skip(name, REFUSED[name])
        elif name == "VLLMEngine" and (importlib.util.find_spec("vllm") is None or not bench.on_gpu):
            bench.skip(name, "vllm is not installed" if bench.on_gpu else "no GPU")
        else:
            todo.append((name, words(bench, name, one.options, bench.sizes.run_steps[one.length])))
    together(bench, todo)


def together(bench: Bench, todo: list[tuple[str, list[str]]]) -> None:
    """A row each."""
    (bench.folder / "runs").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda one: bench.attempt(one[0], lambda: ran(bench, *one)), todo))


def resume(bench: Bench) -> None:
    """Is a run that was cut in two the same, bit for bit, with ``trainer.deterministic``, and without?"""
    steps = bench.sizes.run_steps[SHORT]
    for name, options in (("deterministic", ("--trainer.deterministic", "true")), ("default", ())):

        def compare() -> dict[str, Any]:
            """Whether both students' files are the same bytes, and the largest difference of two weights."""
            whole, cut = f"resume-{name}-whole", f"resume-{name}-cut"  # noqa: B023
            todo = [(whole, words(bench, whole, options, steps)), (cut, words(bench, cut, options, steps // 2))]  # noqa: B023
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda one: ran(bench, *one), todo))
            again = words(bench, cut, (*options, "--ckpt_path", "last"), steps)  # noqa: B023
            at = again.index("--overwrite")
            ran(bench, cut, again[:at] + again[at + 2 :])
            files = [bench.folder / "runs" / one / STUDENT_FILE for one in (whole, cut)]
            equal = len({hashlib.sha256(file.read_bytes()).hexdigest() for file in files}) == 1
            if name == "deterministic" and not equal:  # noqa: B023
                raise AssertionError(f"not bit for bit: weights differ by up to {_apart(files):.3g}")
            return {"bit_for_bit": equal, "most_apart": _apart(files)}

        bench.attempt(name, compare)


def _apart(files: list[Path]) -> float:
    from safetensors.torch import load_file

    one, other = (load_file(file) for file in files)
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def ranks(bench: Bench) -> None:
    """The strategies on all GPUs of the machine; on two processes where it has none."""
    count = torch.cuda.device_count() if bench.on_gpu else 2
    if count < 2:
        bench.skip("ranks", "one GPU")
        return
    steps = bench.sizes.run_steps[SHORT]
    gloo = () if bench.on_gpu else ("--trainer.strategy.process_group_backend", "gloo")
    ways = {
        "DDP": ("--trainer.strategy", "DDPStrategy", *gloo),
        "FSDP2": (*fsdp2(count), *gloo),
        "FSDP1": ("--trainer.strategy", "FSDPStrategy"),
    }
    bench.attempt("one rank", lambda: ran(bench, "ranks-1", words(bench, "ranks-1", (), steps)))
    for name, options in ways.items():
        if not bench.on_gpu and name in REFUSED:
            bench.skip(name, REFUSED[name])
            continue
        folder = f"ranks-{name}"
        bench.attempt(
            name,
            lambda folder=folder, options=options: {  # type: ignore[misc]
                "ranks": count,
                **ran(bench, folder, words(bench, folder, options, steps, devices=count)),
            },
        )
