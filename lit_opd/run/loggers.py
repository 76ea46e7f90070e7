"""The loggers of a run: the CSV file that every run has, W&B, TensorBoard, the user's own; and what each is told of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lit_opd.errors import InputError, first_line
from lit_opd.run.csv_logger import RunCSVLogger, run_id
from lit_opd.run.lightning import log_settings, wandb_settings
from lit_opd.run.trained_settings import strategy_name, trained_settings
from lit_opd.run.wandb_logger import RunWandbLogger

TENSORBOARD = "tensorboard"  # folder in the run folder
# beside the settings of each run in TensorBoard's HPARAMS; those that a run does not log are empty there
SHOWN_WITH_SETTINGS = ("val/greedy_accuracy", "val/avg_at_k", "val/reverse_kl", "train/reverse_kl_k1", "train/reward")


def own_loggers(run_dir: Path, saved: Mapping[str, Any]) -> list[Logger]:
    """``metrics.csv``, which summary, comparison and resume read: beside whatever else logs.

    Args:
        run_dir: the run folder.
        saved: what the checkpoint says that the run goes on from; empty for a new run.
    """
    validated = not saved.get("validation_due", False)
    return [RunCSVLogger(str(run_dir), continued_from=saved.get("global_step"), validated=validated)]


def chosen_loggers(run_dir: Path, settings: Mapping[str, Any], saved: Mapping[str, Any]) -> list[Logger]:
    """W&B unless it is disabled, and TensorBoard where it is asked for.

    Args:
        run_dir: the run folder.
        settings: of the command line.
        saved: as for ``own_loggers``.
    Raises:
        InputError: TensorBoard's package is missing.
    """
    wandb = settings["wandb"]
    found: list[Logger] = []
    if wandb["mode"] != "disabled":
        named = {name: wandb[name] for name in ("project", "entity", "group", "tags") if wandb.get(name)}
        identity = run_id(run_dir) if saved else None
        offline = wandb["mode"] == "offline"
        found.append(RunWandbLogger(name=run_dir.name, save_dir=str(run_dir), id=identity, offline=offline, **named))
    if settings.get("tensorboard"):
        try:
            # of a run that goes on, TensorBoard hides what was logged after the checkpoint
            later: dict[str, Any] = {"purge_step": int(saved["global_step"]) + 1} if saved else {}
            found.append(TensorBoardLogger(str(run_dir), name=TENSORBOARD, version="", **later))
        except ModuleNotFoundError as error:
            raise InputError(
                f"`--tensorboard` needs the package tensorboard or tensorboardX ({first_line(error)}); "
                "install the extra: pip install -e '.[tensorboard]'"
            ) from error
    return found


def describe(loggers: Sequence[Logger], config: Mapping[str, Any], *, seed: int | None) -> None:
    """Tell every logger but the run's own CSV file what the run is; rank 0, before the first number.

    Args:
        loggers: of the trainer.
        config: the resolved config as plain values without secrets.
        seed: of the run.
    """
    trained = trained_settings(config)
    strategy, objective = strategy_name(trained), _class_name(config, "objective", "PolicyLoss")
    labels = {"strategy": strategy, "objective": objective, "seed": seed, "learning_rate": _rate(config)}
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            log_settings(logger, {**labels, **config}, metrics=SHOWN_WITH_SETTINGS)
        elif not isinstance(logger, RunCSVLogger):
            logger.log_hyperparams({**labels, **config})


def label(loggers: Sequence[Logger], config: Mapping[str, Any]) -> None:
    """Give W&B's runs group and tags before they begin, unless they have some: seeds of one strategy stand together.

    Args:
        loggers: W&B's among them.
        config: as for ``describe``.
    """
    strategy = strategy_name(trained_settings(config))
    for settings in (wandb_settings(logger) for logger in loggers if isinstance(logger, WandbLogger)):
        settings["group"] = settings.get("group") or strategy
        settings["tags"] = list(settings.get("tags") or (strategy, _class_name(config, "objective", "PolicyLoss")))


def name_for_mlflow(metric: str) -> str:
    """A metric's name as MLflow keeps it: its files have a folder for each slash, so no name may be the folder of another.

    >>> name_for_mlflow("val/disagreement/band_00"), name_for_mlflow("val/disagreement")
    ('val/disagreement_band_00', 'val/disagreement')
    """
    return metric.replace("/band_", "_band_")


def rename_for_mlflow(loggers: Sequence[Logger]) -> None:
    """Let MLflow's loggers among them rename what they log."""
    for logger in loggers:
        if isinstance(logger, MLFlowLogger):
            logger.log_metrics = partial(_log_renamed, logger.log_metrics)  # type: ignore[method-assign]


def _log_renamed(log: Callable[..., None], metrics: Mapping[str, float], step: int | None = None) -> None:
    log({name_for_mlflow(name): value for name, value in metrics.items()}, step)


def _class_name(config: Mapping[str, Any], name: str, default: str) -> str:
    given = (config.get("model") or {}).get(name) or {}
    return str(given.get("class_path", default)).rsplit(".", 1)[-1]


def _rate(config: Mapping[str, Any]) -> float | None:
    """The optimizer's, None where it has its class's own."""
    optimizer = (config.get("model") or {}).get("optimizer") or {}
    rate = (optimizer.get("init_args") or optimizer).get("lr") if isinstance(optimizer, Mapping) else None
    return None if rate is None else float(rate)
