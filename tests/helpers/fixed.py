"""Fixed rollouts through the real module and the real Trainer, for tests of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lit_opd.models.student import StudentSettings
from lit_opd.module import OPDModule
from lit_opd.rollout import Sampler
from lit_opd.run.optimizer_state import plain_name
from lit_opd.teacher import LocalTeacher
from lit_opd.types import FinishReason, PromptBatch, Provenance, Rollout

NUM_LETTERS = 40


class FixedSampler(Sampler):
    """Returns the same responses whatever the student is; engine "fixed"."""

    max_logprob_gap = math.inf  # whoever sampled them is not compared with the student

    def __init__(self, rollout: Rollout | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.rollout = rollout

    def sample(self, model: Any, prompts: PromptBatch, settings: Any) -> Rollout:
        """The rows of the stored rollout whose keys were asked for."""
        assert self.rollout is not None
        stored = {int(key): row for row, key in enumerate(self.rollout.prompts.row_keys)}
        return self.rollout.rows(torch.tensor([stored[int(key)] for key in prompts.row_keys]))


def rollout(*, lengths: list[int], prompt_lengths: list[int], truncated: set[int], seed: int = 0) -> Rollout:
    """Random ragged rows; a row that is not truncated ends with EOS (id 1). Padding holds garbage on purpose."""
    generator = torch.Generator().manual_seed(seed)
    rows, slots, columns = len(lengths), max(prompt_lengths), max(lengths)

    def letters(*shape: int) -> Tensor:
        return torch.randint(4, NUM_LETTERS, shape, generator=generator)

    prompt_mask = torch.arange(slots) >= slots - torch.tensor(prompt_lengths).unsqueeze(-1)
    mask = torch.arange(columns) < torch.tensor(lengths).unsqueeze(-1)
    ids = letters(rows, columns)
    finish = torch.full((rows,), int(FinishReason.STOP), dtype=torch.int8)
    for row, length in enumerate(lengths):
        if row in truncated:
            finish[row] = int(FinishReason.LENGTH)
        else:
            ids[row, length - 1] = 1
    prompts = PromptBatch(
        ids=letters(rows, slots),
        mask=prompt_mask,
        row_keys=torch.arange(100, 100 + rows),
        row_ids=tuple(f"row-{row}" for row in range(rows)),
    )
    return Rollout(prompts, ids, mask, torch.zeros(rows, columns), finish, Provenance("fixed"))


def module(folders: tuple[str, str], fixed: Rollout, *, dtype: str = "float64", **settings: Any) -> OPDModule:
    """A module that trains on ``fixed`` with plain gradient descent at learning rate 1.

    ``with_reference`` makes the initial student its reference model; ``gradient_checkpointing`` is the student's.
    """
    defaults: dict[str, Any] = {
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        "gradient_clip_norm": None,
        "sampler": FixedSampler(fixed, max_new_tokens=fixed.mask.shape[1]),
    }
    student, teacher = folders
    if settings.pop("with_reference", False):
        defaults["reference"] = LocalTeacher(student, dtype=dtype)
    recomputed = settings.pop("gradient_checkpointing", False)
    learner = StudentSettings(student, dtype=dtype, gradient_checkpointing=recomputed)
    models = {"student": learner, "teacher": LocalTeacher(teacher, dtype=dtype)}
    return OPDModule(**(models | defaults | settings))


class Collect(L.Callback):
    """Keeps losses and records."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.records: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep them."""
        self.losses.append(float(outputs["loss"]))
        self.records.append(outputs["step"])


class StartWeights(L.Callback):
    """Keeps the weights at the start of training."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep them."""
        self.weights = weights(pl_module)


def fit(
    trained: OPDModule,
    prompts: PromptBatch,
    *,
    steps: int = 1,
    watch: L.Callback | Sequence[L.Callback] | None = None,
    load: Path | None = None,
    save: Path | None = None,
    **trainer: Any,
) -> Collect:
    """Run the real Trainer on one repeated batch of prompts, from the checkpoint ``load``, up to the checkpoint ``save``."""
    collect = Collect()
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    loader = DataLoader([prompts] * 8, batch_size=None)
    watching = [watch] if isinstance(watch, L.Callback) else watch or ()
    run = L.Trainer(**(settings | trainer), callbacks=[collect, *watching])
    run.fit(trained, loader, ckpt_path=load)
    if save is not None:
        run.save_checkpoint(save)
    return collect


def weights(trained: OPDModule) -> dict[str, Tensor]:
    """A copy of the student's whole weights by name."""
    student = trained.student
    assert student is not None
    with FSDP.summon_full_params(student, writeback=False) if isinstance(student, FSDP) else nullcontext():
        named = student.causal_lm.named_parameters()
        return {plain_name(name): _whole(value).detach().clone() for name, value in named}


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def gradient(trained: OPDModule, prompts: PromptBatch, **trainer: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of one optimizer step, read off the change that SGD at learning rate 1 makes."""
    start = StartWeights()
    collect = fit(trained, prompts, watch=start, **trainer)
    after = weights(trained)
    return collect.losses[0], {name: start.weights[name] - after[name] for name in after}


def relative_gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of ``theirs``."""
    difference = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs)
    norm = sum(float(value.square().sum()) for value in theirs.values())
    return (difference / norm) ** 0.5
