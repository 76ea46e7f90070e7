"""Run under torchrun on two processes, each sampling from a server of its own. Writes what happened to argv[1].

Faults are in this process: rank 1's connection is cut, or its server's answers turn into errors.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from callbacks.checkpoint import RunCheckpoint
from lit_opd.distributed import rank
from lit_opd.errors import ServerError
from lit_opd.rollout import ReloadEndpoint, VLLMSampler
from lit_opd.servers import client as server_module
from tests.helpers import cases, fixed
from tests.helpers.two_ranks import strategy, this_rank

STEPS = 3


class Pushes(ReloadEndpoint):
    """Pushes to both ranks' servers and counts."""

    def __init__(self, folder: str, urls: list[str]) -> None:
        super().__init__(folder)
        self.urls, self.count = urls, 0

    def push(self, servers: Any) -> None:
        """To every server of the run."""
        self.count += 1
        super().push(VLLMSampler(self.urls).servers)


def run(folders: tuple[str, str], urls: list[str], out: Path, case: str) -> dict[str, Any]:
    """One fit of three steps."""
    whole = cases.rollout()
    sync = Pushes(str(out / f"pushed-{case}"), urls)
    limits = {"timeout": 5.0, "retry_seconds": 0.5, "start_seconds": 5.0}
    sampler = VLLMSampler([urls[rank_now()]], sync=sync, max_logprob_gap=1e-3, max_new_tokens=8, **limits)
    trained = fixed.module(
        folders,
        whole,
        sampler=sampler,
        dtype="float32",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    checkpoint = RunCheckpoint(every=100, dirpath=str(out / f"checkpoints-{case}"))
    prompts = this_rank(whole.prompts)
    if rank_now() == 1 and case != "trains":
        disturb(sampler, trained, lasting=case == "fails for good")
    shared = {"devices": 2, "strategy": strategy("ddp"), "use_distributed_sampler": False, "enable_checkpointing": True}
    try:
        collect = fixed.fit(trained, prompts, steps=STEPS, watch=checkpoint, **shared)
    except ServerError as error:
        saved = torch.load(checkpoint.last_model_path, weights_only=True)
        return {"error": str(error), "saved": saved["global_step"]}
    return {
        "weights": {name: value.double().sum().item() for name, value in fixed.weights(trained).items()},
        "keys": prompts.row_keys.tolist(),
        "versions": [record.rollout.provenance.weights_version for record in collect.records],
        "pushes": sync.count,
    }


def disturb(sampler: VLLMSampler, trained: Any, *, lasting: bool) -> None:
    """From the second batch on: one connection that breaks off, or errors for good."""
    exchange = sampler.servers._exchange
    broken: list[int] = []

    def disturbed(server: Any, *rest: Any, **options: Any) -> Any:
        if trained.global_step >= 1 and (lasting or not broken):
            broken.append(1)
            if lasting:
                raise server_module._Refused("answered with HTTP status 500: told to")
            raise server_module._Lost("broke off")
        return exchange(server, *rest, **options)

    sampler.servers._exchange = disturbed  # type: ignore[method-assign]


def rank_now() -> int:
    """Also before Lightning starts the process group."""
    import os

    return int(os.environ.get("RANK", rank()))


def main() -> None:
    """Every case in turn."""
    torch.set_num_threads(1)
    out, names, folders, urls = Path(sys.argv[1]), sys.argv[2], (sys.argv[3], sys.argv[4]), sys.argv[5:7]
    torch.save({case: run(folders, urls, out, case) for case in names.split(",")}, out / f"report-{rank_now()}.pt")


if __name__ == "__main__":
    main()
