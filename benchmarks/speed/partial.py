"""Decode steps and seconds of a training step with and without responses in pieces, where lengths have a long tail.

    python -m benchmarks.speed.partial --steps 12 --rows 64 --budget 128

The student has the embedded one's shape and random weights: every token ends a response with nearly the same probability, so
lengths are geometric up to ``--slots``, with a mean near the size of the vocabulary. Weights do not change. Seconds are those of
the processor, one thread, so other work on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lit_opd.models.student import StudentSettings
from lit_opd.module import OPDModule
from lit_opd.prompts import PromptDataModule
from lit_opd.rollout import DecodeSampler, PartialSampler, Sampler
from lit_opd.shipped import shipped_path
from lit_opd.teacher import LocalTeacher
from lit_opd.types import Rollout

ASSETS = "lit_opd/testbed/assets"
PROMPT, WARM = 48, 4  # longest prompt; steps that are not counted, in which rows begin to wait
FLAT = 0.02  # deviation of the head's weights


class Counted(DecodeSampler):
    """Counts decode steps and seconds of sampling."""

    decoded, seconds_sampling = 0, 0.0

    def sample(self, model: Any, prompts: Any, settings: Any) -> Rollout:
        """As it is."""
        start = time.process_time()
        rollout = super().sample(model, prompts, settings)
        self.seconds_sampling += time.process_time() - start
        self.decoded += rollout.mask.shape[1]
        return rollout


@dataclass
class Step:
    """What a step took; lengths are those of the rows that it trained on."""

    seconds: float
    sampling: float
    decoded: int
    lengths: list[int] = field(default_factory=list)
    waiting: int = 0


class Watch(L.Callback):
    """Measures every step."""

    def __init__(self, engine: Counted) -> None:
        self.engine = engine
        self.steps: list[Step] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._before = time.process_time(), self.engine.seconds_sampling, self.engine.decoded

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Read it."""
        record, (start, sampling, decoded) = outputs["step"], self._before
        waiting = 0 if record.waiting is None else int(record.waiting.responses)
        lengths = record.rollout.lengths.tolist()
        took = time.process_time() - start, self.engine.seconds_sampling - sampling, self.engine.decoded - decoded
        self.steps.append(Step(*took, lengths, waiting))


def random_student(folder: Path, window: int) -> str:
    """The embedded student's shape and tokenizer with random weights and a flat head."""
    source = shipped_path(f"{ASSETS}/student")
    config = AutoConfig.from_pretrained(source, max_position_embeddings=window, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=FLAT)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def measure(student: str, *, budget: int | None, steps: int, rows: int, slots: int) -> list[Step]:
    """A run; ``budget`` None ends every row in its step."""
    engine = Counted(max_new_tokens=slots)
    sampler: Sampler = engine if budget is None else PartialSampler(engine, budget)
    module = OPDModule(
        StudentSettings(student),
        LocalTeacher(student),
        sampler,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        token_budget=rows * PROMPT * 4,
        seed=0,
    )
    data = PromptDataModule(train=shipped_path(f"{ASSETS}/train.jsonl"), prompt_batch=rows, max_prompt_tokens=PROMPT)
    watch = Watch(engine)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_steps=steps + WARM, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[watch], default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
    return watch.steps[WARM:]


def line(name: str, steps: list[Step]) -> str:
    """Medians of a step, and means where rows are counted."""
    decoded, sampling, whole = (
        statistics.median(getattr(step, kind) for step in steps) for kind in ("decoded", "sampling", "seconds")
    )
    lengths = [length for step in steps for length in step.lengths]
    rate = math.fsum(lengths) / math.fsum(step.seconds for step in steps)
    waiting = statistics.mean(step.waiting for step in steps)
    return (
        f"{name}: {decoded:.0f} decode steps, {sampling:.2f} s sampling, {whole:.2f} s a step; "
        f"{len(lengths) / len(steps):.1f} rows a step of {statistics.mean(lengths):.0f} tokens (longest {max(lengths)}), "
        f"{waiting:.1f} wait; {rate:.0f} trained tokens/s"
    )


def main() -> None:
    """Both ways in one process, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="that are counted")
    parser.add_argument("--rows", type=int, default=64, help="of a batch")
    parser.add_argument("--slots", type=int, default=512, help="longest response")
    parser.add_argument("--budget", type=int, default=128, help="tokens a row and step")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        student = random_student(Path(folder), window=asked.slots + PROMPT)
        given = {"steps": asked.steps, "rows": asked.rows, "slots": asked.slots}
        for name, budget in (("whole responses", None), (f"budget {asked.budget}", asked.budget)):
            print(line(name, measure(student, budget=budget, **given)))


if __name__ == "__main__":
    main()
