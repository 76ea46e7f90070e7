"""Expected seconds a step on 1, 8 and 32 GPUs: what one H100 measured, carried over by arithmetic and data-sheet figures.

    python -m benchmarks.speed.scaling --out docs

From the rows of ``benchmarks.gpu``: how much longer scoring and update took there than their arithmetic (2 operations a parameter
and token forward, 8 with the backward pass and recomputed activations) at the rate of the data sheet, and what a decode step
took beside its memory traffic (all weights and half of the cache, read once): starting operations, so many a layer. Everything
else is stated. No step of the three configurations has run.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import read_rows
from benchmarks.gpu.page import ROWS, TARGETS
from benchmarks.gpu.sizes import FULL, PROMPT, Shape
from benchmarks.pages import part
from lit_opd.compare.document import markdown_table

BYTES = 2  # of a weight, key or value in bfloat16
LONG = "one row of 16,256 tokens, recomputation"  # the row that scoring and update are taken from
SAMPLED = "32 rows of 256 sampled tokens, recomputation"  # and the one of decode steps
PROMPT_MEAN = 512  # tokens: an assumption
HEADS = [
    "configuration",
    "GPUs",
    "mean, longest response",
    "rollout as measured",
    "rollout at the target",
    "teacher",
    "update",
]
HEADS += ["links, not hidden", "sum", "sum at the target"]
PAGE, PART = "scale-out.md", part("scaling")


@dataclass(frozen=True)
class Device:
    """Rates of one GPU and its links, per second.

    Args:
        flops: dense bf16 operations, of the data sheet.
        memory: bytes of device memory read.
        node_link: bytes a GPU receives from its node's others.
        network: bytes a GPU receives from other nodes.
    """

    flops: float = 989e12
    memory: float = 3.35e12
    node_link: float = 450e9
    network: float = 50e9


@dataclass(frozen=True)
class Job:
    """One configuration at a mean and a longest response.

    Args:
        name: of the configuration.
        gpus: in all, eight a node.
        layers: of the student.
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
    layers: int
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
    Job("qwen3_1.7b_from_4b_1gpu", 1, 28, 1.72e9, 4.02e9, 4.02e9, 114_688, 64, 1000, 2048, 16_384),
    Job("qwen3_1.7b_from_8b_8gpu_fsdp", 8, 28, 1.72e9, 8.19e9, 8.19e9, 114_688, 32, 2000, 4096, 32_768),
    Job("iw_opd_qwen3_4b_from_30b_a3b_32gpu", 32, 36, 4.02e9, 30.5e9, 3.3e9, 147_456, 32, 6000, 16_384, 36_864),
]


def parameters(shape: Shape, vocabulary: int) -> float:
    """Of a Qwen3 with tied heads."""
    attention = 2 * shape.heads * shape.head_dim + 2 * shape.key_value_heads * shape.head_dim
    return shape.layers * shape.width * (attention + 3 * shape.inner) + vocabulary * shape.width


def factors(rows: Sequence[Mapping[str, Any]], device: Device) -> dict[str, float]:
    """ "forward" and "update": measured seconds over those of the arithmetic. "decode" and "target": seconds a layer of a decode
    step beside its memory traffic, as measured and at the target.
    """
    steps = {row["what"]: row for row in rows if row["section"] == "steps" and "error" not in row}
    long, sampled = steps[LONG], steps[SAMPLED]
    student, teacher = (parameters(shape, FULL.vocabulary) for shape in (FULL.student, FULL.teacher))
    size = next(step for step in FULL.steps if step.name == SAMPLED)
    cache = BYTES * 2 * FULL.student.layers * FULL.student.key_value_heads * FULL.student.head_dim
    least = (BYTES * student + size.rows * (PROMPT + size.tokens / 2) * cache) / device.memory
    target = TARGETS["decode", f"bf16-mixed, DecodeSampler, {size.rows} rows"][1] / 1000
    return {
        "forward": long["teacher_s"] / (2 * teacher * long["tokens"] / device.flops),
        "update": long["update_s"] / (8 * student * long["tokens"] / device.flops),
        "decode": (sampled["sampling_s"] / size.tokens - least) / FULL.student.layers,
        "target": (target - least) / FULL.student.layers,
    }


def expected(job: Job, device: Device, measured: dict[str, float]) -> dict[str, float]:
    """Seconds of a step's parts on one GPU of ``job``."""
    tokens = job.rows * (PROMPT_MEAN + job.mean)
    micro_batches = -(-tokens // job.budget)
    held = (
        job.rows * (PROMPT_MEAN + job.mean) * job.cache
    )  # keys and values read at a decode step, on average half of them
    traffic = (BYTES * job.student + held / 2) / device.memory
    network = 0.0
    if job.gpus > 1:
        nodes = max(1, job.gpus // 8)
        passes = {
            "student": 3 * micro_batches + 1,
            "teacher": micro_batches,
        }  # forward, backward, reduction; the rollout's
        moved = BYTES * (job.student * passes["student"] + job.teacher * passes["teacher"])
        network = moved / device.node_link + moved * (nodes - 1) / nodes / (8 * device.network)
    return {
        "rollout": job.longest * (traffic + job.layers * measured["decode"]),
        "target": job.longest * (traffic + job.layers * measured["target"]),
        "teacher": measured["forward"] * 2 * job.active * tokens / device.flops,
        "update": measured["update"] * 8 * job.student * tokens / device.flops,
        "links": network,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The part of the page."""
    device = Device()
    measured = factors(rows, device)
    said = (
        f"Times what the data sheet's rate alone would give: a scoring forward pass {measured['forward']:.1f}, an update "
        f"{measured['update']:.1f}. A decode step beside its memory traffic: {1000 * measured['decode']:.2f} ms a layer, at its "
        f"target {1000 * measured['target']:.2f}."
    )
    lines = []
    for job in JOBS:
        found = expected(job, device, measured)
        rest = found["teacher"] + found["update"] + found["links"]
        shown = [f"{found[name]:.1f} s" for name in ("rollout", "target", "teacher", "update", "links")]
        sums = [f"{found[name] + rest:.0f} s" for name in ("rollout", "target")]
        lines.append([f"`{job.name}`", str(job.gpus), f"{job.mean}, {job.longest}", *shown, *sums])
    return f"{said}\n\n{markdown_table(HEADS, lines)}\n"


def main() -> None:
    """Compute and print; with --out write between the markers of scale-out.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=PART.in_folder(PAGE), default=None, help=f"folder with {PAGE}")
    parser.add_argument("--rows", type=Path, default=Path("docs") / ROWS, help="rows of benchmarks.gpu")
    given = parser.parse_args()
    text = table(read_rows(given.rows))
    print(text, end="")
    if given.out is not None:
        PART.write(given.out / PAGE, text)


if __name__ == "__main__":
    main()
