"""Lightning's own callbacks and trainer options, of which some cannot work here: refused by name, never left without effect."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from lit_opd.errors import InputError
from lit_opd.preflight.subject import Subject
from lit_opd.prompts import PromptDataModule
from lit_opd.run.lightning import callbacks_of

LOGGED = ("val/", "train/", "time/")  # what this project logs through the module, which is what callbacks can monitor
OWN_CODE = ("lightning.", "lit_opd.", "callbacks.", "torch.")  # whose names are known
WEIGHTS = "the sampled, the scored and the exported student would be different policies"
REFUSED: dict[str, str] = {  # class of Lightning's -> why not, and what to do
    "LearningRateFinder": "it needs automatic optimisation; try values of `model.optimizer.lr` with a small `trainer.max_steps`",
    "BatchSizeFinder": "it needs a batch size; `data.prompt_batch` is of the experiment, `model.token_budget` saves memory",
    "GradientAccumulationScheduler": "it needs automatic optimisation; `model.token_budget` cuts a batch without changing it",
    "StochasticWeightAveraging": f"it needs automatic optimisation and epochs ({WEIGHTS}); average exported checkpoints instead",
    "WeightAveraging": f"it validates other weights than it samples from ({WEIGHTS}); average exported checkpoints instead",
    "ModelPruning": f"it masks weights behind the optimizer's back ({WEIGHTS}); prune the exported student",
    "BackboneFinetuning": "it needs a `backbone`; freeze layers in a callback of yours, or set `model.student.lora`",
}


def check_callbacks(module: Subject, trainer: Trainer, data: PromptDataModule | None) -> None:
    """Every callback can do here what it is for.

    Args:
        module: of the run; what its validation measures, and parts that may log names of their own.
        trainer: whose callbacks.
        data: of the run.
    Raises:
        InputError: a callback that cannot work, or one that monitors a name that nobody logs.
    """
    callbacks = callbacks_of(trainer)
    for callback in callbacks:
        for name in (base.__name__ for base in type(callback).__mro__ if base.__module__.startswith("lightning.")):
            if name in REFUSED:
                raise InputError(f"`trainer.callbacks` must do without {type(callback).__name__}: {REFUSED[name]}")
    recipe = module.recipe
    own_code: tuple[Any, ...] = (recipe.weighting, recipe.objective, *recipe.advantage)
    if all(type(part).__module__.startswith(OWN_CODE) for part in (*callbacks, *own_code)):
        for callback in callbacks:
            _check_monitor(callback, module, data)


def _check_monitor(callback: Callback, module: Subject, data: PromptDataModule | None) -> None:
    """A name that can be known to be missing before anything is loaded."""
    monitor, own = getattr(callback, "monitor", None), type(callback).__name__
    if monitor is None or not getattr(callback, "strict", True):
        return
    if not str(monitor).startswith(LOGGED):
        raise InputError(
            f"`{own}.monitor` must be a metric that is logged, such as val/reverse_kl or val/greedy_accuracy, got {monitor!r}; "
            "docs/metrics.md has all"
        )
    without = getattr(data, "val", None) is None and getattr(data, "val_fraction", None) is None
    if str(monitor).startswith("val/") and without:
        raise InputError(f"`{own}.monitor` must be a train/ metric where `data.val` is null, got {monitor!r}")
    why = _unmeasured(str(monitor), module)
    if why is not None:
        raise InputError(
            f"`{own}.monitor` must be a metric that this run's validation measures, got {monitor!r}: {why}"
        )


def _unmeasured(name: str, module: Subject) -> str | None:
    """Why the validation does not measure it; None where it does, as far as that can be known before the data is read."""
    validation = module.validation
    if name == "val/greedy_accuracy" and not validation.greedy:
        return "`model.validation.greedy` is false"
    if name == "val/avg_at_k" and not validation.samples:
        return "`model.validation.samples` is 0"
    if name.startswith(("val/reverse_kl", "val/disagreement")) and not validation.divergence:
        return "`model.validation.divergence` is false"
    if name == "val/reverse_kl" and "token_kl" not in module.teacher.provides:
        return f"{type(module.teacher).__name__} gives no whole distribution here; take val/disagreement"
    return None


def check_batches(trainer: Trainer) -> None:
    """The trainer's limits leave something to train on, and batches between validations.

    Raises:
        InputError: they leave nothing.
    """
    interval = trainer.val_check_interval
    if isinstance(interval, int | float) and interval <= 0:
        raise InputError(
            f"`trainer.val_check_interval` must be >= 1, got {interval}: it counts batches; for no validation leave out "
            "`data.val`, or set `trainer.limit_val_batches` to 0"
        )
    limit = trainer.limit_train_batches
    if limit == 0:
        raise InputError(f"`trainer.limit_train_batches` must be above 0, got {limit}: nothing would be trained")
