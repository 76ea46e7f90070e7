"""Run on two processes: the runs of ``metric_runs``, each rank with rows of its own. Writes to argv[1]."""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from tests.helpers import metric_runs, two_ranks

RUNS = {
    "few": [("kept", "ddp"), ("dropped", "fsdp2")],
    "whole": [(name, strategy) for strategy in ("ddp", "fsdp2") for name in metric_runs.CASES],
}
TIMEOUT = timedelta(seconds=60)


def main() -> None:
    """The runs of argv[2], and more tokens than float32 counts."""
    torch.set_num_threads(1)
    setattr(*metric_runs.norms_in_float64())
    out, folders, rank = Path(sys.argv[1]), (sys.argv[3], sys.argv[4]), two_ranks.rank_from_environment()

    def shared(strategy: str) -> dict[str, Any]:
        return {"rank": rank, "ranks": 2, "strategy": two_ranks.strategy(strategy, timeout=TIMEOUT)}

    found: dict[str, Any] = {}
    for name, strategy in RUNS[sys.argv[2]]:
        report = metric_runs.run(folders, out / f"{name} {strategy}", metric_runs.CASES[name], **shared(strategy))
        found[f"{name} {strategy}"] = asdict(report)
    found["counts"] = metric_runs.counts(folders, out / "counts", **shared("ddp"))
    torch.save(found, out / f"rank-{rank}.pt")


if __name__ == "__main__":
    main()
