"""The rows of the preflight table: small functions from a run to a finding. A new check is a function in ``CHECKS``.

A check that raises ``InputError`` or ``ServerError`` becomes an error row; warnings it gives become warning rows.
"""

from __future__ import annotations

import logging
import netrc
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, StrategyRegistry

from lit_opd.errors import InputError, ServerError
from lit_opd.preflight.aligned_checks import check_aligned, own_tokenizer
from lit_opd.preflight.callback_checks import check_callbacks
from lit_opd.preflight.estimate import estimate, shortage, trained_dtype
from lit_opd.preflight.hindsight_checks import check_hindsight
from lit_opd.preflight.memory import ACCURACY, Budget
from lit_opd.preflight.module_checks import (
    check_batch,
    check_reward,
    check_rollout_stop,
    check_scorers,
    check_servers,
    check_token_budget,
    check_trainer,
    check_window,
    setting_warnings,
    stop_warnings,
)
from lit_opd.preflight.partial_checks import check_partial
from lit_opd.preflight.plan import GIB, Plan
from lit_opd.preflight.probe import NotProbed, Probe, probe
from lit_opd.preflight.replay_checks import check_replay
from lit_opd.preflight.run_folder import freed_bytes, require_free
from lit_opd.preflight.sizes import ModelSize, NotEstimated, model_size, optimizer_bytes
from lit_opd.preflight.strategy_checks import check_ranks, check_strategy
from lit_opd.preflight.subject import Subject
from lit_opd.prompts import PromptDataModule
from lit_opd.run.checkpoint_files import FOLDER as CHECKPOINTS
from lit_opd.run.checkpoint_files import counters
from lit_opd.run.lightning import callbacks_of
from lit_opd.servers.client import Servers
from lit_opd.teacher import AlignedTeacher

Status = Literal["ok", "warning", "error"]
_STATES: tuple[Status, ...] = ("ok", "warning", "error")
_DATA_LOGGER = "lightning.pytorch.utilities.rank_zero"


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Args:
        status: "error" stops a fit, "warning" does not.
        found: what was found.
        remedy: what to change, empty where nothing is wrong.
        name: of the check; filled by ``examine``.
    """

    status: Status
    found: str
    remedy: str = ""
    name: str = ""


class PlannedRun:
    """What the checks look at.

    Args:
        module: the ``OPDModule``.
        data: the ``PromptDataModule``.
        trainer: a trainer of this machine, which may not be the planned one.
        plan: where the run is meant to run.
        run_dir: the run folder.
        settings: the rest of the command line's options ("overwrite", "ckpt_path", "wandb", "checkpoint_every", "config",
            "deep").
    """

    def __init__(
        self,
        *,
        module: Subject,
        data: PromptDataModule,
        trainer: Trainer,
        plan: Plan,
        run_dir: Path,
        settings: Mapping[str, Any],
    ) -> None:
        self.module, self.data, self.trainer = module, data, trainer
        self.plan, self.run_dir, self.settings = plan, run_dir, settings
        self.failed: list[str] = []  # checks that were errors, filled by ``examine``
        module.trainer = trainer

    @cached_property
    def budget(self) -> Budget:
        """The memory budget of one rank; see ``estimate``."""
        return estimate(self.module, self.data, self.plan)

    @cached_property
    def probe(self) -> Probe:
        """A few prompts through the real models; see ``probe``."""
        if self.failed:
            raise NotProbed(f"first the errors of: {', '.join(self.failed)}")
        return probe(self.module, self.data, self.trainer, self.plan, deep=self.settings.get("deep"))

    @property
    def estimated(self) -> Budget | None:
        """The budget where a check has asked for it and it could be told."""
        return self.__dict__.get("budget")


# -- models and data ---------------------------------------------------------------------------------------------------


def config(run: PlannedRun) -> Finding:
    """That it was read: the parser has refused unknown keys and values by now."""
    files = ", ".join(str(path) for path in run.settings.get("config") or []) or "no file"
    module = run.module
    engine, sampler = type(module.sampler.engine).__name__, type(module.sampler).__name__
    sampler = sampler if sampler == engine else f"{sampler}({engine})"
    used = f"{type(module.teacher).__name__}, {sampler}, {type(module.recipe.weighting).__name__}"
    return Finding("ok", f"{files}: {used}, {type(module.recipe.objective).__name__}")


def trainer(run: PlannedRun) -> Finding:
    """Settings that this module's own optimisation follows, and a strategy that works."""
    strategy = run.plan.strategy
    known = ("auto", *StrategyRegistry.available_strategies())
    if isinstance(strategy, str) and strategy not in known:
        return Finding("error", f"`trainer.strategy` must be a strategy Lightning knows, got {strategy!r}",
                       "give one of its names, or a class path with arguments (lightning.pytorch.strategies....)")  # fmt: skip
    check_strategy(strategy)
    check_ranks(strategy, local_ranks=run.plan.local_ranks, nodes=run.plan.nodes)
    check_trainer(run.module)
    return Finding("ok", run.plan.describe())


