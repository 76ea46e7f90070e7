"""Models with a weight that is no number, and the data, gradients and memory that make a step meet it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from torch import Tensor

from lit_opd.distributed import rank
from lit_opd.types import PromptBatch, Rollout
from tests.helpers import cases, fixed, tiny

TOKEN = 50  # no letter: only ``bad_rollout`` has it
ROW, POSITION = 3, 2  # where; on two ranks row 3 is the second one's
IMPOSSIBLE = 1 << 60  # bytes


def folders(parent: Path, who: str, value: float) -> tuple[str, str]:
    """Student and teacher; the input embedding of ``TOKEN`` is ``value`` in one of them."""
    models = {"student": tiny.qwen3(seed=1), "teacher": tiny.qwen3(seed=2)}
    if who in models:
        with torch.no_grad():
            models[who].get_input_embeddings().weight[TOKEN] = value
    student, teacher = (tiny.save(model, parent / name) for name, model in models.items())
    return student, teacher


def bad_rollout() -> Rollout:
    """The rollout of ``cases`` with ``TOKEN`` in one response."""
    whole = cases.rollout()
    ids = whole.response_ids.clone()
    ids[ROW, POSITION] = TOKEN
    return replace(whole, response_ids=ids)


class Sometimes(fixed.FixedSampler):
    """Returns the rollout with ``TOKEN`` in some batches, the plain one in the others."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__(cases.rollout(), max_new_tokens=cases.rollout().mask.shape[1])
        self.bad, self.calls = bad, 0

    def sample(self, model: Any, prompts: PromptBatch, settings: Any) -> Rollout:
        """The stored rows."""
        self.rollout = bad_rollout() if self.calls in self.bad else cases.rollout()
        self.calls += 1
        return super().sample(model, prompts, settings)


class BadGradient(L.Callback):
    """Makes the gradient of one weight NaN in one batch, on the last rank."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._hook: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Hook it."""
        weight = pl_module.student.causal_lm.get_input_embeddings().weight
        if batch_idx == self.batch and rank() == trainer.world_size - 1:
            self._hook = weight.register_hook(lambda gradient: gradient * float("nan"))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the hook away."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


class Starved(L.Callback):
    """Asks torch's allocator for what no machine has, inside a model's first block.

    Args:
        who: "student" or "teacher".
        calls: the calls of the block that fail, counted from 0.
        training: count forwards with a gradient only.
        rank: where, None for everywhere.
    """

    def __init__(self, who: str, calls: set[int], *, training: bool = True, rank: int | None = None) -> None:
        self.who, self.calls, self.training, self.rank = who, calls, training, rank
        self.seen: list[int] = []  # padded tokens of each call

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the block."""
        policy = pl_module.student if self.who == "student" else pl_module.teacher.policy
        policy.causal_lm.get_decoder().layers[0].register_forward_pre_hook(self._ask)

    def _ask(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() != self.training:
            return
        self.seen.append(inputs[0].shape[0] * inputs[0].shape[1])
        if len(self.seen) - 1 in self.calls and self.rank in (None, rank()):
            torch.empty(IMPOSSIBLE, dtype=torch.uint8)


def write_config(folder: Path, models: tuple[str, str], prompts: list[str]) -> Path:
    """Responses of one token, so that the poisoned letter is in prompts only."""
    rows = [{"id": f"p{place}", "prompt": prompt, "answer": "1"} for place, prompt in enumerate(prompts)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampler = {"class_path": "lit_opd.rollout.TransformersSampler", "init_args": {"max_new_tokens": 1}}
    teacher = {"class_path": "lit_opd.teacher.LocalTeacher", "init_args": {"path": models[1]}}
    config = {
        "num_threads": 1,
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 3},
        "model": {"student": {"path": models[0]}, "teacher": teacher, "sampler": sampler},
        "data": {"train": str(folder / "train.jsonl"), "prompt_batch": 4, "max_prompt_tokens": 24},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def bits(values: dict[str, Tensor]) -> dict[str, bytes]:
    """Weights that compare equal with a NaN in them."""
    return {name: value.contiguous().numpy().tobytes() for name, value in values.items()}


def optimizer_state(trained: Any) -> list[bytes]:
    """Momenta, and what else there is."""
    states = trained.trainer.optimizers[0].state.values()
    whole = [value for state in states for value in state.values() if torch.is_tensor(value)]
    return [getattr(value, "full_tensor", lambda v=value: v)().numpy().tobytes() for value in whole]


def fit(
    models: tuple[str, str], *, bad: set[int], steps: int, watch: L.Callback | None = None, **settings: Any
) -> tuple[Any, fixed.Collect]:
    """The trained module and its records. ``trainer`` holds the Trainer's settings, the rest is the module's."""
    trainer = settings.pop("trainer", {})
    prompts = settings.pop("prompts", cases.rollout().prompts)
    settings = {"optimizer": cases.momentum, "token_budget": cases.BUDGET} | settings
    trained = fixed.module(models, cases.rollout(), sampler=Sometimes(bad), **settings)
    return trained, fixed.fit(trained, prompts, steps=steps, watch=watch, **trainer)
