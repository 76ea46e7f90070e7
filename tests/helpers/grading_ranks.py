"""Run on two processes: the grader of rank 1 cannot start a worker. argv: a folder, where each rank writes what ended it."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lit_opd.errors import InputError
from lit_opd.evaluation.grading import Grader
from lit_opd.evaluation.validation import Evaluator, ValidationSettings
from tests.helpers import cases
from tests.helpers.two_ranks import rank_from_environment

TIMEOUT = timedelta(seconds=60)  # of a collective
ANSWER, REFERENCE = "\\boxed{\\sqrt{8}}", "2\\sqrt{2}"  # which mathematics must compare


def main() -> None:
    """One batch of answers, as validation adds it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, rollout = rank_from_environment(), cases.rollout()
    rows = len(rollout)
    prompts = replace(rollout.prompts, answers=(REFERENCE,) * rows, counted=torch.ones(rows, dtype=torch.bool))
    evaluator = Evaluator(ValidationSettings())
    evaluator.grader = Grader(num_workers=1, **({"memory_mib": 1} if rank else {}))
    try:
        evaluator.add_answers("greedy_accuracy", replace(rollout, prompts=prompts), lambda _: [ANSWER] * rows)
        ended = "nothing"
    except InputError as error:
        ended = str(error)
    (Path(sys.argv[1]) / f"ended-{rank}").write_text(ended)
    evaluator.grader.close()


if __name__ == "__main__":
    main()
