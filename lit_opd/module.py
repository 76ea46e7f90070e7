"""The LightningModule: holds student and teacher and wires prompts -> rollout -> signal -> weights -> loss -> record."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_opd.advantage import AdvantageTransform, baseline_warning, order_warning
from lit_opd.changed_options import apply_changes, configured
from lit_opd.checkpoints import (
    at_batch_end,
    by_name,
    by_number,
    check_checkpoint,
    count_epoch,
    from_consolidated,
    validation_due,
)
from lit_opd.distributed import all_sum, check_master_port, is_rank_zero, shared_failure
from lit_opd.evaluation import VALIDATION_DOMAIN, Evaluator, ValidationSettings, decoder, has_answers
from lit_opd.faults import Room, Skips, memory_for
from lit_opd.lazy import fill
from lit_opd.models import (
    StudentSettings,
    agree_vocabularies,
    build_student,
    configured_stops,
    export_folder,
    load_config,
    load_generation_config,
    load_tokenizer,
    stop_warning,
)
from lit_opd.objective import Aggregation, Objective, PolicyLoss
from lit_opd.rollout import LengthBudget, RatioStop, Sampler, SamplingSettings, TransformersSampler
from lit_opd.scoring import ScoringModel
from lit_opd.sharding import (
    check_dtypes,
    check_strategy,
    clip_gradients,
    compile_layers,
    full_state,
    gathered,
    is_sharded,
    placement,
    shards,
)
from lit_opd.step import Update, apply_truncated, scalars, total_updates
from lit_opd.teacher import Teacher
from lit_opd.types import FinishReason, InputError, Prediction, PromptBatch, Rollout, StepRecord, TokenSignal
from lit_opd.weighting.base import WeightingStrategy
from lit_opd.weighting.importance import ImportanceWeighting

OptimizerFactory = Callable[[Iterable], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
Truncated = Literal["keep", "mask", "drop"]

ALWAYS_AVAILABLE = frozenset({"student_entropy", "student_topk", "sampler_logprobs"})
LESS_MEMORY = "take an optimizer with less state, set `model.student.lora`, or shard the weights over more devices"
_STUDENT_EXTRAS = frozenset({"student_entropy", "student_topk"})  # named in `wants` without "student_"


def default_optimizer(parameters: Iterable) -> Optimizer:
    """AdamW at the published run's setting: lr 1e-5, weight decay 0.01, betas (0.9, 0.999).

    Fused: one pass over each weight, without temporaries of its size; the same numbers up to rounding.
    """
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


class OPDModule(L.LightningModule):
    """On-policy distillation of a student from a frozen teacher.

    Constructors store settings only; tokenizers are read in ``setup``, weights in ``configure_model``.

    Args:
        student: what to train.
        teacher: who scores.
        sampler: how responses are drawn; its temperature is also the scoring temperature.
        weighting: how much each token counts, default ``ImportanceWeighting()``.
        advantage: transforms of the advantage, in order.
        objective: default ``PolicyLoss()``.
        aggregation: how token losses become one scalar.
        mini_batches: optimizer steps a pass over the rollout batch.
        epochs: passes over the rollout batch.
        token_budget: padded tokens a micro-batch may hold; None for one micro-batch.
        truncated: rows that did not end by themselves: "keep", "mask" (valid rows without valid tokens) or "drop" (never scored).
        optimizer: from parameters to an optimizer, default AdamW with lr 1e-5.
        lr_scheduler: from optimizer to a scheduler stepped once an optimizer step, default constant.
        gradient_clip_norm: global norm bound, None for none.
        validation: what ``validation_step`` measures.
        seed: of the sampling streams; None takes the run's ``seed_everything``.
        reference: a third frozen model, for what reads its log-probs (``RewardExtrapolation``); usually the initial student.
        length_budget: ends training responses earlier than the sampler's ``max_new_tokens``; None for no budget.
        rollout_stop: ends training responses where the teacher has left them; None for no such end.
        max_skipped_steps: rollout batches in a row that may hold a NaN or Inf before the run stops; such a batch changes no
            weight, see docs/reliability.md. 0 stops at the first.
    Raises:
        InputError: a value outside its range.
    """

    def __init__(
        self,
        student: StudentSettings,
        teacher: Teacher,
        sampler: Sampler | None = None,
        weighting: WeightingStrategy | None = None,
        advantage: list[AdvantageTransform] | None = None,
        objective: Objective | None = None,
        aggregation: Aggregation = "sequence-mean",
        mini_batches: int = 1,
        epochs: int = 1,
        token_budget: int | None = None,
        truncated: Truncated = "keep",
        optimizer: OptimizerFactory = default_optimizer,
        lr_scheduler: SchedulerFactory | None = None,
        gradient_clip_norm: float | None = 1.0,
        validation: ValidationSettings | None = None,
        seed: int | None = None,
        reference: Teacher | None = None,
        length_budget: LengthBudget | None = None,
        max_skipped_steps: int = 3,
        rollout_stop: RatioStop | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # the teacher is in no checkpoint; load_state_dict below checks the rest
        self.student_settings, self.teacher, self.reference = student, teacher, reference
        if reference is not None:
            reference.field = "model.reference"
        self.student: ScoringModel | None = None
        self.sampler = sampler or TransformersSampler()
        self.weighting = weighting if weighting is not None else ImportanceWeighting()
        self.advantage = list(advantage or [])
        self.objective = objective or PolicyLoss()
        self.aggregation, self.truncated = aggregation, truncated
        self.mini_batches, self.epochs, self.token_budget = mini_batches, epochs, token_budget
        self.optimizer_factory, self.scheduler_factory = optimizer, lr_scheduler
        self.gradient_clip_norm = gradient_clip_norm
        self.validation = validation or ValidationSettings()
        self.evaluator = Evaluator(self.validation)
        self.seed, self.length_budget, self.rollout_stop = seed, length_budget, rollout_stop
        self.skips, self.room = Skips(max_skipped_steps), Room()
        self._validated_at: int | None = None
        self._validation_due: bool | None = None  # of the checkpoint the run goes on from; None for a new run
        self._options: dict[str, Any] = {}  # the optimizer's as configured, and those of the checkpoint
        self._saved_options: dict[str, Any] | None = None
        self._check_settings()

    def _check_settings(self) -> None:
        for name in ("mini_batches", "epochs", "token_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"`OPDModule.{name}` must be >= 1, got {value}")
        if self.skips.most < 0:
            raise InputError(f"`OPDModule.max_skipped_steps` must be >= 0, got {self.skips.most}")
        if self.gradient_clip_norm is not None and not self.gradient_clip_norm > 0:
            raise InputError(f"`OPDModule.gradient_clip_norm` must be > 0 or null, got {self.gradient_clip_norm}")
        if self.length_budget is not None:
            self.length_budget.check(self.sampler.max_new_tokens)

    # -- what is known without weights -------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Any:
        """The student's tokenizer, left-padding."""
        settings = self.student_settings
        return load_tokenizer(
            settings.path,
            "model.student.path",
            pad_token=settings.pad_token,
            trust_remote_code=settings.trust_remote_code,
        )

    @cached_property
    def student_config(self) -> Any:
        """The student's transformers configuration."""
        settings = self.student_settings
        return load_config(settings.path, "model.student.path", trust_remote_code=settings.trust_remote_code)

    @cached_property
    def _scorer_tokenizers(self) -> dict[str, list[Any]]:
        """(tokenizer, embedding rows) of the models behind each scorer, by role."""
        return {role: scorer.tokenizers() for role, scorer in self.scorers.items()}

    @cached_property
    def vocabulary(self) -> int:
        """Leading vocabulary entries that student and teacher share; checked token by token."""
        rows = self.student_config.get_text_config().vocab_size
        shared = rows
        for role, scorer in self.scorers.items():
            for tokenizer, scorer_rows in self._scorer_tokenizers[role]:
                named = {"student_rows": rows, "teacher_rows": scorer_rows, "field": f"{scorer.field}.path"}
                shared = min(shared, agree_vocabularies(self.tokenizer, tokenizer, **named))
        return shared

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end a response."""
        configured = self.sampler.stop_token_ids
        found = configured_stops(self.student_settings.path, self.tokenizer) if configured is None else set(configured)
        if not found or not all(0 <= stop < self.vocabulary for stop in found):
            source = "the model's generation config and tokenizer" if configured is None else "the setting"
            raise InputError(
                f"`model.sampler.stop_token_ids` must name ids in [0, {self.vocabulary}), got {sorted(found)} from {source}; "
                "name the ids that end a response"
            )
        return tuple(sorted(found))

    @property
    def scorers(self) -> dict[str, Teacher]:
        """The frozen models that score sampled tokens, by role: the teacher, and the reference where something reads it."""
        if self.reference is None or "reference_logprobs" not in self.required:
            return {"teacher": self.teacher}
        return {"teacher": self.teacher, "reference": self.reference}

    @property
    def required(self) -> frozenset[str]:
        """Optional signal fields that something in this run reads."""
        parts = [self.weighting.requires, self.objective.requires, *(step.requires for step in self.advantage)]
        return frozenset().union(*parts)

    @property
    def needs_scoring_pass(self) -> bool:
        """True when weights or denominators must be known before micro-batches are cut, or the batch is reused."""
        reused = self.mini_batches * self.epochs > 1
        return reused or self.weighting.scope == "batch" or self.weighting.drops_tokens

    @property
    def progress(self) -> float:
        """Training progress p in [0, 1] of the coming optimizer step."""
        total = total_updates(
            max_steps=self.trainer.max_steps,
            batches=self.trainer.estimated_stepping_batches if self.trainer.max_steps < 0 else 0,
            updates_per_batch=self.mini_batches * self.epochs,
        )
        return 1.0 if total <= 1 else min(1.0, self.global_step / (total - 1))

    # -- Lightning: before the run -----------------------------------------------------------------------------------

    def check(self, trainer: L.Trainer, data: Any, *, ckpt_path: str | None = None, training: bool = True) -> None:
        """Every check that needs no weights, data included; an InputError here costs no GPU time and leaves no file.

        Args:
            trainer: the trainer the run will use.
            data: the ``PromptDataModule``.
            ckpt_path: what the run goes on from.
            training: False where the run takes the weights only.
        """
        self.trainer = trainer
        if ckpt_path is not None:
            check_checkpoint(ckpt_path, trainer.strategy, training=training)
        _ = self.vocabulary, self.stop_ids
        if data is not None:
            data.use_tokenizer(self.tokenizer)
            data.trainer = trainer
            data.setup("fit")
        self._check_run(data)

    def setup(self, stage: str) -> None:
        """The same checks for those who call the trainer themselves."""
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        self._check_run(getattr(self.trainer, "datamodule", None))
        _ = self.vocabulary, self.stop_ids

    def _check_run(self, data: Any) -> None:
        self.check_trainer()
        self.check_scorers()
        self.check_batch(data, ranks=self.trainer.world_size)
        self.check_window(data)
        self.check_token_budget(data)
        self.check_rollout_stop(sharded=shards(self.trainer.strategy))
        self.check_servers(data)
        for warning in (*self.setting_warnings(), *self.stop_warnings()):
            warnings.warn(warning, stacklevel=2)

    def check_scorers(self) -> None:
        """Weighting, objective and advantage find what they read in the teacher, and the reference where one is read."""
        if self.reference is None and "reference_logprobs" in self.required:
            raise InputError(
                "`model.reference` must be a teacher such as `LocalTeacher` when reference_logprobs are read, got null; "
                "give it the path of the initial student"
            )
        missing = self.required - self.teacher.provides - ALWAYS_AVAILABLE - {"reference_logprobs"}
        if missing:
            parts: list[Any] = [self.weighting, self.objective, *self.advantage]
            asking = [part for part in parts if part.requires & missing]
            names = " and ".join(f"`{type(part).__name__}`" for part in asking)
            raise InputError(
                f"{names} must have {sorted(missing)}, which `{type(self.teacher).__name__}` cannot give; choose another "
                "weighting, objective, advantage transform or teacher"
            )

    def setting_warnings(self) -> Iterator[str]:
        """What is allowed and probably not meant: transforms in an odd order, settings without effect."""
        for warning in (baseline_warning(self.advantage, self.weighting), order_warning(self.advantage)):
            if warning is not None:
                yield warning
        if self.advantage and not self.objective.reads_advantage:
            yield f"`model.advantage` has no effect: `{type(self.objective).__name__}` reads no advantage"
        if self.reference is not None and "reference" not in self.scorers:
            yield "`model.reference` has no effect and is not loaded: nothing reads its log-probs"

    def stop_warnings(self) -> Iterator[str]:
        """Where a response of the student ends at another token than one of a teacher's."""
        for role, pairs in self._scorer_tokenizers.items():
            for tokenizer, _ in pairs:
                warning = stop_warning(self.tokenizer, self.stop_ids, tokenizer, role=role)
                if warning is not None:
                    yield warning

    def check_trainer(self) -> None:
        """The trainer's settings are ones that this module's own optimisation can follow."""
        check_strategy(self.trainer.strategy)
        parts = [part for scorer in self.scorers.values() for part in scorer.modules()]
        found = {getattr(part, "dtype", None) for part in parts} | {self.student_settings.dtype}
        check_dtypes(self.trainer.strategy, {dtype for dtype in found if isinstance(dtype, str)})
        if self.trainer.world_size > 1:
            check_master_port()
        updates = self.mini_batches * self.epochs
        if self.trainer.max_steps == 0 or self.trainer.max_epochs == 0:
            raise InputError("`trainer.max_steps` must be >= 1, or -1 for no bound, got 0: nothing would be trained")
        if self.trainer.max_steps > 0 and self.trainer.max_steps % updates:
            raise InputError(
                f"`trainer.max_steps` must be a multiple of mini_batches * epochs = {updates}, got {self.trainer.max_steps}"
            )
        if str(self.trainer.precision).startswith("16"):
            raise InputError(f"`trainer.precision` must be 32-true, 64-true or bf16, got {self.trainer.precision}")
        if self.trainer.gradient_clip_val is not None:
            raise InputError("`trainer.gradient_clip_val` has no effect here; set `model.gradient_clip_norm`")
        if self.trainer.accumulate_grad_batches != 1:
            raise InputError("`trainer.accumulate_grad_batches` has no effect here; set `model.token_budget`")
        self.check_optimizer()

    def check_optimizer(self) -> None:
        """Optimizer and schedule accept their settings, tried on a small weight, and the learning rate is one."""
        with _explained("model.optimizer"):
            optimizer = self.optimizer_factory([torch.nn.Parameter(torch.zeros(2, 2))])
        rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        if not all(0 <= rate < math.inf for rate in rates):
            raise InputError(f"`model.optimizer.lr` must be >= 0 and finite, got {rates}")
        if self.scheduler_factory is None:
            return
        with _explained("model.lr_scheduler"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimizer has made no step yet
            self.scheduler_factory(optimizer).step()

    def check_batch(self, data: Any, *, ranks: int) -> None:
        """The global batch divides over ``ranks``, and a rank's rows over the mini-batches."""
        batch = getattr(data, "prompt_batch", ranks)
        if batch % ranks:
            raise InputError(f"`data.prompt_batch` must be a multiple of the {ranks} ranks, got {batch}")
        rows = batch // ranks * getattr(data, "samples_per_prompt", self.mini_batches)
        if rows < self.mini_batches:
            raise InputError(f"`model.mini_batches` must be at most the {rows} rows of a rank, got {self.mini_batches}")

    def check_window(self, data: Any) -> None:
        """The longest prompt and response fit into the context windows of student, teacher and reference."""
        limit, read = getattr(data, "max_prompt_tokens", None), getattr(data, "longest_prompt", None)
        self._require_window("model.student", self.student_config.get_text_config(), limit)
        for scorer in self.scorers.values():
            for part in (part for part in scorer.modules() if isinstance(part, Teacher)):
                self._require_window(scorer.field, part.reader_config, read)

    def _require_window(self, field: str, config: Any, prompt: int | None) -> None:
        window, response = getattr(config, "max_position_embeddings", None), self.sampler.max_new_tokens
        if prompt is not None and window is not None and prompt + response > window:
            raise InputError(
                f"`model.sampler.max_new_tokens` must leave room in the context window of `{field}`, {window} tokens, got "
                f"{response} after prompts of up to {prompt}; lower it or `data.max_prompt_tokens`, or shorten what the template "
                "adds"
            )

    @staticmethod
    def _longest_prompt(data: Any) -> int | None:
        """Tokens that a row's prompt may have: the limit, which holds for the student's, or more where a teacher's are longer."""
        limit = getattr(data, "max_prompt_tokens", None)
        return None if limit is None else max(limit, getattr(data, "longest_prompt", limit))

    def check_token_budget(self, data: Any) -> None:
        """A micro-batch holds the longest row."""
        limit, response = self._longest_prompt(data), self.sampler.max_new_tokens
        if limit is not None and self.token_budget is not None and limit + response > self.token_budget:
            raise InputError(
                f"`model.token_budget` must hold the longest row, {limit} + {response} tokens, got {self.token_budget}"
            )

    def check_rollout_stop(self, *, sharded: bool) -> None:
        """Sampler and teacher are ones that can stop a response by its prefix ratio, and weights are not ``sharded``."""
        if self.rollout_stop is not None:
            teacher, config = type(self.teacher).__name__, self.teacher.reader_config
            self.rollout_stop.check(self.sampler, teacher=teacher, config=config, sharded=sharded)

    def check_servers(self, data: Any) -> None:
        """Servers of teacher and sampler answer, serve the right model and hold the longest row."""
        limit = self._longest_prompt(data)
        response = max(self.sampler.max_new_tokens, self.validation.max_new_tokens or 0)
        tokens = None if limit is None else limit + response
        with shared_failure():
            for scorer in self.scorers.values():
                scorer.check_student(self.student_settings)
                scorer.check(temperature=self.sampler.temperature, tokens=tokens)
                scorer.check_data(getattr(data, "rows_by_teacher", dict)())
            self.sampler.check(tokens=tokens, vocabulary=self.student_config.get_text_config().vocab_size)

    def configure_model(self) -> None:
        """Load student and teacher, choose the scoring path, shard where the strategy brings a device mesh."""
        if self.student is not None:
            return
        mesh, settings = getattr(self, "_device_mesh", None), self.student_settings
        lazy = mesh is not None and settings.lazy and settings.lora is None
        student = ScoringModel(build_student(settings, empty=lazy), vocabulary=self.vocabulary)
        student.choose_path("student")
        self.student = student
        self._shapes = {name: value.shape for name, value in self.state_dict().items()}
        if settings.compile:
            compile_layers(student)
        place = placement(self._trainer.strategy, mesh) if self._trainer else None
        if place is not None:
            self.student = student = place(student, trained=True)
        if lazy:
            fill(student, student.causal_lm, path=settings.path, setting="model.student.path")
        for scorer in self.scorers.values():
            scorer.attach(student)
            if place is not None and mesh is not None:
                scorer.load_sharded(place, vocabulary=self.vocabulary)
                continue
            scorer.load(vocabulary=self.vocabulary)
            if place is not None:
                scorer.shard(place)
        student.train()

    def configure_optimizers(self) -> Any:
        """The configured optimizer over trainable parameters, and its schedule."""
        assert self.student is not None
        optimizer = self.optimizer_factory([p for p in self.student.parameters() if p.requires_grad])
        optimizer.register_load_state_dict_pre_hook(lambda own, state: by_number(state, self, own))
        scheduler = self.scheduler_factory(optimizer) if self.scheduler_factory is not None else None
        self._options = configured(optimizer, scheduler)
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}

    # -- Lightning: the step -----------------------------------------------------------------------------------------

    def training_step(self, prompts: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """One rollout batch: sample, score, update.

        Returns:
            {"loss": scalar, "step": ``StepRecord``}.
        """
        clock = _Clock()
        with clock("sampling"):
            self.phase("sampling", 0, 1)
            settings = self.training_settings()
            reads_along = self.teacher.on_device(prompts.ids.device) if self.rollout_stop is not None else nullcontext()
            with reads_along, memory_for("sampling", "lower `data.prompt_batch` or `model.sampler.max_new_tokens`"):
                sampled = self.generate(prompts, settings)
            update = Update(self, apply_truncated(sampled, self.truncated), sampled)
        with clock("scoring"):
            update.score_teacher()
            update.score_student()
        with clock("updating"):
            loss = update.run()
        record = update.record(clock.seconds)
        self._log_step(loss, record, settings)
        return {"loss": loss, "step": record}

    def clip(self) -> Tensor:
        """Scale the gradients to ``gradient_clip_norm``; returns the global norm before, scalar."""
        assert self.student is not None
        groups = self.optimizers().param_groups  # type: ignore[union-attr]
        bound = self.gradient_clip_norm if self.gradient_clip_norm is not None else float("inf")
        with memory_for("clipping the gradients", LESS_MEMORY):
            return clip_gradients(self.student, [p for group in groups for p in group["params"]], bound).detach()

    def apply_gradients(self) -> None:
        """Step, schedule, clear."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        with memory_for("updating the weights", LESS_MEMORY, torn=True):
            optimizer.step()  # type: ignore[union-attr]
        self.clear_gradients()
        if scheduler is not None:
            scheduler.step()  # type: ignore[union-attr]

    def clear_gradients(self) -> None:
        """No weight has a gradient."""
        self.optimizers().zero_grad()  # type: ignore[union-attr]

    def generate(self, prompts: PromptBatch, settings: SamplingSettings | None = None) -> Rollout:
        """Responses of the current student, [B, T].

        Args:
            prompts: B rows on the module's device.
            settings: default those of training at this step; see ``sampling_settings``.
        """
        assert self.student is not None
        settings = settings or self.sampling_settings()
        self.sampler.prepare(self.export_student, settings.weights_version)
        with gathered(self.student) if is_sharded(self.student) else nullcontext():
            return self.sampler.sample(self.student, prompts, settings)

    def training_settings(self) -> SamplingSettings:
        """Those of a training rollout at this step: as ``sampling_settings``, within the length budget and the stop."""
        changes: dict[str, Any] = {}
        if self.length_budget is not None:
            tokens = self.length_budget.tokens(self.progress)
            changes = {"max_new_tokens": tokens, "budgeted": tokens < self.sampler.max_new_tokens}
        if self.rollout_stop is not None:
            changes["stop"] = self.rollout_stop.watching(self.teacher.reader())
        return self.sampling_settings(**changes)

    def sampling_settings(self, **changes: Any) -> SamplingSettings:
        """The sampler's settings at this optimizer step, with fields changed by name."""
        values: dict[str, Any] = {
            "max_new_tokens": self.sampler.max_new_tokens,
            "stop_ids": self.stop_ids,
            "pad_id": self.tokenizer.pad_token_id,
            "vocabulary": self.vocabulary,
            "temperature": self.sampler.temperature,
            "top_p": self.sampler.top_p,
            "top_k": self.sampler.top_k,
            "seed": self.seed or 0,
            "step": self.global_step,
            "weights_version": self.global_step,
        }
        return SamplingSettings(**(values | changes))

    def phase(self, name: str, done: int, total: int) -> None:
        """Tell callbacks that have ``on_phase`` how far the current phase is."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            listener = getattr(callback, "on_phase", None)
            if listener is not None:
                listener(name, done, total)

    def _log_step(self, loss: Tensor, record: StepRecord, settings: SamplingSettings) -> None:
        loss = torch.full_like(loss, math.nan) if record.skipped else loss
        values: dict[str, Any] = {"train/loss": loss, "train/skipped_steps": self.skips.total, **scalars(record)}
        if self.length_budget is not None:
            values["train/length_budget"] = float(settings.max_new_tokens)
        if self.length_budget is not None or self.rollout_stop is not None:
            values["train/tokens_saved_at_most"] = self._saved(record)
        values |= {f"time/{name}": seconds for name, seconds in record.seconds.items()}
        values["train/learning_rate"] = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        values["step"] = self.global_step  # Lightning would count batches, from 0
        metrics = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in values.items()}
        self.log_dict(metrics, logger=False)
        connector = self.trainer._logger_connector
        if (
            connector.should_update_logs
        ):  # Lightning would do so after the batch's checkpoint: a kill in between lost the line
            connector.log_metrics(metrics)

    def _saved(self, record: StepRecord) -> Tensor:
        """Tokens that the rows cut by the budget or the stop could still have had, over all ranks, scalar."""
        rollout = record.rollout  # which has all of these rows, whatever `truncated` is
        cut = (rollout.finish_reason == int(FinishReason.BUDGET)) | (rollout.finish_reason == int(FinishReason.DRIFT))
        return all_sum((self.sampler.max_new_tokens - rollout.num_drawn)[cut].sum())

    # -- Lightning: validation ---------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Measure the start of a new run; of one that goes on, make the validation that its checkpoint was saved before."""
        if self._validation_due is None:
            self._validation_due = self.global_step == 0 and self.validation.before_training
        else:
            count_epoch(self.trainer)
            if self._saved_options is not None:
                optimizer, scheduler = self.trainer.optimizers[0], self.lr_schedulers()
                apply_changes(self._saved_options, self._options, optimizer, scheduler)
        if self._validation_due:
            self._validate_now()
        self._validation_due = None

    def on_train_end(self) -> None:
        """Measure the end, unless that was just done."""
        if self._validated_at != self.global_step:
            self._validate_now()

    def _validate_now(self) -> None:
        """Run the fit loop's own validation loop, as Lightning does between training batches."""
        loop = self.trainer.fit_loop.epoch_loop.val_loop
        if loop.skip:
            return
        self.trainer.validating = True
        loop.run()
        self.trainer.training = True

    def on_validation_epoch_start(self) -> None:
        """Start from empty metrics."""
        self.evaluator.reset()

    @memory_for("validating", "lower `data.val_batch` or `model.validation.max_new_tokens`")
    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Greedy answers, sampled answers, divergence from the teacher; see ``ValidationSettings``."""
        settings, decode = self.validation, decoder(self.tokenizer)
        length = settings.max_new_tokens or self.sampler.max_new_tokens
        if settings.greedy and has_answers(prompts):
            rollout = self.generate(prompts, self.sampling_settings(greedy=True, max_new_tokens=length))
            self.evaluator.add_answers("greedy_accuracy", rollout, decode)
        if settings.batch_limit is not None and batch_idx >= settings.batch_limit:
            return
        for sample in range(max(settings.samples if has_answers(prompts) else 0, int(settings.divergence))):
            stream = {"domain": VALIDATION_DOMAIN + sample, "step": 0}
            rollout = self.generate(prompts, self.sampling_settings(max_new_tokens=length, **stream))
            self.evaluator.add_lengths(rollout)
            if settings.samples > sample:
                self.evaluator.add_answers("avg_at_k", rollout, decode)
            if sample == 0 and settings.divergence:
                self.evaluator.add_divergence(self.divergence(rollout), prompts.counted)  # type: ignore[arg-type]
            self.phase("evaluating", sample + 1, settings.samples)

    def on_validation_epoch_end(self) -> None:
        """Log what was measured."""
        self._validated_at = self.global_step
        values = {name: torch.tensor(value) for name, value in self.evaluator.compute().items()}
        if self.trainer.state.fn == "fit":
            values["step"] = torch.tensor(float(self.global_step))
        self.log_dict(values)

    def teardown(self, stage: str) -> None:
        """End the processes that graded answers."""
        self.evaluator.grader.close()

    def test_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(prompts, batch_idx)

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, prompts: PromptBatch, batch_idx: int) -> Prediction:
        """A sampled response a row, its signal, and the weights the strategy gives it at the end of training."""
        rollout = self.generate(prompts)
        signal = self.divergence(rollout)
        return Prediction(rollout=rollout, signal=signal, weights=self.weighting(signal, 1.0))

    @torch.no_grad()
    def divergence(self, rollout: Rollout) -> TokenSignal:
        """Log-probs of student and teacher, what the weighting reads, and full-vocabulary KL(student || teacher) where the
        teacher can give it."""
        assert self.student is not None
        temperature = self.sampler.temperature
        full = "token_kl" in self.teacher.provides
        reads, device = self.weighting.requires, rollout.mask.device
        with self.teacher.on_device(device):
            teacher = self.teacher.score(rollout, temperature=temperature, requires=reads & self.teacher.provides)
        with self.teacher.on_device(device), self.teacher.whole_head():
            against = self.teacher.full_head(rollout) if full else None
            wants = frozenset({"token_kl"} if full else ()) | {n[8:] for n in reads if n in _STUDENT_EXTRAS}
            student = self.student(rollout, temperature=temperature, wants=wants, against=against)
        return TokenSignal(
            student_logprobs=student.logprobs,
            teacher_logprobs=teacher.logprobs,
            mask=rollout.mask,
            row_keys=rollout.prompts.row_keys,
            step=self.global_step,
            sampler_logprobs=rollout.sampler_logprobs,
            token_kl=student.token_kl,
            student_entropy=student.entropy,
            teacher_entropy=teacher.entropy,
            student_topk=student.topk,
            teacher_topk=teacher.topk,
        )

    # -- checkpoints and export --------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Everything but teacher and reference, which are frozen and loaded from their own folders."""
        with self._trained_modules():
            return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the student's weights.

        Raises:
            InputError: the checkpoint is of another architecture; the first names are listed.
        """
        _require_same({name: value.shape for name, value in state_dict.items()}, of=self._shapes)
        with self._trained_modules():
            return super().load_state_dict(state_dict, strict=False, assign=assign)

    @contextmanager
    def _trained_modules(self) -> Iterator[None]:
        """Hides teacher and reference: gathering a sharded one only to drop it would take its memory on rank 0."""
        modules = self._modules
        self._modules = {name: module for name, module in modules.items() if name not in ("teacher", "reference")}
        try:
            yield
        finally:
            self._modules = modules

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Optimizer state by parameter name, and the names and shapes of the trained student for ``on_load_checkpoint``."""
        assert self.student is not None
        whole = is_sharded(self.student)
        pairs = zip(checkpoint.get("optimizer_states", []), self.trainer.optimizers, strict=False)
        checkpoint["optimizer_states"] = [by_name(state, self, optimizer, whole=whole) for state, optimizer in pairs]
        checkpoint["skipped_steps"] = self.skips.total
        checkpoint["halved_token_budget"] = self.room.state()
        checkpoint["validation_due"] = validation_due(
            self.trainer, validated_at=self._validated_at, at_start=self.validation.before_training
        )
        checkpoint["validated_at"], checkpoint["optimizer_options"] = self._validated_at, self._options
        at_batch_end(checkpoint["loops"], validating=self.trainer.validating)
        checkpoint["student_shapes"] = {name: list(shape) for name, shape in self._shapes.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The check of ``load_state_dict`` again: under FSDP2 Lightning reads weight by weight and skips what is missing."""
        from_consolidated(checkpoint)
        self.skips.total = int(checkpoint.get("skipped_steps", 0))
        self.room.restore(checkpoint.get("halved_token_budget", [None, None]), self.token_budget)
        self._validation_due = checkpoint.get("validation_due", False)
        self._validated_at = checkpoint.get("validated_at")
        self._saved_options = checkpoint.get("optimizer_options")
        if "student_shapes" in checkpoint and self.student is not None:
            _require_same(checkpoint["student_shapes"], of=self._shapes)

    def export_student(self, path: str | Path) -> Path:
        """Write the student as a Hugging Face folder (safetensors, tokenizer, generation config; LoRA merged).

        Called on every rank; rank 0 writes. The folder appears whole or not at all.
        """
        assert self.student is not None
        state = full_state(self.student) if is_sharded(self.student) else None
        if is_rank_zero():
            generation = load_generation_config(self.student_settings.path)
            export_folder(self.student.model, self.tokenizer, path, state=state, generation=generation)
        self.trainer.strategy.barrier("export_student")
        return Path(path)


@contextmanager
def _explained(field: str) -> Iterator[None]:
    """Whatever a class of torch's or the user's raises about its arguments, as an InputError that names ``field``."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"`{field}` must accept its settings, got {type(error).__name__}: {error}; correct them"
        ) from error


def _require_same(shapes: Mapping[str, Any], *, of: Mapping[str, torch.Size]) -> None:
    """An InputError unless a checkpoint has exactly the weights of this student; shards count by their whole shape."""
    differing = [name for name in of.keys() & shapes.keys() if tuple(of[name]) != tuple(shapes[name])]
    wrong = sorted([*(of.keys() ^ shapes.keys()), *differing])
    if wrong:
        raise InputError(
            f"`--ckpt_path` must be a checkpoint of this student, but {len(wrong)} weights are missing, extra or of "
            f"another shape: {', '.join(wrong[:5])}; give the config the run was started with"
        )


class _Clock:
    """Wall seconds of the phases of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
