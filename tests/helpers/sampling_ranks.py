"""Run on two processes that sample from one server, each its own rows. argv: folder, case, student, another student, url."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lit_opd.distributed import gather_objects
from lit_opd.models import LoraSettings
from lit_opd.rollout import AdapterEndpoint, NCCLTransfer, SamplingSettings, VLLMSampler
from lit_opd.types import Rollout
from tests.helpers import cases
from tests.helpers.fake_vllm import serving
from tests.helpers.two_ranks import rank_from_environment, this_rank
from tests.rollout.test_engine import student
from tests.servers.test_nccl_transfer import Group, Student

SETTINGS = SamplingSettings(max_new_tokens=8, stop_ids=(1,), pad_id=0, vocabulary=64, seed=3)
LIMITS = {"timeout": 10.0, "retry_seconds": 0.5, "start_seconds": 5.0, "max_new_tokens": 8}
TIMEOUT = timedelta(seconds=30)  # of a collective
SLOW = 0.5  # seconds that an answer waits


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


def ahead(out: Path, folders: tuple[str, str], url: str) -> dict[str, Any]:
    """New weights by NCCL while the server, which is in rank 0's process, still answers a batch of rank 1."""
    before, after = Student(folders[0]), Student(folders[1])
    mine, is_first = this_rank(cases.rollout().prompts), rank_from_environment() == 0
    with serving(folders[0]) if is_first else nullcontext() as server:
        sync = NCCLTransfer(seconds=20)
        sync.join = lambda *place: Group([server])
        sampler = VLLMSampler([*filter(None, gather_objects([server and server.url]))], sync=sync, ahead=1, **LIMITS)
        sampler.prepare(before, 0)
        if is_first:
            quick = [tuple(ids[mask].tolist()) for ids, mask in zip(mine.ids, mine.mask, strict=True)]
            server.always = lambda own, handler, body: tuple(body["prompt"][0]) not in quick and bool(time.sleep(SLOW))
        sampler.begin(mine, SETTINGS)
        sampler.prepare(after, 1)
        rollout = sampler.sample(None, mine, SETTINGS)
        then = sampler.sample(None, mine, SETTINGS)
        told = {"versions": [one.provenance.weights_version for one in (rollout, then)]}
        return told | {"gaps": gather_objects([gap(rollout, before), gap(then, after)])}


CASES = {"adapter": adapter, "ahead": ahead}


def main() -> None:
    """One case."""
    torch.set_num_threads(1)
    out, case, folders, url = Path(sys.argv[1]), sys.argv[2], (sys.argv[3], sys.argv[4]), sys.argv[5]
    dist.init_process_group("gloo", timeout=TIMEOUT)
    torch.save(CASES[case](out, folders, url), out / f"report-{rank_from_environment()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
