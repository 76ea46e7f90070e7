"""The tables of docs/verified.md and docs/benchmarks.md, from rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pages import part
from lit_opd.compare.document import markdown_table

Row = Mapping[str, Any]
VERIFIED, BENCHMARKS = "verified.md", "benchmarks.md"
PATHS, FIGURES = part("gpu-paths"), part("gpu")
ROWS = Path("benchmarks") / "gpu.jsonl"
UNVERIFIED, NOT_MEASURED = "unverified", "not measured"


@dataclass(frozen=True)
class Claim:
    """A path on CUDA.

    Args:
        path: what it is.
        shows: what a first run should show.
        section, what: of the row that decides.
    """

    path: str
    shows: str
    section: str
    what: str


CLAIMS = (
    Claim("one GPU, float32", "reverse KL falls", "runs", "float32"),
    Claim("one GPU, `bf16-mixed`, sampling inside the step", "reverse KL falls", "runs", "bf16-mixed"),
    Claim("DDP, NCCL, world size 1", "the same", "runs", "DDP"),
    Claim("FSDP2 (`ModelParallelStrategy`), NCCL, world size 1", "the same", "runs", "FSDP2"),
    Claim("FSDP1 (`FSDPStrategy`), NCCL, world size 1", "the same", "runs", "FSDP1"),
    Claim("DDP, all GPUs of a machine", "as one rank, up to rounding", "ranks", "DDP"),
    Claim("FSDP2, all GPUs of a machine", "as one rank; one gather a rollout, none a token", "ranks", "FSDP2"),
    Claim("FSDP1, all GPUs of a machine", "as one rank", "ranks", "FSDP1"),
    Claim("`Divergence(reverse_kl)`", "reverse KL falls", "runs", "divergence"),
    Claim("`TransformersSampler`", "reverse KL falls", "runs", "TransformersSampler"),
    Claim("LoRA with recomputed activations", "runs", "runs", "LoRA, recomputation"),
    Claim("`LocalTeacher.offload`", "as without it, up to rounding", "runs", "offload"),
    Claim("resume with `trainer.deterministic`", "bit for bit", "resume", "deterministic"),
    Claim("resume without it", "equal up to rounding", "resume", "default"),
    Claim("sampler against scorer, `bf16-mixed`", "at most .02 nats on average", "parity", "bf16-mixed"),
    Claim("sampler against scorer, float32", "at most 1e-4 nats on average", "parity", "float32"),
    Claim("`VLLMEngine` in a run", "reverse KL falls, gap below the bound", "runs", "VLLMEngine"),
    Claim("`VLLMEngine`, new weights, sleep and wake", "gap below the bound", "engine", "eager"),
    Claim("`VLLMEngine` with CUDA graphs", "the same", "engine", "CUDA graphs"),
    Claim("`VLLMEngine`, weights by CUDA IPC", "the same, with new weights in fewer seconds", "engine", "CUDA IPC"),
)
# what no section settles
BY_HAND = (
    ("lazy loading onto a GPU", "each rank reads its share; pinned host memory"),
    ("`LocalTeacher.quantization`", "every backend: on CPUs only its errors are tested"),
    ("`model.student.quantization` (QLoRA)", "as on CPUs: sampler and scorer agree, the export is the policy"),
    (
        "`VLLMSampler` with a server on a GPU, also of several ranks",
        "`train/sampler_gap` below the bound after every push",
    ),
    (
        "`VLLMSampler` with `NCCLTransfer`; a server killed in a transfer",
        "the same; the run ends within `NCCLTransfer.seconds` and the process too",
    ),
    ("`VLLMEngine` with `weights: ipc` on several ranks, under FSDP2 too", "the same on every rank"),
    ("`VLLMEngine` with `weights: adapter`, asleep between rollouts", "the same"),
    ("time-outs and killed ranks under NCCL", "the others stop within `trainer.strategy.timeout`"),
    ("the `qwen3` configurations", "a step of each at full size"),
)
TARGETS = {  # of the figures on one H100
    ("decode", "bf16-mixed, DecodeSampler, 1 rows"): ("ms", 1.5),
    ("decode", "bf16-mixed, DecodeSampler, 32 rows"): ("ms", 4.0),
    ("decode", "bf16-mixed, DecodeSampler, 128 rows"): ("ms", 9.0),
    ("heads", "log-probs, ours, bfloat16"): ("ms", 55.0),
    ("heads", "full reverse KL, gradient, bfloat16"): ("ms", 120.0),
    ("steps", "one row of 16,256 tokens, recomputation"): ("tokens_per_s_update", 28_000.0),
}
UNITS = {"ms": "ms", "tokens_per_s_update": "trained tokens/s"}


def found(rows: Sequence[Row], section: str, what: str) -> Row | None:
    """The row of that section ``what``; the last one that was measured."""
    fitting = [row for row in rows if row["section"] == section and row["what"] == what]
    return fitting[-1] if fitting else None


def state(row: Row | None) -> str:
    """What a row proves, in a few words."""
    if row is None or "skipped" in row:
        return UNVERIFIED if row is None else f"{UNVERIFIED}: {row['skipped']}"
    if "error" in row:
        return f"**failed**: {str(row['error']).splitlines()[0][:160]}"
    if row.get("reverse_kl_start") is not None:
        return (
            f"ran {row['steps']} steps: greedy {row['greedy_start']:.3f} to {row['greedy_end']:.3f}, reverse KL "
            f"{row['reverse_kl_start']:.3f} to {row['reverse_kl_end']:.3f}"
        )
    shown = {name: value for name, value in row.items() if name not in ("section", "what") and value is not None}
    return "; ".join(f"{name.replace('_', ' ')}{_said(value)}" for name, value in shown.items()) or "ran"


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return ": yes" if value else ": no"
    return f" {value:.3g}" if isinstance(value, float) else f" {value}"


def about(rows: Sequence[Row]) -> str:
    """One line: device, date, versions."""
    row = found(rows, "environment", "environment")
    if row is None:
        return "No machine has said anything yet."
    versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
    commit = f"; commit {row['commit']}" if row.get("commit") else ""
    return f"{row['device']}, driver {row['driver']}, {row['date']}; Python {row['python']}, {versions}{commit}."


def paths(rows: Sequence[Row]) -> str:
    """Of verified.md."""
    lines = [[claim.path, claim.shows, state(found(rows, claim.section, claim.what))] for claim in CLAIMS]
    lines += [[path, shows, UNVERIFIED] for path, shows in BY_HAND]
    return "\n".join(
        [about(rows), "", markdown_table(["path on CUDA", "what a first run should show", "state"], lines), ""]
    )


def targets(rows: Sequence[Row]) -> list[list[str]]:
    """Each target with what was measured."""
    lines = []
    for (section, what), (figure, target) in TARGETS.items():
        row = found(rows, section, what)
        value = None if row is None else row.get(figure)
        reached = NOT_MEASURED if value is None else f"{value:,} {UNITS[figure]}"
        lines.append([what, f"{'at most' if figure == 'ms' else 'at least'} {target:,g} {UNITS[figure]}", reached])
    return lines


def _columns(*names: str) -> Callable[[Row], list[str]]:
    return lambda row: [_figure(row.get(name)) for name in names]


def _figure(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,}"


TABLES = {
    "Decode steps (one token a row, without the prefill)": ("decode", ["ms", "tokens/s"], _columns("ms", "tokens_per_s")),
    "Training steps, medians without the first": (
        "steps",
        ["s a step", "sampling", "teacher", "update", "trained tokens/s, update", "and teacher", "peak GiB", "estimated"],
        _columns(
            "step_s", "sampling_s", "teacher_s", "update_s", "tokens_per_s_update", "tokens_per_s_trained", "peak_gib",
            "estimated_gib",
        ),
    ),
    "The head alone, forward and backward": (
        "heads",
        ["ms", "extra MiB", "log-prob, nats from plain", "gradient of states, share", "of the weight"],
        _columns("ms", "extra_mib", "logprob_nats", "states_gradient", "weight_gradient"),
    ),
    "A profile of decode steps": (
        "profile",
        ["launches", "device ms", "processor ms"],
        _columns("launches", "device_ms", "cpu_ms"),
    ),
    "vLLM engine": (
        "engine",
        ["start s", "32 x 256 tokens s", "tokens/s", "new weights s", "gap, nats"],
        _columns("start_s", "sample_s", "tokens_per_s", "new_weights_s", "gap"),
    ),
}  # fmt: skip


def figures(rows: Sequence[Row]) -> str:
    """Of benchmarks.md."""
    blocks = [about(rows), markdown_table(["figure", "target", "measured"], targets(rows))]
    for title, (section, heads, cells) in TABLES.items():
        kept = [
            row
            for row in rows
            if row["section"] == section and row["what"] != "section" and not {"error", "skipped"} & set(row)
        ]
        if kept:
            blocks += [f"{title}:", markdown_table(["", *heads], [[row["what"], *cells(row)] for row in kept])]
    return "\n\n".join(blocks) + "\n"


def publish(docs: Path, rows: Sequence[Row]) -> None:
    """Write both parts and the rows beside them.

    Raises:
        InputError: a page has no place for its part.
    """
    for page, place, body in ((VERIFIED, PATHS, paths(rows)), (BENCHMARKS, FIGURES, figures(rows))):
        place.require(docs / page)
        place.write(docs / page, body)
    (docs / ROWS).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
