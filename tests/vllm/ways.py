"""Run by vLLM's own Python: ``python -m tests.vllm.ways WAY STUDENT TEACHER OUT``; what a real engine samples after new weights.

- ``ipc``: with vLLM's own IPC engine in this process, which opens shared memory where it would open CUDA's.
- ``adapter``: of a student with LoRA; the second version has another adapter on the same model.
- ``cache``: an engine that cannot start for lack of cache; the error is written.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lit_opd.errors import ServerError
from lit_opd.models import LoraSettings, StudentSettings, build_student, load_tokenizer
from lit_opd.models.weights import StudentWeights
from lit_opd.rollout import SamplingSettings, VLLMEngine, engine, ipc
from lit_opd.scoring.model import ScoringModel
from tests.helpers import fixed

SETTINGS = SamplingSettings(max_new_tokens=16, stop_ids=(1,), pad_id=0, vocabulary=64, seed=3)
OPTIONS: dict[str, Any] = {"enforce_eager": True, "dtype": "float32"}
LOCAL = "this machine"  # the name of the device whose memory is shared
_BUFFERS: dict[int, torch.Tensor] = {}


def student(path: str, lora: LoraSettings | None = None, seed: int = 0) -> StudentWeights:
    """A student of a folder; its adapter, where it has one, changes something, by ``seed``."""
    settings = StudentSettings(path, lora=lora)
    model = build_student(settings)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.copy_(
                    torch.randn(value.shape, generator=torch.Generator().manual_seed(seed + len(name))).mul_(0.3)
                )
    return StudentWeights(
        ScoringModel(model, vocabulary=64),
        settings,
        load_tokenizer(path, "path"),
        stop_ids=(1,),
    )


def shared_handle(buffer: torch.Tensor) -> dict[str, tuple[Any, ...]]:
    """As ``ipc.cuda_handle``: seven or more arguments, of which the seventh is a device that vLLM puts its own for."""
    _BUFFERS[id(buffer)] = buffer
    return {LOCAL: (id(buffer), *[None] * 8)}


def without_cuda() -> None:
    """What vLLM's IPC engine asks of CUDA, answered by this process."""
    from torch.multiprocessing import reductions

    reductions.rebuild_cuda_tensor = lambda number, *rest: _BUFFERS[number]
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=LOCAL)  # type: ignore[assignment]
    torch.accelerator.synchronize = lambda device=None: None
    ipc.cuda_handle = shared_handle
    engine.settled_way = lambda way, *rank, **rest: (way, "as configured")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def drawn(sampler: VLLMEngine, weights: StudentWeights, version: int) -> dict[str, Any]:
    """Samples of a version, and what the student says of them."""
    rows = fixed.rollout(lengths=[5, 9, 1, 7, 3, 9], prompt_lengths=[4, 2, 6, 1, 3, 5], truncated={1})
    sampler.prepare(weights, version)
    rollout = sampler.sample(None, rows.prompts, SETTINGS)
    with torch.no_grad():
        scored = weights.policy(rollout).logprobs
    gap = (scored - rollout.sampler_logprobs)[rollout.mask].abs().max()
    return {"ids": rollout.response_ids, "gap": float(gap), "version": rollout.provenance.weights_version}


def main() -> None:
    """One way, two versions of weights."""
    way, *folders, out = sys.argv[1:]
    options = dict(OPTIONS)
    if way == "ipc":
        without_cuda()
        options["distributed_executor_backend"] = "uni"
    lora = LoraSettings(rank=4, alpha=8.0) if way == "adapter" else None
    if way == "cache":
        way, os.environ["VLLM_CPU_KVCACHE_SPACE"] = "folder", "100000"
    sampler = VLLMEngine(str(Path(out).parent / "written"), max_new_tokens=16, engine_options=options, weights=way)  # type: ignore[arg-type]
    sampler.check(tokens=64, vocabulary=64)
    results: dict[str, Any] = {}
    try:
        for version, path in enumerate(folders):
            weights = student(folders[0] if lora else path, lora, seed=100 * version)
            results.setdefault("drawn", []).append(drawn(sampler, weights, version))
        results["seconds"] = sampler.seconds.take()
        results["written"] = sorted(path.name for path in (Path(out).parent / "written").iterdir())
    except ServerError as error:
        results["error"] = str(error)
    torch.save(results, out)


if __name__ == "__main__":
    main()
