"""Every run's config, read and checked before the first run starts, and what is there of each run already."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import CPUAccelerator

from lit_opd.cli.command import OPDCLI, input_error, quieten
from lit_opd.cli.redaction import one_line
from lit_opd.errors import InputError
from lit_opd.run.checkpoint_files import FOLDER, counters, newest, newest_step, numbered
from lit_opd.run.trained_settings import changes, shown
from lit_opd.shipped import PACKAGE, with_config_files
from lit_opd.sweep.logs import last_error
from lit_opd.sweep.options import Asked
from lit_opd.sweep.variants import Variant, variants

FINISHED, NEW, GOES_ON = "finished", "new", "goes on"
CONFIG, SUMMARY = "config.yaml", "summary.json"
WEIGHTING_KEY = ("model", "weighting", "class_path")
# of the place and the machine; the same tokens train the same weights whatever they are
OF_THE_PLACE = frozenset(
    """run_dir config seed_everything overwrite ckpt_path allow_change weights_only num_threads wandb tensorboard checkpoint_every
    memory_check memory_gb deep vars""".split()
) - {"seed_everything"}
Callbacks = Callable[[], list[Callback]]
Config = dict[str, Any]


@dataclass(frozen=True)
class SweepRun:
    """One run of the sweep.

    Args:
        variant: what it is a run of.
        seed: of everything.
        out: folder of the sweep.
        state: ``FINISHED``, ``NEW`` or ``GOES_ON``.
        step: optimizer step of its last checkpoint, 0 without one.
    """

    variant: Variant
    seed: int
    out: Path
    state: str = NEW
    step: int = 0

    @property
    def name(self) -> str:
        """Its folder below the sweep's."""
        return f"{self.variant.folder}/seed-{self.seed}"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.out / self.name

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.out / "logs" / f"{self.name}.log"

    def words(self, asked: Asked) -> list[str]:
        """Its command line."""
        configs = [word for config in asked.configs for word in ("--config", config)]
        own = ["--seed_everything", str(self.seed), "--run_dir", str(self.folder)]
        if self.state == GOES_ON:
            own += ["--ckpt_path", "last"]
        elif self.folder.is_dir() and any(self.folder.iterdir()):  # it was begun, and nothing of it was saved
            own += ["--overwrite", "true"]
        return with_config_files(["fit", *configs, *asked.overrides, *self.variant.words, *own])


@dataclass(frozen=True)
class Checked:
    """A sweep that may start.

    Args:
        runs: all, seed by seed, so that a stopped sweep has whole comparisons.
        steps: optimizer steps of a run, 0 where the config does not say.
        alone: whether each run needs a process of its own.
        devices: cards of a run, 0 where it runs on the CPU.
        threads: that the config asks for, None where it does not.
        code: folder of a variant -> file -> hash of the user's own code that its runs use, where one of them trains.
        warned: what the checks warned of.
    """

    runs: list[SweepRun]
    steps: int
    alone: bool
    devices: int
    threads: int | None
    code: dict[str, dict[str, str]]
    warned: list[str]


class _Checking(OPDCLI):
    """The command line of a fit that ends where the run folder would be made."""

    def before_fit(self) -> None:
        """The checks alone."""
        self.check_fit()

    def fit(self, **arguments: Any) -> None:
        """Nothing is trained."""


class _Reading(OPDCLI):
    """The command line of a fit that ends when its settings are known."""

    def before_instantiate_classes(self) -> None:
        """The folder is not looked at."""

    def instantiate_classes(self) -> None:
        """Nothing is built."""
        raise _Read(self.plain_config())


class _Read(Exception):
    """Carries the settings."""


def check(asked: Asked, callbacks: Callbacks, known: dict[str, Any]) -> Checked:
    """Check every run: of each variant one as ``fit`` does it, the others by their settings.

    Args:
        asked: the command line.
        callbacks: of every run.
        known: run -> what an earlier call wrote of it, see ``record.py``.
    Raises:
        InputError: a run that cannot train, or that was begun with other settings; it is named.
    """
    quieten()
    with _quiet() as caught:
        found = variants(asked)
        _require_baseline(asked, [variant.name for variant in found])
        runs = [_seen(SweepRun(variant, seed, asked.out)) for seed in asked.seeds for variant in found]
        configs = {run.name: _settings(run, asked) for run in runs if run.state != NEW}
        for run in (run for run in runs if run.state != NEW):
            _require_unchanged(run, configs[run.name], known.get(run.name, {}))
        first = [next((r for r in runs if r.variant == v and r.state != FINISHED), None) for v in found]
        checked = {run.name: _checked(run, asked, callbacks) for run in first if run is not None}
        configs |= {name: cli.plain_config() for name, cli in checked.items()}
    return _together(asked, runs, configs, list(checked.values()), [str(warning.message) for warning in caught])


