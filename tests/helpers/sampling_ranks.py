"""Run on two processes that sample from one server, each its own rows. argv: folder, case, student, another student, url."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lit_opd.models import LoraSettings
from lit_opd.rollout import AdapterEndpoint, SamplingSettings, VLLMSampler
from lit_opd.types import Rollout
from tests.helpers import cases
from tests.helpers.two_ranks import rank_from_environment, this_rank
from tests.rollout.test_engine import student

SETTINGS = SamplingSettings(max_new_tokens=8, stop_ids=(1,), pad_id=0, vocabulary=64, seed=3)
LIMITS = {"timeout": 10.0, "retry_seconds": 0.5, "start_seconds": 5.0, "max_new_tokens": 8}
TIMEOUT = timedelta(seconds=30)  # of a collective


def gap(rollout: Rollout, own: Any) -> float:
    """Largest difference of log-probs, nats, between what was sampled and the student."""
    with torch.no_grad():
        return float((own.policy(rollout).logprobs - rollout.sampler_logprobs)[rollout.mask].abs().max())


def adapter(out: Path, folders: tuple[str, str], url: str) -> dict[str, Any]:
    """One batch from an adapter, which the server loses when it has answered rank 0."""
    own = student(folders[0], lora=LoraSettings(rank=4))
    sampler = VLLMSampler([url], sync=AdapterEndpoint(str(out / "adapter")), **LIMITS)
    sampler.servers.check(tokens=None)
    sampler.prepare(own, 0)
    rollout = sampler.sample(None, this_rank(cases.rollout().prompts), SETTINGS)
    return {"gap": gap(rollout, own), "keys": rollout.prompts.row_keys.tolist(), "model": sampler.servers.model}


CASES = {"adapter": adapter}


def main() -> None:
    """One case."""
    torch.set_num_threads(1)
    out, case, folders, url = Path(sys.argv[1]), sys.argv[2], (sys.argv[3], sys.argv[4]), sys.argv[5]
    dist.init_process_group("gloo", timeout=TIMEOUT)
    torch.save(CASES[case](out, folders, url), out / f"report-{rank_from_environment()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
