"""Run on two processes: rank 1 stops in the middle of its second step, by the signal of argv[3]. Writes pids to argv[1]."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from lit_opd.distributed import rank
from lit_opd.types import PromptBatch, Rollout
from tests.helpers import cases, fixed, two_ranks

TIMEOUT = timedelta(seconds=15)  # of a collective, and of the wait for the other rank's start


class Stopping(fixed.FixedSampler):
    """Sends this process the signal when rank 1 samples for the second time; the other rank is then waiting for it."""

    def __init__(self, rollout: Rollout, signum: int) -> None:
        super().__init__(rollout, max_new_tokens=rollout.mask.shape[1])
        self.signum, self.calls = signum, 0

    def sample(self, model: Any, prompts: PromptBatch, settings: Any) -> Rollout:
        """As fixed, until the second call."""
        self.calls += 1
        if self.calls == 2 and rank() == 1:
            os.kill(os.getpid(), self.signum)
        keys = prompts.row_keys % 2 == rank()  # under Lightning's own launcher both ranks are given all rows
        return super().sample(model, prompts.rows(keys.nonzero().squeeze(-1)), settings)


def main() -> None:
    """Fit until stopped."""
    torch.set_num_threads(1)
    out, name, signum, folders = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), (sys.argv[4], sys.argv[5])
    (out / f"pid-{os.environ.get('LOCAL_RANK', 0)}").write_text(str(os.getpid()))
    signal.alarm(120)  # the last resort against a process that outlives its test
    whole = cases.rollout()
    trained = fixed.module(folders, whole, sampler=Stopping(whole, signum), token_budget=cases.BUDGET)
    strategy = two_ranks.strategy(name, timeout=TIMEOUT)
    fixed.fit(trained, whole.prompts, steps=3, devices=2, strategy=strategy, use_distributed_sampler=False)


if __name__ == "__main__":
    main()
