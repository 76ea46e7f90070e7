"""Run on two processes: runs that are stopped and go on, through the command line. argv: folder, config, kind."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback

import lit_opd.report.profile_pictures
from callbacks import default_callbacks
from lit_opd.cli.command import main
from lit_opd.distributed import rank
from lit_opd.errors import InputError

SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "process_group_backend": "gloo"},
}


class Signalled(Callback):
    """Sends SIGTERM to rank 1 alone, in the backward of its third batch; draws random numbers as dropout would."""

    def __init__(self, *, sends: bool = False) -> None:
        self.sends, self.drawn = sends, []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """In the third batch."""
        if self.sends and rank() == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Other numbers on each rank."""
        self.drawn.append(torch.rand(1 + rank())[-1].item())

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Ranks that start from other states."""
        if trainer.ckpt_path is None:
            torch.manual_seed(rank())


def fit(config: str, run: Path, *words: str, sends: bool = False) -> tuple[int | None, list[float]]:
    """Exit status, and the random numbers of this rank."""
    watch, status = Signalled(sends=sends), None
    try:
        main(lambda: [watch, *default_callbacks()], ["fit", "--config", config, "--run_dir", str(run), *words])
    except SystemExit as stop:
        status = int(stop.code)  # type: ignore[arg-type]
    dist.barrier()
    return status, watch.drawn


def cut(whole: Path, run: Path, step: int) -> None:
    """On rank 0: the folder of a run that was killed after the checkpoint of ``step``."""
    from tests.run.test_resume import killed_after

    if rank() == 0:
        killed_after(step, whole, run)
    dist.barrier()


def full_disk(config: str, run: Path) -> str:
    """What every rank is told where rank 0 alone cannot write."""
    from lit_opd.run import checkpoint_files

    publish = checkpoint_files._publish

    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    checkpoint_files._publish = refuse
    try:
        main(default_callbacks, ["fit", "--config", config, "--run_dir", str(run)])
    except SystemExit as stop:
        cause = stop.__cause__
        return (
            "\n".join([str(cause), *getattr(cause, "__notes__", ())]) if isinstance(cause, InputError) else repr(cause)
        )
    finally:
        checkpoint_files._publish = publish
    return "nothing"


def cases(out: Path, config: str) -> dict[str, Any]:
    """Runs into folders of ``out``; statuses and random numbers of this rank."""
    found: dict[str, Any] = {"whole": fit(config, out / "whole")}
    cut(out / "whole", out / "killed", 3)
    found["killed"] = fit(config, out / "killed", "--ckpt_path", "last")
    found["stopped"] = fit(config, out / "stopped", sends=True)
    found["went on"] = fit(config, out / "stopped", "--ckpt_path", "last")
    found["full disk"] = full_disk(config, out / "full")
    dist.barrier()
    return found


def sharded_cases(out: Path, config: str) -> dict[str, Any]:
    """The same of runs whose checkpoints are shards."""
    sharded = ["--trainer.strategy", str(SHARDED).replace("'", '"')]
    found: dict[str, Any] = {"shards": fit(config, out / "shards", *sharded)}
    cut(out / "shards", out / "shards-killed", 3)
    found["shards killed"] = fit(config, out / "shards-killed", *sharded, "--ckpt_path", "last")
    return found


def run() -> None:
    """All cases, and a report of each rank."""
    torch.set_num_threads(1)
    lit_opd.report.profile_pictures.draw_all = lambda *args, **options: {}
    out = Path(sys.argv[1])
    dist.init_process_group("gloo")
    made = {"ddp": cases, "shards": sharded_cases}[sys.argv[3]]
    torch.save(made(out, sys.argv[2]), out / f"rank-{rank()}.pt")
    shutil.rmtree(out / "full", ignore_errors=True)


if __name__ == "__main__":
    run()
