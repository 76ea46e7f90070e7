"""What the observing callbacks share: when a window ends, and which loggers take more than numbers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger


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


def log_pictures(trainer: Trainer, pictures: Mapping[str, Path], step: int) -> None:
    """PNG files to W&B, TensorBoard and MLflow, which keeps the newest of each as an artifact.

    Args:
        trainer: whose loggers.
        pictures: files by the name they are shown under.
        step: optimizer step.
    """
    if wandb_runs(trainer):
        import wandb

        log_media(trainer, {name: wandb.Image(str(path)) for name, path in pictures.items()}, step)
    writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if writers:
        from matplotlib.image import imread

        for name, path in pictures.items():
            pixels = imread(path)  # [height, width, 4], in [0, 1]
            for writer in writers:
                writer.add_image(name, pixels[..., :3], step, dataformats="HWC")
    for logger in trainer.loggers:
        if isinstance(logger, MLFlowLogger):
            for path in pictures.values():
                logger.experiment.log_artifact(logger.run_id, str(path), "pictures")


class Allowance:
    """Keeps the time spent inside ``with`` below a share of the time since it was made.

    Args:
        share: of the time; None for no limit.
        first_guess: seconds one use takes, until one was timed.
    """

    def __init__(self, share: float | None, *, first_guess: float = 3.0) -> None:
        self.share, self.made = share, time.perf_counter()
        self.spent, self.last = 0.0, first_guess

    def allowed(self) -> bool:
        """True when one more use, as long as the last one, stays within the share."""
        elapsed = time.perf_counter() - self.made
        return self.share is None or self.spent + self.last <= self.share * elapsed

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.last = time.perf_counter() - self._entered
        self.spent += self.last