def tokenizers(run: PlannedRun) -> Finding:
    """The same tokens have the same ids in all models."""
    return Finding("ok", f"{run.module.vocabulary} vocabulary entries shared by student and teacher")


def data(run: PlannedRun) -> Finding:
    """Every source can be read, rendered and leaves prompts."""
    own = own_tokenizer(run.module, run.data)
    run.data.use_tokenizer(run.module.tokenizer, own).use_sampler(run.module.sampler)
    run.data.trainer = run.trainer
    with _messages(_DATA_LOGGER) as said:
        run.data.setup("fit")
    train, val = run.data.num_prompts
    counts = f"{train} training and {val} validation prompts, the longest {run.data.longest_prompt} tokens"
    return Finding("ok", "; ".join([counts, *said]))


def templates(run: PlannedRun) -> Finding:
    """Who renders the prompts that the teacher reads."""
    _ = run.module.tokenizer  # first: without it no encoder can be made
    if run.data.teacher_encoder is not None:
        return Finding(
            "ok", "the teacher renders its own template (allowed): it reads other prompt tokens than the student"
        )
    ours = run.data.encoder.tokenizer.chat_template
    pairs = [pair for scorer in run.module.scorers.values() for pair in scorer.tokenizers()]
    differing = sum(tokenizer.chat_template != ours for tokenizer, _ in pairs)
    if differing and run.data.chat_template is not False:
        return Finding(
            "warning",
            f"{differing} frozen model(s) have another chat template, and read the student's",
            "to let a teacher render its own, set data.teacher_tokenizer to its folder",
        )
    return Finding("ok", "student and teacher read the same prompt tokens")


def stop_ids(run: PlannedRun) -> Finding:
    """Both sides end a response with the same tokens."""
    ids = run.module.stop_ids
    names = ", ".join(f"{run.module.tokenizer.convert_ids_to_tokens(stop)!r} ({stop})" for stop in ids)
    for warning in stop_warnings(run.module):
        return _split("warning", warning)
    return Finding("ok", f"a response ends at {names}, for the teacher too")


def alignment(run: PlannedRun) -> Finding:
    """A teacher with another tokenizer scores enough of the tokens."""
    found = check_aligned(run.module, run.data)
    own = run.module.teacher
    if found is None or not isinstance(own, AlignedTeacher):
        return Finding("ok", "student and teacher have the same tokens")
    scored, total = found
    ends = {own.prompt_tokenizer.convert_ids_to_tokens(own.aligner.roles[stop]) for stop in run.module.stop_ids}
    return Finding(
        "ok",
        f"the teacher would score {scored} of the first prompts' {total} tokens (chunks: {own.chunks}); its end of turn is "
        + ", ".join(sorted(map(repr, ends))),
    )


def signals(run: PlannedRun) -> Finding:
    """Everything that is read can be given, and settings have an effect."""
    check_scorers(run.module)
    check_reward(run.module, run.data)
    check_hindsight(run.module, run.data)
    check_rollout_stop(run.module, sharded=run.plan.shards > 1 or isinstance(run.plan.strategy, FSDPStrategy))
    check_replay(run.module, run.data)
    said = [_split("warning", warning) for warning in setting_warnings(run.module)]
    if said:
        remedies = dict.fromkeys(one.remedy for one in said if one.remedy)
        return Finding("warning", "; ".join(one.found for one in said), "; ".join(remedies))
    required = frozenset().union(*(recipe.required for recipe in run.module.recipes))
    read = ", ".join(sorted(required)) or "nothing beyond log-probs"
    return Finding("ok", f"reads {read}")


