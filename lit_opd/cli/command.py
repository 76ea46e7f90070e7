"""``python train.py fit|validate|test|predict|preflight --config FILE [--config OVERLAY] [overrides]``; ``compare``; ``export``.

``OPDCLI`` is Lightning's command line with a fixed model and data class, ``${...}`` that follows overrides, the run folder, and
one-line errors. Checks that need no weights run before the trainer starts, so a wrong setting leaves no file.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from lit_opd.cli.parse_errors import USAGE_ERROR, OneLineParser
from lit_opd.cli.redaction import one_line, plain_values, redacted, with_references
from lit_opd.distributed import is_rank_zero, shared_failure
from lit_opd.errors import InputError, ServerError, Stopped, first_line, require
from lit_opd.files import replace_or_refuse
from lit_opd.module import OPDModule
from lit_opd.preflight import (
    NotEstimated,
    Plan,
    PlannedRun,
    estimate,
    read_plan,
    require_free,
    require_machine,
    require_memory,
)
from lit_opd.preflight.callback_checks import check_callbacks
from lit_opd.preflight.module_checks import check_before
from lit_opd.preflight.trainer import PreflightTrainer
from lit_opd.prompts.datamodule import PromptDataModule
from lit_opd.run.checkpoint_files import best, counters, intact, newest, requeued, saved_by_this_job
from lit_opd.run.former import set_later_aside
from lit_opd.run.lightning import callbacks_of, set_callbacks
from lit_opd.run.lightning_cli import PlainCLI
from lit_opd.run.loggers import chosen_loggers, describe, label, own_loggers, rename_for_mlflow
from lit_opd.run.replaced_folder import ReplacedFolder
from lit_opd.run.trained_settings import (
    FREE,
    Group,
    Settings,
    TrainedSettings,
    differences,
    require_unchanged,
    settings_of,
    shown,
    trained_settings,
)
from lit_opd.shipped import program, with_shipped_paths

LARGEST_SEED = 2**32 - 1
COMMANDS = ("compare", "export", "push", "chat")  # beside Lightning's, which all need the config of a run
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    "max_steps": 100,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
    "val_check_interval": 10,
    "log_every_n_steps": 1,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
MODEL_DEFAULTS: dict[str, Any] = {
    "model.teacher": {"class_path": "lit_opd.teacher.LocalTeacher"},
    "model.sampler": {"class_path": "lit_opd.rollout.TransformersSampler"},
    "model.weighting": {"class_path": "lit_opd.weighting.ImportanceWeighting"},
    "model.objective": {"class_path": "lit_opd.objective.PolicyLoss"},
}
WANDB_DEFAULTS = {"mode": "offline", "project": "lit-opd", "entity": None, "group": None, "tags": None}
# of one command line, not of the run
HOW_STARTED: dict[str, Any] = {"ckpt_path": None, "overwrite": False, "allow_change": []}
ONE_PROCESS: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False}
_MISSING_KEY = re.compile(r"Interpolation key '\.*([^']*)' not found.*")
_NOT_MADE = re.compile(r"Problem with given class_path '(?P<name>lightning\.[^']*)':\s*(?P<reason>.*)")
PARSERS = ("argparse", "jsonargparse", "omegaconf", "yaml")
NOISE = (  # other people's warnings that say nothing about a run of ours
    "LightningCLI's args parameter",  # ours are meant for callers in Python too, and it repeats them, secrets included
    "Using ModelCheckpoint with manual optimization",  # our checkpoints are meant to be of the updated weights
    "Found .* module.s. in eval mode",  # the teacher
    "You defined a `validation_step` but have no `val_dataloader`",
    ".*isinstance.treespec, LeafSpec.*",
    "The .* does not have many workers",  # prompts are tokenised once, at start
    "Experiment logs directory .* exists and is not empty",
    "Couldn't infer the batch indices",  # predictions carry their row ids
    "Total length of `list` across ranks is zero",
)


class RunConfig(SaveConfigCallback):
    """Writes the resolved config to ``config.yaml`` of the run folder, and to the loggers, once the run is really starting.

    It says what the run is. What a command line did once, going on from a checkpoint or emptying a folder, is not in it: a run
    made from this file would do it again, unasked.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: a later check may still refuse the run."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set aside what is there of later steps, then write the file, on rank 0."""
        with shared_failure():
            if trainer.is_global_zero:
                folder = Path(trainer.default_root_dir)
                folder.mkdir(parents=True, exist_ok=True)
                if trainer.ckpt_path:
                    kept = (getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks)
                    step = counters(Path(trainer.ckpt_path))["global_step"]
                    set_later_aside(folder, step, checkpoints=[Path(place) for place in kept if place])
                self._write(trainer, pl_module, folder)

    def _write(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        config = self.config.clone()
        for name, value in HOW_STARTED.items():
            if name in config:
                config[name] = value
        text = self.parser.dump(config, skip_none=False)
        replace_or_refuse(folder / "config.yaml", with_references(text).encode())
        describe(trainer.loggers, plain_values(text), seed=getattr(pl_module, "seed", None))


class OPDCLI(PlainCLI):
    """The command line of this project.

    Args:
        default_callbacks: makes the callbacks every run gets, unless the config names one of the same class.
        args: command line, default ``sys.argv``.
        run: False only parses and instantiates.
    """

    def __init__(
        self, *, default_callbacks: Callable[[], list[Callback]] = list, args: ArgsType = None, run: bool = True
    ) -> None:
        self._default_callbacks = default_callbacks
        self._new_folder = False
        self._changed: list[str] = []  # groups of settings that differ from those of the checkpoint
        self._before: Settings | None = None  # what the checkpoint was trained with
        self._words = [str(word) for word in (sys.argv[1:] if args is None else args) or ()]  # type: ignore[union-attr]
        self._replaced: ReplacedFolder | None = None
        if (
            os.getcwd() not in sys.path
        ):  # a class in a file of the folder one runs from is found while the config is parsed
            sys.path.insert(0, os.getcwd())
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        super().__init__(
            model_class=OPDModule,
            datamodule_class=PromptDataModule,
            trainer_class=PreflightTrainer,
            save_config_callback=RunConfig,
            seed_everything_default=42,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_class=OneLineParser,
            parser_kwargs={
                "parser_mode": "omegaconf+",
                "epilog": f"finished runs side by side: {program()} compare --help; "
                f"a checkpoint as a Hugging Face folder: {program()} export --help",
            },
            auto_configure_optimizers=False,
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and ``preflight``."""
        return LightningCLI.subcommands() | {"preflight": {"model", "datamodule"}}

    # -- parsing -----------------------------------------------------------------------------------------------------

    def typed_command(self) -> str | None:
        """The first word, where it is a subcommand."""
        first = self._words[0] if self._words else None
        return first if first in self.subcommands() else None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of a run that belong to neither trainer, model nor data."""
        parser.add_argument("--run_dir", type=str | None, default=None, help="run folder; default runs/<first config>")
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="replace the run in the folder; not from a config"
        )
        parser.add_argument(
            "--allow_change", nargs="+", type=Group, default=[], help="what may differ from the checkpoint's"
        )
        parser.add_argument("--num_threads", type=int | None, default=None, help="torch threads; default torch's own")
        modes, wandb = Literal["offline", "online", "disabled"], WANDB_DEFAULTS
        parser.add_argument("--wandb.mode", type=modes, default=wandb["mode"])
        parser.add_argument("--wandb.project", type=str, default=wandb["project"])
        parser.add_argument("--wandb.entity", type=str | None, default=None, help="account or team")
        parser.add_argument("--wandb.group", type=str | None, default=None, help="default the weighting's class")
        parser.add_argument("--wandb.tags", type=list[str] | None, default=None, help="default weighting and objective")
        parser.add_argument("--tensorboard", type=bool, default=False, help="log to tensorboard/ in the run folder too")
        parser.add_argument("--checkpoint_every", type=int, default=50, help="optimizer steps between checkpoints")
        parser.add_argument("--memory_check", type=bool, default=True, help="refuse a fit that cannot fit into memory")
        parser.add_argument(
            "--memory_gb", type=float | None, default=None, help="GiB a rank has; default this machine's"
        )
        parser.add_argument(
            "--deep", type=bool | None, default=None, help="preflight: load the models; default small ones for CPU runs"
        )
        parser.add_argument("--vars", type=dict, default={}, help="free values for ${vars.name}")
        parser.set_defaults(MODEL_DEFAULTS)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """As Lightning does, with an unresolvable ``${...}`` and an unreadable file as parser errors."""
        try:
            super().parse_arguments(parser, args)
            self.config = with_shipped_paths(self.config)
        except OmegaConfBaseException as error:
            what = _MISSING_KEY.sub(r"there is no `\1`", first_line(error))
            parser.error(
                f"the config has an interpolation that cannot be resolved: {what}; define it, or give the value"
            )
        except UnicodeDecodeError as error:
            parser.error(
                f"`--config` must be UTF-8 text, got byte {error.start + 1} of another encoding; save it as UTF-8"
            )
        except Exception as error:  # e.g. a YAML that holds itself, a number of thousands of digits
            if not _raised_by_a_parser(error):
                raise
            parser.error(f"`--config` must be plain settings, got {type(error).__name__}: {error}; correct the file")

    def check_options(self) -> None:
        """The range of the options that are no constructor's."""
        seed = self.settings.get("seed_everything")
        in_range = isinstance(seed, bool) or 0 <= seed <= LARGEST_SEED
        require(in_range, "--seed_everything", f"in [0, {LARGEST_SEED}]", seed)
        for name in ("num_threads", "checkpoint_every"):
            value = self.settings.get(name)
            require(value is None or value >= 1, f"--{name}", ">= 1", value)
        if self.settings.get("run_dir") == "":
            raise InputError("`--run_dir` must be a folder, got an empty text")
        # a pickle can run code when it is read
        require(self.settings.get("weights_only") is not False, "--weights_only", "true or null", False)

    @property
    def settings(self) -> Any:
        """The namespace of the chosen subcommand (or the whole config without one)."""
        return self.config[self.subcommand] if self.subcommand else self.config

    # -- the run folder ----------------------------------------------------------------------------------------------

    @property
    def run_dir(self) -> Path:
        """The run folder: ``--run_dir``, or ``runs/<name of the first config>``."""
        if self.settings.get("run_dir"):
            return Path(self.settings["run_dir"])
        configs = self.settings.get("config") or []
        return Path("runs") / (Path(str(configs[0])).stem if configs else "default")

    def before_instantiate_classes(self) -> None:
        """Threads, run folder and checkpoint path, before anything is built."""
        if self.settings.get("num_threads") is not None:
            torch.set_num_threads(self.settings["num_threads"])
        if not self.subcommand:
            return
        precision = str(self.settings["trainer"].get("precision"))
        if precision.startswith("16"):
            raise InputError(
                f"`trainer.precision` must be 32-true, 64-true or a bf16 one, got {precision}: float16 overflows"
            )
        self._count_overwrite()
        self._resolve_checkpoint()
        if self.subcommand == "fit" and is_rank_zero():
            require_free(self.run_dir, self.settings)
        self.settings["trainer"]["default_root_dir"] = str(self.run_dir)

    def _count_overwrite(self) -> None:
        """Only the command line may ask for it: what a config says would empty a folder whenever the config is used."""
        asked = any(word == "--overwrite" or word.startswith("--overwrite=") for word in self._words)
        if "overwrite" in self.settings and not asked:
            self.settings["overwrite"] = False

    def _resolve_checkpoint(self) -> None:
        path, overwrites = self.settings.get("ckpt_path"), bool(self.settings.get("overwrite"))
        if path is None and self.subcommand == "fit" and requeued(self.run_dir, overwrites=overwrites):
            path = "last"
        if path is not None:
            self.settings["ckpt_path"] = str(self._own_checkpoint(str(path)) or self._named_checkpoint(str(path)))
            saved = self._saved_counters()  # a file that cannot be read is an error now
            if self.subcommand == "fit":
                self._require_same_run(saved)
            if "weights_only" in self.settings:
                self.settings["weights_only"] = True

    def _own_checkpoint(self, path: str) -> Path | None:
        """Where a SLURM job that was queued again has come to since it began at ``path``; None where that does not count."""
        found = saved_by_this_job(self.run_dir) if self.subcommand == "fit" and path != "last" else None
        if found is not None:
            rank_zero_warn(f"the job was queued again and goes on from its own {found}, not from `--ckpt_path` {path}")
        return found

    def _named_checkpoint(self, path: str) -> Path:
        """``last``, ``best``, or a path."""
        if path == "last":
            return newest(self.run_dir)
        return best(self.run_dir) if path == "best" else intact(Path(path))

    def plain_config(self) -> dict[str, Any]:
        """The config as plain values, secrets left out."""
        text = self.command_parser().dump(self.settings, skip_none=False)
        return dict(plain_values(text))

    def _require_same_run(self, saved: dict[str, Any]) -> None:
        """A run that goes on has the settings that its checkpoint was trained with, or those that may change by name."""
        checkpoint = Path(self.settings["ckpt_path"])
        self._before = before = settings_of(checkpoint, saved)
        if before is None:
            rank_zero_warn(
                f"`--ckpt_path` {checkpoint} does not say what it was trained with: see that the config is its run's"
            )
            return
        self._require_own_folder(checkpoint, before)
        now, allowed = trained_settings(self.plain_config()), self.settings.get("allow_change") or []
        self._changed = require_unchanged(before, now, allowed=allowed, checkpoint=checkpoint)
        limit, step = self.settings["trainer"].get("max_steps") or -1, saved["global_step"]
        if set(self._changed) - FREE and 0 < limit <= step:
            raise InputError(
                f"`trainer.max_steps` must be above the checkpoint's step {step} to train with another "
                f"{', '.join(self._changed)}, got {limit}"
            )
        if 0 < limit < step:
            raise InputError(
                f"`trainer.max_steps` must be at least the checkpoint's step {step}, and above it to train further, got {limit}; "
                "to start from an earlier step, name its checkpoint in --ckpt_path"
            )

    def _require_own_folder(self, checkpoint: Path, before: Settings) -> None:
        """Another run's lines up to the checkpoint's step would count as this run's."""
        config, own = self.run_dir / "config.yaml", [self.run_dir, *_named_folders(self.plain_config().get("trainer"))]
        if not config.is_file() or any(checkpoint.resolve().is_relative_to(place.resolve()) for place in own):
            return
        there = trained_settings(yaml.safe_load(config.read_text(encoding="utf-8")) or {})
        found = [change for changes in differences(there, before).values() for change in changes]
        if found:
            name, here, saved = found[0]
            raise InputError(
                f"`--run_dir` must be empty, new or the run of `--ckpt_path` {checkpoint}, got {self.run_dir} with another run: "
                f"its `{name}` is {shown(here)}, that of the checkpoint {shown(saved)}; give another --run_dir"
            )

    def check_fit(self) -> None:
        """Every check that needs no weights; writes nothing."""
        self._check_all()
        self._check_memory()
        if is_rank_zero():
            require_machine(self._run())

    def before_fit(self) -> None:
        """The checks, then the folder."""
        self.check_fit()
        if not is_rank_zero():
            return
        if self.settings.get("overwrite") and not self.settings.get("ckpt_path"):
            self._move_aside()
        self._new_folder = not self.run_dir.exists()
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.run_dir) as file:  # permissions do not tell of quotas and full disks
                file.write(bytes(1024))
        except OSError as error:
            raise InputError(
                f"`--run_dir` must be writable, got {self.run_dir}: {error.strerror}; give another folder"
            ) from error

    def _move_aside(self) -> None:
        """The run that is replaced, until there is a checkpoint of the new one."""
        self._replaced = ReplacedFolder(self.run_dir)
        self._replaced.move()
        set_callbacks(self.trainer, [*callbacks_of(self.trainer), self._replaced])

    def fit(self, **arguments: Any) -> None:
        """The trainer's fit; a run that is refused or stopped while it loads leaves everything as it was."""
        self.model.state.trained = TrainedSettings(trained_settings(self.plain_config()), self._before)
        self.model.state.allowed = frozenset(self.settings.get("allow_change") or [])
        self.datamodule.may_differ = bool({"data", "seed"} & {*self._changed})
        try:
            self.trainer.fit(**arguments)
        except (Exception, Stopped) as error:
            started = (self.run_dir / "config.yaml").exists()
            if self._new_folder and not started and is_rank_zero():
                _finish_wandb()
                _remove(self.run_dir)
                if self._replaced is not None:
                    self._replaced.put_back()
            if self._replaced is not None and self._replaced.note():
                error.add_note(self._replaced.note())
            raise

    def before_validate(self) -> None:
        """Every check that needs no weights."""
        self._check_all()

    before_test = before_predict = before_validate

    def _check_all(self) -> None:
        """The module's checks, then those of callbacks that have some."""
        path, training = self.settings.get("ckpt_path"), self.subcommand == "fit"
        if training:
            check_callbacks(self.model, self.trainer, self.datamodule)
        check_before(self.model, self.trainer, self.datamodule, ckpt_path=path, training=training)
        for callback in callbacks_of(self.trainer):
            check = getattr(callback, "check", None)
            if check is not None and self.subcommand != "predict":
                check(self.model, self.datamodule)

    def _check_memory(self) -> None:
        """Refuse what is clearly too large for this machine; what cannot be estimated is not refused."""
        if not self.settings.get("memory_check"):
            return
        plan = self._plan()
        try:
            require_memory(estimate(self.model, self.datamodule, plan), plan)
        except NotEstimated as reason:
            logging.getLogger(__name__).info("memory is not estimated: %s", reason)

    def _plan(self) -> Plan:
        """The machine the config asks for."""
        strategy = self.given("trainer").get("strategy")
        return read_plan(self.settings["trainer"], strategy=strategy, memory_gb=self.settings.get("memory_gb"))

    # -- preflight ---------------------------------------------------------------------------------------------------

    def before_preflight(self) -> None:
        """Tell the trainer what it cannot know: run folder, planned machine, options."""
        self.trainer.preflight_run = self._run()  # type: ignore[attr-defined]

    def _run(self) -> PlannedRun:
        """What the checks look at."""
        return PlannedRun(
            module=self.model,
            data=self.datamodule,
            trainer=self.trainer,
            plan=self._plan(),
            run_dir=self.run_dir,
            settings=self.settings,
        )

    def preflight(self, **arguments: Any) -> None:
        """Print every check; exit status 2 where one is an error, else 0."""
        findings = self.trainer.preflight(**arguments)  # type: ignore[attr-defined]
        if any(finding.status == "error" for finding in findings):
            raise SystemExit(USAGE_ERROR)

    # -- the trainer -------------------------------------------------------------------------------------------------

    def instantiate_classes(self) -> None:
        """As Lightning does; one of its classes that refuses its settings, or whose package is missing, is one line."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            found = _NOT_MADE.search(str(error))
            if found is None or isinstance(input_error(error), InputError | ServerError):
                raise
            raise InputError(
                f"`{found['name']}` cannot be made with its settings: {found['reason']}; correct them, or install what is missing"
            ) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the run folder's loggers and the default callbacks."""
        if self.subcommand in ("fit", "preflight"):
            self._warn_of_loggers()
        if self.subcommand == "preflight":  # checks the plan from wherever it is asked to
            kwargs |= ONE_PROCESS
        elif self.subcommand in (None, "fit") and self.given("trainer.logger") is not False:
            kwargs.setdefault("logger", self._loggers(self.given("trainer.logger")))
        elif self.given("trainer.logger") in (None, True):
            kwargs.setdefault("logger", [])
        given = self.given("trainer.callbacks") or ()
        users = list(
            given if isinstance(given, list | tuple) else [given]
        )  # a copy: the trainer adds its own to the list
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            if isinstance(input_error(error), InputError | ServerError):
                raise
            raise InputError(f"`trainer` must have settings that Lightning accepts: {error}") from error
        extra = [own for own in self._default_callbacks() if not any(isinstance(user, type(own)) for user in users)]
        for callback in (*users, *extra):
            every = self.settings.get("checkpoint_every")
            if hasattr(callback, "use_run_dir") and every:
                callback.use_run_dir(self.run_dir, every)
        _attach(trainer, extra, users)
        return trainer

    def _warn_of_loggers(self) -> None:
        """``trainer.logger`` takes the place of W&B and TensorBoard, whose options then do nothing."""
        if self.given("trainer.logger") in (None, True):
            return
        wandb = self.settings["wandb"]
        given = [f"--wandb.{name}" for name, default in WANDB_DEFAULTS.items() if wandb.get(name) != default]
        given = [name for name in given if wandb.get("mode") != "disabled"]
        given += ["--tensorboard"] if self.settings.get("tensorboard") else []
        if given:
            rank_zero_warn(
                f"`{', '.join(given)}` has no effect beside `trainer.logger`, which takes the place of W&B and TensorBoard; "
                "leave one of both out, or list WandbLogger or TensorBoardLogger there with its arguments"
            )

    def _loggers(self, given: Any) -> list[Logger]:
        """The user's in place of W&B and TensorBoard; ``metrics.csv`` is written in any case."""
        if self.subcommand != "fit":
            return []
        saved = self._saved_counters()
        users = given if isinstance(given, list | tuple) else [given]
        chosen = chosen_loggers(self.run_dir, self.settings, saved) if given in (None, True) else users
        label(chosen, self.plain_config())
        rename_for_mlflow(chosen)
        return [*own_loggers(self.run_dir, saved), *chosen]

    def _saved_counters(self) -> dict[str, Any]:
        """What the checkpoint says that the run goes on from; empty for a new run."""
        path = self.settings.get("ckpt_path")
        return {} if path is None else counters(Path(path))


