"""Expected seconds a step on 1, 8 and 32 GPUs: costs measured on this CPU, carried over by arithmetic and data-sheet figures.

    python -m benchmarks.speed.scaling --out docs

What is measured here: how much longer a step's parts take than their arithmetic (2 operations a parameter and token forward, 6
with the backward pass, 8 with recomputed activations) or their memory traffic (each decode step reads all weights) at the rates
this machine reaches in a plain matrix product and a plain read. What is stated: the GPU's rates. The product is an expectation on
paper; no step of it has run on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.pages import part
from lit_opd.compare.document import markdown_table
from lit_opd.rollout import SamplingSettings, TransformersSampler
from lit_opd.scoring.model import ScoringModel
from lit_opd.types import PromptBatch

REPEATS = 5
PROMPT = 32
HEADS = ["configuration", "GPUs", "mean, longest response", "rollout", "teacher", "update", "links, not hidden", "sum"]
HEADS += ["most of it"]
PAGE, PART = "scale-out.md", part("scaling")


@dataclass(frozen=True)
class Device:
    """Rates of one GPU and its links, per second.

    Args:
        flops: dense bf16 operations, of the data sheet.
        memory: bytes of device memory read.
        node_link: bytes a GPU receives from its node's others.
        network: bytes a GPU receives from other nodes.
        reach: share of ``flops`` that a plain matrix product of these sizes reaches: an assumption.
    """

    flops: float = 989e12
    memory: float = 3.35e12
    node_link: float = 450e9
    network: float = 50e9
    reach: float = 0.5


@dataclass(frozen=True)
class Job:
    """One configuration at a mean and a longest response.

    Args:
        name: of the configuration.
        gpus: in all, eight a node.
        student: parameters.
        teacher: parameters held, and those a token passes.
        active: parameters of the teacher that a token passes.
        cache: bytes of keys and values a token, bf16.
        rows: a GPU and step.
        mean: response tokens.
        longest: response tokens of the longest row, which the rollout waits for.
        budget: padded tokens of a micro-batch.
    """

    name: str
    gpus: int
    student: float
    teacher: float
    active: float
    cache: float
    rows: int
    mean: int
    longest: int
    budget: int


# parameters and cache sizes from the published configurations of the models; lengths are assumptions, one short and one long
JOBS = [
    Job("qwen3_1.7b_from_4b_1gpu", 1, 1.72e9, 4.02e9, 4.02e9, 114_688, 64, 1000, 2048, 16_384),
    Job("qwen3_1.7b_from_8b_8gpu_fsdp", 8, 1.72e9, 8.19e9, 8.19e9, 114_688, 32, 2000, 4096, 32_768),
    Job("iw_opd_qwen3_4b_from_30b_a3b_32gpu", 32, 4.02e9, 30.5e9, 3.3e9, 147_456, 32, 6000, 16_384, 36_864),
]


def median_seconds(run: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    run()
    found = []
    for _ in range(REPEATS):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return statistics.median(found)


def factors() -> dict[str, float]:
    """Measured seconds over those of the arithmetic or the memory traffic alone, on one thread."""
    torch.manual_seed(0)
    square, long = torch.randn(1024, 1024), torch.randn(64 * 2**20)
    flops = 2 * 1024**3 / median_seconds(lambda: square @ square)
    memory = 4 * len(long) / median_seconds(lambda: long.sum())
    config = Qwen3Config(
        vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    policy = ScoringModel(Qwen3ForCausalLM(config), vocabulary=4096)
    size = sum(parameter.numel() for parameter in policy.parameters())
    rows, tokens = 4, 96
    prompts = PromptBatch(
        torch.randint(0, 4096, (rows, PROMPT)), torch.ones(rows, PROMPT, dtype=torch.bool), torch.arange(rows),
        tuple(str(row) for row in range(rows)),
    )  # fmt: skip
    settings = SamplingSettings(max_new_tokens=tokens, stop_ids=(), pad_id=0, vocabulary=4096)
    sampler = TransformersSampler(max_new_tokens=tokens)
    rollout = sampler.sample(policy, prompts, settings)
    short = replace(settings, max_new_tokens=1)

    def forward() -> None:
        with torch.no_grad():
            policy(rollout)

    def update() -> None:
        policy(rollout).logprobs.sum().backward()

    counted = rows * (PROMPT + tokens)
    decode = median_seconds(lambda: sampler.sample(policy, prompts, settings))
    decode -= median_seconds(lambda: sampler.sample(policy, prompts, short))
    return {
        "forward": median_seconds(forward) / (2 * size * counted / flops),
        "update": median_seconds(update) / (6 * size * counted / flops),
        "decode": decode / (tokens - 1) / (4 * size / memory),
        "flops": flops,
        "memory": memory,
    }


def expected(job: Job, device: Device, measured: dict[str, float]) -> dict[str, float]:
    """Seconds of a step's parts on one GPU of ``job``."""
    tokens = job.rows * (512 + job.mean)
    micro_batches = -(-tokens // job.budget)
    held = job.rows * (512 + job.mean) * job.cache  # keys and values read at a decode step, on average half of them
    decode = measured["decode"] * (2 * job.student + held / 2) / device.memory * job.longest
    network = 0.0
    if job.gpus > 1:
        nodes = max(1, job.gpus // 8)
        passes = {
            "student": 3 * micro_batches + 1,
            "teacher": micro_batches,
        }  # forward, backward, reduction; the rollout's
        moved = 2 * (job.student * passes["student"] + job.teacher * passes["teacher"])
        network = moved / device.node_link + moved * (nodes - 1) / nodes / (8 * device.network)
    return {
        "rollout": decode,
        "teacher": measured["forward"] * 2 * job.active * tokens / (device.reach * device.flops),
        "update": measured["update"] * 8 * job.student * tokens / (device.reach * device.flops),
        "links": network,
    }


def main() -> None:
    """Measure, compute and print; with --out write between the markers of scale-out.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=PART.in_folder(PAGE), default=None, help=f"folder with {PAGE}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    measured, device = factors(), Device()
    lines = [
        f"Measured here on one thread: {measured['flops'] / 1e9:.0f} GFLOP/s in a matrix product and "
        f"{measured['memory'] / 1e9:.1f} GB/s read; "
        f"a scoring forward pass takes {measured['forward']:.1f}, an update {measured['update']:.1f} and a decode step "
        f"{measured['decode']:.1f} times what these rates alone would give.",
        "",
    ]
    rows = []
    for job in JOBS:
        parts = expected(job, device, measured)
        most = max(parts, key=lambda name: parts[name])
        shown = [f"{parts[name]:.1f} s" for name in ("rollout", "teacher", "update", "links")]
        lengths = f"{job.mean}, {job.longest}"
        rows.append([f"`{job.name}`", str(job.gpus), lengths, *shown, f"{sum(parts.values()):.0f} s", most])
    text = "\n".join([*lines, markdown_table(HEADS, rows)])
    print(text)
    if given.out is not None:
        PART.write(given.out / PAGE, text + "\n")


if __name__ == "__main__":
    main()
