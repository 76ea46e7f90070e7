"""Run under torchrun on two processes: the runs of ``metric_runs``, each rank with rows of its own. Writes to argv[1]."""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from tests.helpers import metric_runs, two_ranks

STRATEGIES = ("ddp", "fsdp2")
TIMEOUT = timedelta(seconds=60)


def main() -> None:
    """Every case under both strategies, and more tokens than float32 counts."""
    torch.set_num_threads(1)
    setattr(*metric_runs.norms_in_float64())
    out, folders, rank = Path(sys.argv[1]), (sys.argv[2], sys.argv[3]), two_ranks.rank_from_environment()

    def shared(strategy: str) -> dict[str, Any]:
        return {"rank": rank, "ranks": 2, "strategy": two_ranks.strategy(strategy, timeout=TIMEOUT)}

    found: dict[str, Any] = {
        f"{name} {strategy}": asdict(metric_runs.run(folders, out / f"{name} {strategy}", case, **shared(strategy)))
        for strategy in STRATEGIES
        for name, case in metric_runs.CASES.items()
    }
    found["counts"] = metric_runs.counts(folders, out / "counts", **shared("ddp"))
    torch.save(found, out / f"rank-{rank}.pt")


if __name__ == "__main__":
    main()