def _together(
    asked: Asked, runs: Sequence[SweepRun], configs: dict[str, Config], made: Sequence[OPDCLI], warned: Sequence[str]
) -> Checked:
    """What was found; all variants run on one machine."""
    of_variant = {name.rpartition("/")[0]: config for name, config in configs.items()}
    runs = [_named(run, of_variant[run.variant.folder]) for run in runs]
    for cli in made:
        nodes = cli.trainer.num_nodes
        if nodes > 1:
            raise InputError(f"`trainer.num_nodes` must be 1 in a sweep, got {nodes}; start such runs one by one")
    settings = [cli.settings for cli in made]
    cards = [0 if isinstance(cli.trainer.accelerator, CPUAccelerator) else cli.trainer.num_devices for cli in made]
    threads = {setting.get("num_threads") for setting in settings}
    return Checked(
        runs=list(runs),
        steps=max([_steps(cli) for cli in made] or [0]),
        alone=any(cli.trainer.world_size > 1 for cli in made) or any(cards),
        devices=max(cards or [0]),
        threads=threads.pop() if len(threads) == 1 else None,
        code={name.rpartition("/")[0]: own_code(config) for name, config in configs.items()},
        warned=list(dict.fromkeys(map(one_line, warned))),
    )


def _steps(cli: OPDCLI) -> int:
    """Optimizer steps of a run, which ends at the first of its bounds; 0 where it has none."""
    trainer, batches = cli.trainer, math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        whole, limit = len(cli.datamodule.train_dataloader()), trainer.limit_train_batches
        batches = min(whole, limit) if isinstance(limit, int) else int(whole * limit)
    total = cli.model.steps_of(trainer, batches=batches)
    return int(total) if math.isfinite(total) else 0


def _seen(run: SweepRun) -> SweepRun:
    """With what is there of it."""
    ended = (run.folder / SUMMARY).is_file()
    if ended and not _left_its_end(run.folder):
        return replace(run, state=FINISHED)
    if not numbered(run.folder / FOLDER):
        return run
    return replace(run, state=GOES_ON, step=int(counters(newest(run.folder))["global_step"]))


def _left_its_end(folder: Path) -> bool:
    """Whether the newest checkpoint is of another step than the summary: the run went on or back after its end, and was stopped.
    Earlier versions left the summary there."""
    step = newest_step(folder)
    return step is not None and _summary(folder).get("steps", step) != step