def _attach(trainer: Trainer, extra: list[Callback], users: list[Callback]) -> None:
    """Add callbacks to a built trainer. Progress bar and checkpoints take the place of those that Lightning adds by itself; the
    user's are all kept, and a progress bar of theirs is the only one."""
    from lightning.pytorch.callbacks import Checkpoint, ProgressBar

    if any(isinstance(user, ProgressBar) for user in users) or not trainer.progress_bar_callback:
        extra = [own for own in extra if not isinstance(own, ProgressBar)]
    if not trainer.checkpoint_callbacks:  # enable_checkpointing is false
        extra = [own for own in extra if not isinstance(own, Checkpoint)]
    replaced = tuple(kind for kind in (ProgressBar, Checkpoint) if any(isinstance(own, kind) for own in extra))
    kept = [found for found in callbacks_of(trainer) if found in users or not isinstance(found, replaced)]
    set_callbacks(trainer, kept + extra)


def _named_folders(settings: Any) -> Iterator[Path]:
    """Folders of checkpoints that the settings of a trainer name."""
    if isinstance(settings, dict) and isinstance(settings.get("dirpath"), str):
        yield Path(settings["dirpath"])
    inner = settings.values() if isinstance(settings, dict) else settings if isinstance(settings, list) else ()
    for part in inner:
        yield from _named_folders(part)