# -- sizes -------------------------------------------------------------------------------------------------------------


def batch(run: PlannedRun) -> Finding:
    """The batch divides over the planned ranks."""
    check_batch(run.module, run.data, ranks=run.plan.ranks)
    check_partial(run.module, run.data, ranks=run.plan.ranks)
    rows = run.data.prompt_batch // run.plan.ranks * run.data.samples_per_prompt
    fewest, most = run.module.sampler.trained_rows(rows)
    trained = "" if most == rows else f"; {fewest} to {most} are trained on in a step, the others wait"
    return Finding("ok", f"{rows} rows on each of {run.plan.ranks} rank(s){trained}")


def window(run: PlannedRun) -> Finding:
    """Prompt and response fit into the context."""
    check_window(run.module, run.data)
    length = run.data.max_prompt_tokens + run.module.sampler.max_new_tokens
    config = run.module.student_config.get_text_config()
    return Finding("ok", f"{length} of {getattr(config, 'max_position_embeddings', 'unknown')} tokens")


def token_budget(run: PlannedRun) -> Finding:
    """A micro-batch holds the longest row."""
    check_token_budget(run.module, run.data)
    limit = run.module.token_budget
    return Finding("ok", "all rows of a rank in one micro-batch" if limit is None else f"{limit} tokens a micro-batch")


def servers(run: PlannedRun) -> Finding:
    """Servers answer, with the right model and room for the longest row."""
    check_servers(run.module, run.data)
    parts = [run.module.sampler.engine, *(part for scorer in run.module.scorers.values() for part in scorer.modules())]
    urls = [url for part in parts if isinstance(found := getattr(part, "servers", None), Servers) for url in found.urls]
    return Finding("ok", f"answering: {', '.join(urls)}" if urls else "none is used")


def memory(run: PlannedRun) -> Finding:
    """The estimated peak of a rank against its memory."""
    try:
        found = run.budget
    except NotEstimated as error:
        return Finding("warning", f"not estimated: {error}", "try a few steps on the real machine")
    need = f"{found.peak / GIB:.1f} GiB a rank in its worst phase ({found.worst}), +- {ACCURACY:.0%}"
    if run.plan.memory is None:
        return Finding("warning", f"{need}; {run.plan.memory_source}", "give --memory_gb, the GiB of one device")
    if found.peak > run.plan.memory:
        return Finding("error", shortage(found, run.plan), found.remedy)
    if found.peak * (1 + ACCURACY) > run.plan.memory:
        return Finding("warning", f"close: {shortage(found, run.plan)}", found.remedy)
    return Finding("ok", f"{need}, of {run.plan.memory / GIB:.1f} ({run.plan.memory_source})")


# -- real models -------------------------------------------------------------------------------------------------------


def logprobs(run: PlannedRun) -> Finding:
    """The sampler draws from the distribution that the student's scorer scores, and every scorer is finite."""
    try:
        found = run.probe
    except NotProbed as reason:
        return _not_probed(reason)
    means = f"mean |student - sampler| {found.gap:.2g} nats over {found.tokens} tokens (bound {found.gap_bound:g})"
    sampler = run.module.sampler
    if sampler.top_p < 1 or sampler.top_k:
        return Finding("ok", f"{means}: top-p and top-k cut the sampler's distribution, so they differ on purpose")
    if not found.gap <= found.gap_bound:
        remedy = (
            "sampler and scorer differ in temperature, dtype, attention or padding: try another sampler, or float32"
        )
        return Finding("error", means, remedy)
    return Finding("ok", f"{means}; mean |teacher - student| {found.disagreement:.2g}")


def own_teacher(run: PlannedRun) -> Finding:
    """A student that is its own teacher has nothing to learn: A = 0."""
    try:
        found = run.probe
    except NotProbed as reason:
        return _not_probed(reason)
    if found.own is None:
        return Finding("ok", "no teacher is in this process: not probed")
    text = f"largest |A| {found.own:.2g} nats with the student as teacher, row by row (bound {found.own_bound:g})"
    if not found.own <= found.own_bound:
        remedy = "its log-probs depend on padding or on the batch: try attn_implementation eager, or float32"
        return Finding("error", text, remedy)
    return Finding("ok", text)