def _summary(folder: Path) -> Config:
    """Empty where there is none that can be read; the comparison says what is wrong with it."""
    try:
        found = json.loads((folder / SUMMARY).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _named(run: SweepRun, config: Config) -> SweepRun:
    """A sweep of the config's own weighting is one of its class."""
    if run.variant.name:
        return run
    found: Any = config
    for key in WEIGHTING_KEY:
        found = (found or {}).get(key)
    return replace(run, variant=replace(run.variant, name=str(found or "config").rpartition(".")[2]))


def _require_baseline(asked: Asked, names: Sequence[str]) -> None:
    if asked.baseline is not None and asked.baseline not in names and all(names):
        raise InputError(f"`--baseline` must be one of the variants {', '.join(names)}, got {asked.baseline!r}")


# -- settings ------------------------------------------------------------------------------------------------------------


def _checked(run: SweepRun, asked: Asked, callbacks: Callbacks) -> OPDCLI:
    """Everything that ``fit`` checks before it trains, and that the seeds mean something."""
    with _about(run):
        cli = _Checking(default_callbacks=callbacks, args=run.words(asked))
    given = cli.settings["model"].get("seed")
    if given is not None and given != run.seed:
        raise InputError(
            f"`model.seed` must be null in a sweep, got {given}: all seeds would sample alike; leave it out"
        )
    order = cli.settings["data"].get("seed")
    if order is not None and "data.seed" not in asked.grid:
        warnings.warn(
            f"`data.seed` is {order}: all seeds see the prompts in one order, and the intervals leave out what another order "
            "would change; leave it out, and --seeds moves the order too",
            stacklevel=2,
        )
    return cli


def _settings(run: SweepRun, asked: Asked) -> Config:
    """The settings that the run is asked for."""
    with _about(run):
        return settings_of(run.words(asked))


def settings_of(words: Sequence[str]) -> Config:
    """All settings, with defaults, that a command line of ``fit`` asks for; nothing is built.

    Raises:
        SystemExit: the parser has said what is wrong.
    """
    try:
        _Reading(args=list(words))
    except _Read as read:
        return dict(read.args[0])
    raise AssertionError  # a command line builds its classes


def _saved(folder: Path) -> Config:
    path = folder / CONFIG
    return dict(yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}


def _require_unchanged(run: SweepRun, wanted: Config, known: dict[str, Any]) -> None:
    """A run that is kept or gone on with was begun with these settings, and with this code.

    Raises:
        InputError: it was not.
    """
    remedy = f"give another --out, or remove {run.folder} to train it anew"
    before, after = compared(_saved(run.folder)), compared(wanted)
    found = changes(before, after)
    if found:
        name, old, new = found[0]
        more = f" (and {len(found) - 1} more settings)" if len(found) > 1 else ""
        raise InputError(
            f"`{name}` must be what {run.name} was begun with, {shown(old)}, got {shown(new)}{more}; {remedy}"
        )
    spans = _trained(run)
    if len(spans) > 1:
        raise InputError(
            f"{run.name} must be trained with the same settings from its first step to its last, got others from step "
            f"{spans[1]} on (--allow_change, or an optimizer's options); {remedy}"
        )
    code = own_code(wanted)
    for file, value in known.get("code", {}).items():
        if code.get(file) != value:
            raise InputError(f"`{file}` must hold the code that {run.name} was begun with, got another; {remedy}")


def _trained(run: SweepRun) -> list[int]:
    """First steps of the parts that were trained with settings of their own, as a finished run or its checkpoint says."""
    if run.state == FINISHED:
        return [int(part["steps"][0]) for part in _summary(run.folder).get("trained") or []]
    checkpoint = numbered(run.folder / FOLDER).get(run.step)  # which ``_seen`` has found whole
    saved = counters(checkpoint).get("trained_settings") if checkpoint is not None else None
    return [int(part["start"]) + 1 for part in saved or []]


def compared(config: Config) -> Config:
    """Settings without what does not change a run's result."""
    kept = {key: value for key, value in config.items() if key not in OF_THE_PLACE}
    return kept | {"trainer": {**(kept.get("trainer") or {}), "default_root_dir": None}}


def own_code(config: Any) -> dict[str, str]:
    """File -> sha256 of the classes that the settings name and that are of no installed package, as they are now."""
    found = {}
    for path in _class_paths(config):
        module = sys.modules.get(path.rpartition(".")[0])
        file = getattr(module, "__file__", None)
        if file and not Path(file).is_relative_to(PACKAGE) and "site-packages" not in Path(file).parts:
            found[os.path.relpath(file)] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from [value["class_path"]] if isinstance(value.get("class_path"), str) else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inner:
        yield from _class_paths(part)


# -- output of the checks ------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Nothing is printed while runs are only checked; warnings are collected."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield caught
    finally:
        logging.disable(disabled)


@contextmanager
def _about(run: SweepRun) -> Iterator[None]:
    """What is wrong with a run is one line that names it."""
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            yield
    except SystemExit as error:  # the parser has said what is wrong
        raise InputError(f"{run.name}: {last_error(said.getvalue())}") from error
    except _Read:
        raise
    except Exception as error:
        cause = input_error(error)
        if cause is None:
            raise
        raise InputError(f"{run.name}: {one_line(str(cause))}") from error


# -- places --------------------------------------------------------------------------------------------------------------


def places(jobs: int, devices: int) -> list[dict[str, str]]:
    """Environment of each process: with several at a time on cards, cards of its own.

    Raises:
        InputError: there are too few.
    """
    if jobs == 1 or not devices:
        return [{} for _ in range(jobs)]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = given.split(",") if given else [str(card) for card in range(torch.cuda.device_count())]
    if len(cards) < jobs * devices:
        raise InputError(
            f"`--jobs` must be at most {max(1, len(cards) // devices)} with {devices} of {len(cards)} cards a run, got {jobs}; "
            "set `--trainer.devices`, or give fewer jobs"
        )
    starts = range(0, jobs * devices, devices)
    return [{"CUDA_VISIBLE_DEVICES": ",".join(cards[start : start + devices])} for start in starts]
