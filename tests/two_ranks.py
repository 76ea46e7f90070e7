"""Run under torchrun on two processes: gradients of fixed rollouts, and fits with sampling inside. Writes to argv[1]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from lit_opd.distributed import rank
from lit_opd.rollout import DecodeSampler, TransformersSampler
from tests import cases, fixed


def strategy(name: str) -> Strategy:
    """DDP or FSDP2 on gloo."""
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend="gloo"
    )


def this_rank(rows: Any) -> Any:
    """Every second row."""
    return rows.rows(torch.arange(rank_from_environment(), len(rows), 2))


def rank_from_environment() -> int:
    import os

    return int(os.environ["RANK"])


def gradients(folders: tuple[str, str], name: str) -> dict[str, Any]:
    """Loss and gradient of every case, each rank holding half of the rows."""
    out = {}
    for key, settings in cases.gradient_cases().items():
        whole = cases.rollout()
        trained = fixed.module(folders, whole, **settings)
        prompts = this_rank(whole.prompts)
        out[key] = fixed.gradient(trained, prompts, devices=2, strategy=strategy(name), use_distributed_sampler=False)
    return out


def sampled_fit(folders: tuple[str, str], name: str) -> list[float]:
    """Three steps with sampling inside; uneven response lengths."""
    whole = cases.rollout()
    sampler = TransformersSampler(max_new_tokens=12)
    trained = fixed.module(folders, whole, sampler=sampler, dtype="float32", token_budget=60)
    prompts = this_rank(whole.prompts)
    collect = fixed.fit(trained, prompts, steps=3, devices=2, strategy=strategy(name), use_distributed_sampler=False)
    return [*collect.losses, *(float(record.rollout.lengths.sum()) for record in collect.records)]


def decoded_fit(folders: tuple[str, str], name: str) -> list[Any]:
    """Tokens and masks of three steps sampled by ``DecodeSampler`` in float64."""
    whole = cases.rollout()
    trained = fixed.module(folders, whole, sampler=DecodeSampler(**cases.SHORT), token_budget=60)
    prompts = this_rank(whole.prompts)
    collect = fixed.fit(trained, prompts, steps=3, devices=2, strategy=strategy(name), use_distributed_sampler=False)
    return [(record.rollout.response_ids, record.rollout.mask) for record in collect.records]


def fits(folders: tuple[str, str], name: str) -> dict[str, Any]:
    """Weights and gradient norms after three clipped steps of every case."""
    out = {}
    for key, settings in cases.fit_cases().items():
        whole = cases.fit_rollout(key)
        trained = fixed.module(folders, whole, **settings)
        prompts = this_rank(whole.prompts)
        collect = fixed.fit(
            trained, prompts, steps=3, devices=2, strategy=strategy(name), use_distributed_sampler=False
        )
        out[key] = ([float(record.grad_norm) for record in collect.records], fixed.weights(trained))
    return out


def interrupted(folders: tuple[str, str], name: str, out: Path) -> dict[str, Any]:
    """Weights after all steps: of a run cut in half here, and of one whose first half ran in one process."""
    whole = cases.rollout()
    prompts = this_rank(whole.prompts)

    def run(steps: int, **paths: Any) -> Any:
        trained = fixed.module(folders, whole, optimizer=cases.momentum, token_budget=cases.BUDGET)
        shared = {"devices": 2, "strategy": strategy(name), "use_distributed_sampler": False}
        fixed.fit(trained, prompts, steps=steps, **paths, **shared)
        return fixed.weights(trained)

    half = cases.STEPS // 2
    run(half, save=out / "two.ckpt")
    return {
        "two in two": run(cases.STEPS, load=out / "two.ckpt"),
        "one in two": run(cases.STEPS, load=out / "one.ckpt"),
    }


def main() -> None:
    """Every check under one strategy."""
    torch.set_num_threads(1)
    out, name, folders = Path(sys.argv[1]), sys.argv[2], (sys.argv[3], sys.argv[4])
    results = {
        "gradients": gradients(folders, name),
        "fits": fits(folders, name),
        "interrupted": interrupted(folders, name, out),
        "fit": sampled_fit(folders, name),
        "decoded": decoded_fit(folders, name),
    }
    torch.save(results, out / f"rank-{rank()}.pt")


if __name__ == "__main__":
    main()
