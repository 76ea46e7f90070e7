"""What a checkpoint holds of a module beyond its weights, and the refusal of another student's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from lit_opd.errors import InputError
from lit_opd.models.base import require_base
from lit_opd.run.changed_options import apply_changes, configured
from lit_opd.run.checkpoint_files import slurm_job
from lit_opd.run.checkpoint_kinds import expected_names, from_consolidated
from lit_opd.run.lightning import at_batch_end, count_epoch, validation_due
from lit_opd.run.optimizer_state import by_name, plain_name
from lit_opd.run.trained_settings import TrainedSettings

STUDENT = "student."  # in front of its weights' names
FROZEN = ("teacher", "reference")  # loaded from their own folders, in no checkpoint


class ModuleState:
    """Optimizer options, the student's shapes and the validation that is due, over a run and its resumptions."""

    def __init__(self) -> None:
        self.validated_at: int | None = None
        self._due: bool | None = None  # of the checkpoint the run goes on from; None for a new run
        self._options: dict[str, Any] = {}  # the optimizer's as configured, and those of the checkpoint
        self._saved_options: dict[str, Any] | None = None
        self.shapes: dict[str, torch.Size] = {}
        self.base: dict[str, str] | None = None  # the mark of what adapters stand on; None for a student without
        self.trains: frozenset[str] | None = None  # names in a checkpoint; None for all of ``shapes``
        self.trained = TrainedSettings()
        self.revisions: dict[str, str] = {}  # of frozen models and saved responses, by the setting of their files
        self.allowed: frozenset[str] = frozenset()  # groups of settings that may be others than the checkpoint's

    def note_student(
        self,
        shapes: Mapping[str, torch.Size],
        *,
        adapters: frozenset[str] | None = None,
        base: dict[str, str] | None = None,
    ) -> None:
        """Remember what a checkpoint holds of the student.

        Args:
            shapes: of all its weights, by their names in the module.
            adapters: names, in the student, of what a checkpoint holds where the rest is read from a base model; None for all.
            base: that base's mark, see ``lit_opd.models.base``.
        """
        self.shapes, self.trains, self.base = dict(shapes), None, base
        if adapters is not None:
            frozen = {
                name for name in shapes if name.startswith(STUDENT) and name.removeprefix(STUDENT) not in adapters
            }
            self.trains = frozenset(shapes.keys() - frozen)

    def note_options(self, optimizer: Optimizer, scheduler: Any | None) -> None:
        """Remember what was configured."""
        self._options = configured(optimizer, scheduler)

    def take_due(self, module: LightningModule, *, at_start: bool) -> bool:
        """Whether the fit that starts now has a validation to make first: that of its start, or the one its checkpoint was
        saved before. Settings that were changed since the checkpoint take effect.

        Args:
            module: in a fit.
            at_start: a new run measures its start.
        """
        due, self._due = self._due, None
        self.trained.begin(module.global_step)
        if due is None:
            return module.global_step == 0 and at_start
        count_epoch(module.trainer)
        if self._saved_options is not None:
            apply_changes(self._saved_options, self._options, module.trainer.optimizers[0], module.lr_schedulers())
        return due

    def save(self, module: LightningModule, checkpoint: dict[str, Any], *, whole: bool, at_start: bool) -> None:
        """Add to a checkpoint: optimizer state by parameter name, and what ``load`` needs.

        Args:
            module: in a fit.
            checkpoint: as Lightning made it; changed in place.
            whole: the optimizer numbers all parameters of the module, as under FSDP1 and FSDP2.
            at_start: the run measures its start.
        """
        trainer = module.trainer
        pairs = zip(checkpoint.get("optimizer_states", []), trainer.optimizers, strict=False)
        checkpoint["optimizer_states"] = [by_name(state, module, optimizer, whole=whole) for state, optimizer in pairs]
        checkpoint["validation_due"] = validation_due(trainer, validated_at=self.validated_at, at_start=at_start)
        checkpoint["validated_at"], checkpoint["optimizer_options"] = self.validated_at, self._options
        at_batch_end(checkpoint["loops"], validating=trainer.validating)
        checkpoint["trained_settings"] = self.trained.state()
        checkpoint["student_shapes"] = {name: list(shape) for name, shape in self._saved_shapes().items()}
        checkpoint["revisions"] = dict(self.revisions)
        checkpoint["slurm_job"] = slurm_job()
        if self.base is not None:
            checkpoint["student_base"] = dict(self.base)

    def drop_base(self, state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        """Take the frozen base's weights out of a state dict, in place; with them go the tables of a quantised base."""
        if self.trains is not None:
            of_student = [name for name in state if name.startswith(f"{prefix}{STUDENT}")]
            for name in of_student:
                if plain_name(name.removeprefix(prefix)) not in self.trains:
                    del state[name]
        return state

    def _saved_shapes(self) -> dict[str, torch.Size]:
        if self.trains is None:
            return self.shapes
        return {name: shape for name, shape in self.shapes.items() if name in self.trains}

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Read what ``save`` added. Under FSDP2 Lightning reads weight by weight and skips what is missing, so shapes are
        compared here as well.

        Raises:
            InputError: the checkpoint is of another architecture, its adapters of another base model, or other files are where
                those of a frozen model or of saved responses were.
        """
        from_consolidated(checkpoint)
        self._due = checkpoint.get("validation_due", False)
        self.validated_at = checkpoint.get("validated_at")
        self._saved_options = checkpoint.get("optimizer_options")
        self.trained.restore(checkpoint.get("trained_settings", ()))
        if "student_shapes" in checkpoint and self.shapes:
            self.require_same(checkpoint["student_shapes"])
        if "student_base" in checkpoint and self.base is not None:
            require_base(checkpoint["student_base"], self.base)
        _require_revisions(checkpoint.get("revisions", {}), self.revisions, self.allowed)

    def require_same(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """An InputError unless a checkpoint has exactly the weights of this student, of one with adapters those that train or,
        as older checkpoints, the base's too; shards count by their whole shape."""
        of = self.shapes
        differing = [name for name in of.keys() & shapes.keys() if tuple(of[name]) != tuple(shapes[name])]
        wrong = sorted([*(expected_names(of, shapes, self.trains) ^ shapes.keys()), *differing])
        if wrong:
            raise InputError(
                f"`--ckpt_path` must be a checkpoint of this student, but {len(wrong)} weights are missing, extra or of "
                f"another shape: {', '.join(wrong[:5])}; give the config the run was started with"
            )


def _require_revisions(saved: Mapping[str, str], own: Mapping[str, str], allowed: frozenset[str]) -> None:
    """Files in their places are those of the checkpoint's steps; of one that is elsewhere now its settings say so."""
    for name in saved.keys() & own.keys():
        group = "sampler" if name.startswith("model.sampler") else "models"
        if saved[name] != own[name] and group not in allowed:
            raise InputError(
                f"`{name}` must hold what the checkpoint was trained with, {saved[name][:12]}, got other content in the same "
                f"place, {own[name][:12]}; put it back, start a new run, or add --allow_change {group}"
            )


@contextmanager
def trained_modules(module: nn.Module) -> Iterator[None]:
    """Hides teacher and reference: gathering a sharded one only to drop it would take its memory on rank 0."""
    modules = module._modules
    module._modules = {name: part for name, part in modules.items() if name not in FROZEN}
    try:
        yield
    finally:
        module._modules = modules
