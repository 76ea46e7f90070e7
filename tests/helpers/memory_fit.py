"""Real fits in this process, their peak of resident memory against the budget: ``-m tests.helpers.memory_fit FOLDER SHAPE``.

Memory counts from the callback's ``setup``, when imports are done and data is read and before weights are loaded; a fit of tiny
models comes first, so that what libraries load late is not counted. Start it with MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ at 65536: glibc then gives freed tensors back, and resident memory is what tensors take.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from callbacks import default_callbacks
from lit_opd.cli.command import main
from lit_opd.preflight import estimate, read_plan
from tests.helpers import tiny

SAMPLED, UPDATED = ("rollout", "scoring"), ("head", "layers", "optimizer")


@dataclass(frozen=True)
class Shape:
    """A run; ``rows`` is the vocabulary, lengths are tokens."""

    family: str
    rows: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    prompt: int
    response: int
    batch: int
    steps: int
    token_budget: int | None = None
    checkpointing: bool = False
    tied: bool = False
    optimizer: str = "torch.optim.AdamW"


SHAPES = {
    "deep": Shape("qwen3", 512, 256, 768, 5, 8, 4, prompt=64, response=64, batch=16, steps=2),
    "wide": Shape("llama", 49152, 192, 512, 2, 4, 4, prompt=32, response=32, batch=16, steps=2, token_budget=512, tied=True),
    "long": Shape("qwen3", 2048, 256, 768, 8, 8, 2, prompt=64, response=96, batch=24, steps=1, token_budget=1920,
                  checkpointing=True, optimizer="torch.optim.SGD"),
}  # fmt: skip
WARM = Shape("llama", 64, 16, 32, 1, 2, 1, prompt=8, response=4, batch=4, steps=2)


def build(shape: Shape, seed: int) -> PreTrainedModel:
    """A random model."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": shape.rows,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": shape.tied,
    }
    if shape.family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=shape.hidden // shape.heads))


def write(shape: Shape, folder: Path) -> Path:
    """Models, prompts of unequal lengths and a config; returns the config."""
    student = tiny.save(build(shape, 1), folder / "student")
    teacher = tiny.save(build(shape, 2), folder / "teacher")
    rows = [{"id": str(i), "prompt": "a" * (shape.prompt - 2 - i % 3), "answer": "1"} for i in range(2 * shape.batch)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "seed_everything": 7,
        "num_threads": 1,
        "wandb": {"mode": "disabled"},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": shape.steps},
        "model": {
            "student": {"path": student, "gradient_checkpointing": shape.checkpointing},
            "teacher": {"class_path": "lit_opd.teacher.LocalTeacher", "init_args": {"path": teacher}},
            "sampler": {
                "class_path": "lit_opd.rollout.TransformersSampler",
                "init_args": {"max_new_tokens": shape.response},
            },
            "optimizer": {"class_path": shape.optimizer, "init_args": {"lr": 1e-4}},
            "token_budget": shape.token_budget,
        },
        "data": {
            "train": str(folder / "prompts.jsonl"),
            "prompt_batch": shape.batch,
            "max_prompt_tokens": shape.prompt,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


class Meter(Callback):
    """Bytes above the baseline, at the highest before the update and in it; and the budget."""

    def __init__(self) -> None:
        self.sampled = self.updated = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The baseline."""
        plan = read_plan({"accelerator": "cpu", "devices": 1}, strategy="auto", memory_gb=None)
        found = estimate(pl_module, trainer.datamodule, plan)
        self.phases = {phase: found.total(phase) for phase in found.phases}
        gc.collect()
        self.baseline = resident("VmRSS")

    def on_phase(self, name: str, done: int, total: int) -> None:
        """Read at the ends of scoring and of the update, forget the peak there."""
        peak = resident("VmHWM") - self.baseline
        if name == "scoring" and done == total:
            self.sampled = max(self.sampled, peak)
        elif name == "updating":
            self.updated = max(self.updated, peak)
        elif name != "sampling":
            return
        Path("/proc/self/clear_refs").write_text("5")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: what callbacks write at the end is not the step's."""


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the highest since it was reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def measure(shape: Shape, folder: Path) -> dict[str, dict[str, float]]:
    """Train; MiB predicted and measured of sampling with scoring, and of the update."""
    folder.mkdir()
    meter = Meter()
    config = write(shape, folder)
    main(lambda: [*default_callbacks(), meter], ["fit", "--config", str(config), "--run_dir", str(folder / "run")])
    highest = {part: max(meter.phases[phase] for phase in phases) / 2**20
               for part, phases in (("sampled", SAMPLED), ("updated", UPDATED))}  # fmt: skip
    return {"predicted": highest, "measured": {"sampled": meter.sampled / 2**20, "updated": meter.updated / 2**20}}


if __name__ == "__main__":
    root, wanted = Path(sys.argv[1]), sys.argv[2]
    measure(WARM, root / "warm")
    (root / "memory.json").write_text(json.dumps(measure(SHAPES[wanted], root / wanted)))