def _not_probed(reason: NotProbed) -> Finding:
    if reason.by_choice:
        return Finding("ok", f"not probed: {reason}")
    return Finding("warning", f"not probed: {reason}", "--deep true loads the models and tries a few prompts")


# -- files and accounts ------------------------------------------------------------------------------------------------


def run_folder(run: PlannedRun) -> Finding:
    """New or empty, and writable."""
    require_free(run.run_dir, run.settings)
    for folder in dict.fromkeys([_existing(run.run_dir), _existing(run.run_dir / "checkpoints")]):
        if not os.access(folder, os.W_OK | os.X_OK):
            return Finding("error", f"{folder} is not writable", "give another --run_dir, or change its permissions")
    return Finding("ok", str(run.run_dir))


def disk(run: PlannedRun) -> Finding:
    """Room for the checkpoints a run keeps, and the exported students, beside what it deletes of former ones."""
    try:
        written = _written(run)
    except NotEstimated as error:
        free = shutil.disk_usage(_existing(run.run_dir)).free
        return Finding("warning", f"not estimated: {error}; {free / GIB:.1f} GiB are free")
    disks: dict[int, tuple[Path, float]] = {}
    for folder, size in written.items():
        device = _existing(folder).stat().st_dev
        first, sum_so_far = disks.get(device, (_existing(folder), 0.0))
        disks[device] = first, sum_so_far + size
    found, status = [], "ok"
    for device, (place, need) in disks.items():
        free, freed = shutil.disk_usage(place).free, freed_bytes(run.run_dir, written, run.settings, device=device)
        also = f" and {freed / GIB:.2f} more once former ones go" if freed else ""
        found.append(f"checkpoints and student take {need / GIB:.2f} GiB, {free / GIB:.1f} are free in {place}{also}")
        status = "error" if need > free + freed else status
    if status == "ok" and _crowded(run):
        found.append("the run that is replaced stays until the new one has a checkpoint, for which there is no room")
        return Finding("error", ", ".join(found), f"delete {run.run_dir} by hand, or give another --run_dir")
    if status == "error":
        remedy = "give a --run_dir (or RunCheckpoint.dirpath) on another disk, or keep fewer checkpoints (RunCheckpoint.keep)"
        return Finding("error", ", ".join(found), remedy)
    return Finding("ok", ", ".join(found))


def wandb(run: PlannedRun) -> Finding:
    """Online needs a key."""
    options = run.settings.get("wandb") or {}
    mode = options.get("mode", "offline")
    if mode == "online" and not _has_wandb_key():
        return Finding("error", "--wandb.mode online, but there is no key (WANDB_API_KEY, or one saved by wandb login)",
                       "set WANDB_API_KEY, or --wandb.mode offline")  # fmt: skip
    return Finding("ok", mode)


def callbacks(run: PlannedRun) -> Finding:
    """What they are for can be done in this run; then their own checks."""
    check_callbacks(run.module, run.trainer, run.data)
    checked = [callback for callback in callbacks_of(run.trainer) if hasattr(callback, "check")]
    for callback in checked:
        callback.check(run.module, run.data)
    return Finding("ok", ", ".join(type(callback).__name__ for callback in checked) or "none has a check of its own")


Check = Callable[[PlannedRun], Finding]
CHECKS: dict[str, Check] = {
    "config": config,
    "trainer": trainer,
    "tokenizers": tokenizers,
    "data": data,
    "chat template": templates,
    "stop ids": stop_ids,
    "alignment": alignment,
    "signals": signals,
    "batch": batch,
    "context window": window,
    "token budget": token_budget,
    "servers": servers,
    "callbacks": callbacks,  # before the memory of what they sample
    "memory": memory,
    "run folder": run_folder,
    "disk": disk,
    "W&B": wandb,
    "log-probs": logprobs,
    "own teacher": own_teacher,
}
CHEAP = ("run folder", "disk", "W&B")  # what a fit asks by itself beside its own checks


