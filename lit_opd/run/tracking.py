"""What the observing callbacks share: when a window ends, and which loggers take more than numbers."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger


def crossed(step: int, last: int, every: int) -> bool:
    """True when a multiple of ``every`` lies in (last, step]; a rollout batch may make several optimizer steps."""
    return step // every > last // every


def log_numbers(trainer: Trainer, values: dict[str, float], step: int) -> None:
    """To every logger, at the optimizer step."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)


def wandb_runs(trainer: Trainer) -> list[Any]:
    """The W&B runs among the trainer's loggers: only they get tables, charts and pictures."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def log_media(trainer: Trainer, media: dict[str, Any], step: int) -> None:
    """To W&B, on the same step axis as the numbers."""
    for run in wandb_runs(trainer):
        run.log({**media, "trainer/global_step": step})
