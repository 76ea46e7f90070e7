"""How a gradient becomes a change of weights: what an update asks of whoever owns them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import lightning as L
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_opd.errors import memory_for
from lit_opd.models.sharding import clip_gradients, sync_gradients

LESS_MEMORY = "take an optimizer with less state, set `model.student.lora`, or shard the weights over more devices"


class Optimisation(Protocol):
    """The optimizer steps of a student, as ``Update`` makes them."""

    @property
    def step(self) -> int:
        """Optimizer steps made so far."""

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Around one micro-batch: gradients are reduced over ranks at the ``last`` one only."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, a scalar."""

    def clip(self) -> Tensor:
        """Scale the gradients to the bound; returns their global norm before that, scalar."""

    def apply(self) -> None:
        """One optimizer step; afterwards there is no gradient. Without any gradient no weight changes, and the step counts."""

    def clear(self) -> None:
        """Drop the gradients."""


class Follower(Protocol):
    """Whoever changes as the student does."""

    def student_stepped(self, step: int) -> None:
        """Optimizer step ``step`` (1-based) was made."""


class LightningOptimisation:
    """By the optimizer, schedule, precision plugin and strategy of a LightningModule in a fit.

    Args:
        module: under manual optimisation.
        student: the part that is trained.
        clip_norm: bound of the global gradient norm, None for none.
        followers: teachers that follow the student; told each step.
    """

    def __init__(
        self,
        module: L.LightningModule,
        student: nn.Module,
        *,
        clip_norm: float | None,
        followers: Iterable[Follower] = (),
    ) -> None:
        self.module, self.student, self.followers = module, student, tuple(followers)
        self.bound = float("inf") if clip_norm is None else clip_norm

    @property
    def _optimizer(self) -> Any:
        return self.module.optimizers()

    @property
    def step(self) -> int:
        """Optimizer steps made so far."""
        return self.module.global_step

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradient reduction over ranks on the last micro-batch only."""
        sync_gradients(self.student, last)
        model = self.module.trainer.strategy.model
        if isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, a scalar, through the precision plugin."""
        self.module.manual_backward(loss)

    def clip(self) -> Tensor:
        """Scale the gradients to the bound; returns their global norm before that, scalar.

        Raises:
            InputError: memory ran out.
        """
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        with memory_for("clipping the gradients", LESS_MEMORY):
            return clip_gradients(self.student, parameters, self.bound).detach()

    def apply(self) -> None:
        """Optimizer step, learning rate schedule, no gradients; the followers are told.

        Raises:
            InputError: memory ran out; weights may be half updated (``torn``).
        """
        scheduler: Any = self.module.lr_schedulers()
        with memory_for("updating the weights", LESS_MEMORY, torn=True):
            self._optimizer.step()
        self.clear()
        for follower in self.followers:
            follower.student_stepped(self.step)
        if scheduler is not None:
            scheduler.step()

    def clear(self) -> None:
        """Drop the gradients."""
        self._optimizer.zero_grad()