def examine(run: PlannedRun, checks: Mapping[str, Check] = CHECKS) -> list[Finding]:
    """One finding a check, in their order; none stops another, and an error that several meet is told once."""
    findings: list[Finding] = []
    for name, check in checks.items():
        found = _examined(run, check)
        if found.status == "error":
            told = [other.name for other in findings if (other.found, other.remedy) == (found.found, found.remedy)]
            found = Finding("warning", f"not checked: first the error of {told[0]}") if told else found
            run.failed += [] if told else [name]
        findings.append(replace(found, name=name))
    return findings


def require_machine(run: PlannedRun) -> None:
    """The checks in ``CHEAP``.

    Raises:
        InputError: one of them is an error.
    """
    for finding in examine(run, {name: CHECKS[name] for name in CHEAP}):
        if finding.status == "error":
            raise InputError("; ".join(filter(None, [finding.found, finding.remedy])))


def _examined(run: PlannedRun, check: Check) -> Finding:
    try:
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always", UserWarning)
            found = check(run)
    except (InputError, ServerError) as error:
        return _split("error", str(error))
    said = [str(warning.message) for warning in given if issubclass(warning.category, UserWarning)]
    if not said or found.status == "error":
        return found
    return replace(found, status="warning", found="; ".join([found.found, *said]))


def _split(status: Status, message: str) -> Finding:
    """What was found, and after the last semicolon the remedy, as this project's messages are written."""
    found, _, remedy = message.rpartition("; ")
    return Finding(status, found or message, remedy if found else "")


def _written(run: PlannedRun) -> dict[Path, float]:
    """Bytes that the run keeps, by folder."""
    checkpoint, weights = _checkpoint_bytes(run), _weight_bytes(run)
    written: dict[Path, float] = {}
    for folder in _exports(run):
        written[folder.parent] = written.get(folder.parent, 0.0) + weights
    for callback in (callback for callback in callbacks_of(run.trainer) if isinstance(callback, ModelCheckpoint)):
        folder = Path(callback.dirpath or run.run_dir / CHECKPOINTS)
        count = max(callback.save_top_k, 0) + bool(callback.save_last) + 1  # one is written before one goes
        written[folder] = written.get(folder, 0.0) + checkpoint * count
    return written


def _exports(run: PlannedRun) -> list[Path]:
    """Folders of exported students, by callbacks that say so; the run's own where none does."""
    path, last = run.settings.get("ckpt_path"), max(run.trainer.max_steps, 0)
    first = int(counters(Path(path))["global_step"]) + 1 if path and Path(path).exists() else 1
    says = [say for callback in callbacks_of(run.trainer) if (say := getattr(callback, "exports", None)) is not None]
    found = [folder for say in says for folder in say(run.run_dir, range(first, last + 1))]
    return found or [run.run_dir / "student"]


def _crowded(run: PlannedRun) -> bool:
    """True where the first checkpoint has no room beside the run that is overwritten."""
    replaces = run.settings.get("overwrite") and not run.settings.get("ckpt_path")
    return bool(replaces) and _checkpoint_bytes(run) > shutil.disk_usage(_existing(run.run_dir)).free


def _weight_bytes(run: PlannedRun) -> float:
    """Of the exported student."""
    return float(_size(run).parameters * getattr(torch, run.module.student_settings.dtype).itemsize)


def _checkpoint_bytes(run: PlannedRun) -> float:
    """Of one checkpoint: the weights, with adapters those alone, and the optimizer's state."""
    settings, size = run.module.student_settings, _size(run)
    dtype = getattr(torch, trained_dtype(settings, run.plan))
    kept = size.parameters if settings.lora is None else size.num_trainable
    return float(kept * dtype.itemsize) + float(optimizer_bytes(run.module.optimizer_factory, size.trainable, dtype))


def _size(run: PlannedRun) -> ModelSize:
    settings = run.module.student_settings
    return model_size(run.module.student_config, lora=settings.lora, trust_remote_code=settings.trust_remote_code)


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class _Collector(logging.Handler):
    """Keeps messages."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.said.append(record.getMessage())


@contextmanager
def _messages(name: str) -> Iterator[list[str]]:
    """What a logger says while the block runs; it goes nowhere else."""
    logger, collector = logging.getLogger(name), _Collector()
    propagate, handlers = logger.propagate, logger.handlers
    logger.propagate, logger.handlers = False, [collector]
    try:
        yield collector.said
    finally:
        logger.propagate, logger.handlers = propagate, handlers