def _raised_by_a_parser(error: BaseException) -> bool:
    """True where the innermost frame reads settings; an error in a file of the user's own keeps its traceback."""
    innermost = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return str(innermost.f_globals.get("__name__")).partition(".")[0] in PARSERS


def _remove(folder: Path) -> None:
    """Delete a run folder that nothing was trained in, and ``runs`` where that leaves it empty."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # other runs are in it
        if folder.parent == Path("runs"):
            folder.parent.rmdir()


class _NoTips(logging.Filter):
    """Lets everything through but Lightning's product tips and transformers' tables of weights, of which our errors tell."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a tip."""
        message = record.getMessage()
        return "Tip:" not in message and "LOAD REPORT" not in message


def quieten() -> None:
    """Leave the screen to this project's own output."""
    from transformers.utils import logging as transformers_logging

    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.pytorch.trainer.connectors.logger_connector",
        "transformers.modeling_utils",
    ):
        logging.getLogger(name).addFilter(_NoTips())
    transformers_logging.disable_progress_bar()
    os.environ.setdefault("WANDB_SILENT", "true")


def main(default_callbacks: Callable[[], list[Callback]] = list, args: Sequence[str] | None = None) -> None:
    """Run the command line; wrong input ends with one line and exit status 2."""
    quieten()
    try:
        words = list(sys.argv[1:] if args is None else args)
        if words and words[0] in COMMANDS:
            _own_command(words[0])(words[1:])
        else:
            OPDCLI(default_callbacks=default_callbacks, args=list(args) if args is not None else None)
    except Exception as error:
        cause = input_error(error)
        if cause is None:
            raise
        notes = [redacted(note) for note in getattr(cause, "__notes__", ())]
        print("\n".join([f"error: {one_line(str(cause))}", *notes]), file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from error
    except Stopped as stop:
        if is_rank_zero():
            print("\n".join([str(stop), *getattr(stop, "__notes__", ())]), file=sys.stderr)
        raise
    finally:
        _finish_wandb()


def _own_command(name: str) -> Callable[[Sequence[str]], None]:
    """One of ``COMMANDS``."""
    from lit_opd.cli import chat, export, push
    from lit_opd.compare import command as compare

    return {"compare": compare.run, "export": export.run, "push": push.run, "chat": chat.run}[name]


def _finish_wandb() -> None:
    """Close the run's W&B file, so that a second fit in the same process gets a file of its own."""
    import wandb

    if wandb.run is not None:
        wandb.finish()


def input_error(error: BaseException) -> BaseException | None:
    """The InputError or ServerError behind what a library made of it, or Lightning's own word on settings; None for others."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError | ServerError):
        cause = cause.__cause__ or cause.__context__
    return error if cause is None and isinstance(error, MisconfigurationException) else cause
