"""Run under torchrun on two processes: every folder of argv[2:] loaded by shards. Writes what each rank got to argv[1].

``NAME=DTYPE=FOLDER``; of the first two only the growth of the process's peak memory is measured: by shards, the second also
whole.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lit_opd import teacher
from lit_opd.models.lazy import Loaded
from lit_opd.models.loading import load_causal_lm
from lit_opd.models.sharding import placement
from lit_opd.teacher import LocalTeacher, RoutedTeacher
from tests.helpers import cases


def watched_fill() -> list[Loaded]:
    """The counts of every ``fill`` of a teacher from now on, in order."""
    found: list[Loaded] = []
    original = teacher.local.fill

    def fill(*args: Any, **kwargs: Any) -> Loaded:
        found.append(original(*args, **kwargs))
        return found[-1]

    teacher.local.fill = fill  # type: ignore[attr-defined]
    return found


def peak_growth(load: Any) -> int:
    """Bytes by which the peak of this process's resident memory, mapped files included, rises over the start of ``load``."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    start = status("VmRSS")
    load()
    return status("VmHWM") - start


def full(value: Tensor) -> Tensor:
    """The whole of a sharded tensor; every rank takes part."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def loaded(place: Any, folder: str, dtype: str, **settings: Any) -> dict[str, Any]:
    """Weights and buffers by name, and the scores of fixed rows."""
    scorer = LocalTeacher(folder, dtype=dtype, **settings)  # type: ignore[arg-type]
    scorer.load_sharded(place, vocabulary=60)
    assert scorer.policy is not None
    model = scorer.policy.causal_lm
    with scorer.whole_head():
        head = scorer.full_head(cases.rollout()).weight
        head = None if head is None else head.clone()
    weights = {name: full(value).clone() for name, value in model.named_parameters(remove_duplicate=False)}
    scores = scorer.score(cases.rollout())
    return {
        "weights": weights,
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "logprobs": scores.logprobs,
        "head": head,
        "plain": scorer.policy.full_logits,
        "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
    }


def routed(place: Any, folders: list[str]) -> Tensor:
    """Scores where each rank names another teacher for all of its rows; one of the teachers is offloaded."""
    scorer = RoutedTeacher({str(rank): LocalTeacher(folder, offload=rank == 0) for rank, folder in enumerate(folders)})
    scorer.load_sharded(place, vocabulary=60)
    rollout = cases.rollout()
    names = (str(torch.distributed.get_rank()),) * len(rollout)
    with scorer.on_device(rollout.mask.device):
        return scorer.score(replace(rollout, prompts=replace(rollout.prompts, teachers=names))).logprobs


def main() -> None:
    """Every folder by shards; the first two measured, the third also offloaded."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    place = placement(ModelParallelStrategy(), init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",)))
    counts = watched_fill()
    out, arguments = Path(sys.argv[1]), [word.split("=", 2) for word in sys.argv[2:]]
    results: dict[str, Any] = {"counts": {}}
    for name, dtype, folder in arguments[2:]:
        results[name] = loaded(place, folder, dtype)
        results["counts"][name] = vars(counts[-1])
    _, dtype, folder = arguments[2]
    results["offloaded"] = loaded(place, folder, dtype, offload=True)
    results["not lazy"] = loaded(place, folder, dtype, lazy=False)
    results["routed"] = routed(place, [folder for _, _, folder in arguments[2:4]])
    name, dtype, folder = arguments[0]
    kept = LocalTeacher(folder, dtype=dtype)  # type: ignore[arg-type]  # to the end: memory set free would hide a growth
    results[f"{name} growth"] = peak_growth(lambda: kept.load_sharded(place, vocabulary=60))
    name, dtype, folder = arguments[1]
    held: list[Any] = [LocalTeacher(folder, dtype=dtype)]  # type: ignore[arg-type]
    results["lazy growth"] = peak_growth(lambda: held[0].load_sharded(place, vocabulary=60))
    results["counts"][name] = vars(counts[-1])
    held.clear()
    results["whole growth"] = peak_growth(lambda: held.append(load_causal_lm(folder, "path", dtype=dtype)))
    torch.save(results, out / f"rank-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
