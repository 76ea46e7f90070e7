"""The LightningModule: holds student and teacher and wires prompts -> rollout -> scores -> update -> record."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_opd.advantage import AdvantageTransform
from lit_opd.distributed import shared_failure
from lit_opd.errors import InputError, memory_for
from lit_opd.evaluation import Evaluator, Reward, ValidationSettings
from lit_opd.models.base import base_mark
from lit_opd.models.lazy import fill
from lit_opd.models.loading import load_config, load_tokenizer
from lit_opd.models.sharding import compile_layers, gathered, is_sharded, placement
from lit_opd.models.student import StudentSettings, adapter_names, build_student
from lit_opd.models.vocabulary import agree_vocabularies, configured_stops, unused_ids
from lit_opd.models.weights import StudentWeights
from lit_opd.objective import Aggregation, Objective, PolicyLoss
from lit_opd.preflight.module_checks import check_run, check_settings
from lit_opd.prompts.hindsight import Hindsight
from lit_opd.prompts.loading import looking_ahead
from lit_opd.rollout import LengthBudget, RatioStop, Sampler, SamplingSettings, TransformersSampler
from lit_opd.run.lightning import (
    attached_trainer,
    begin_next_epoch,
    bound_waits,
    device_mesh,
    log_agreed,
    log_now,
    observers,
    validate_now,
)
from lit_opd.run.module_state import ModuleState, trained_modules
from lit_opd.run.optimizer_state import OptimizerFactory, SchedulerFactory, by_number
from lit_opd.scoring.model import ScoringModel
from lit_opd.step.micro_batches import MicroBatches
from lit_opd.step.optimisation import LightningOptimisation
from lit_opd.step.recipe import Recipe, Truncated, WarmUp, apply_truncated, progress, total_steps
from lit_opd.step.sampler_gap import SamplerGap
from lit_opd.step.scalars import logged
from lit_opd.step.scores import Scores, student_signal
from lit_opd.step.skips import FOLDER, Skips
from lit_opd.step.token_budget import TokenBudget
from lit_opd.step.update import Clock, Update
from lit_opd.teacher import Teacher
from lit_opd.teacher.base import revisions
from lit_opd.teacher.self_teacher import self_teachers
from lit_opd.types import Prediction, PromptBatch, Rollout, StepRecord, TokenSignal
from lit_opd.weighting.base import WeightingStrategy
from lit_opd.weighting.importance import ImportanceWeighting


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
        token_budget: padded tokens a micro-batch may hold, tokens where attention packs rows; None for one micro-batch.
        truncated: rows cut by the room they had (``FinishReason.LENGTH``): "keep", "mask" (valid rows without valid tokens) or
            "drop" (never scored).
        optimizer: from parameters to an optimizer, default AdamW with lr 1e-5.
        lr_scheduler: from optimizer to a scheduler stepped once an optimizer step, default constant.
        gradient_clip_norm: global norm bound, None for none.
        validation: what ``validation_step`` measures.
        seed: of the sampling streams; None takes the run's ``seed_everything``.
        reference: a third frozen model, for what reads its log-probs (``RewardExtrapolation``); usually the initial student.
        length_budget: ends training responses earlier than the sampler's ``max_new_tokens``; None for no budget.
        rollout_stop: ends training responses where the teacher has left them; None for no such end.
        reward: what responses are worth, for ``GroupReward`` and others that read it; None where an environment says it, or
            nothing reads it.
        warmup: trains on saved responses for the first steps, with an objective of its own; needs a ``ReplaySampler``. None for
            none.
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
        warmup: WarmUp | None = None,
        reward: Reward | None = None,
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
        self.warmup, self.reward = warmup, reward
        self.skips, self.budget, self.state = Skips(max_skipped_steps), TokenBudget(), ModuleState()
        self.gap = self._new_gap()
        self.longest_row: int | None = None  # tokens of a prompt and response, once the data is known
        check_settings(self, max_skipped_steps=max_skipped_steps)

    # -- what is known without weights -------------------------------------------------------------------------------

    @property
    def recipe(self) -> Recipe:
        """What is learned from a rollout batch."""
        return Recipe(
            weighting=self.weighting,
            objective=self.objective,
            max_new_tokens=self.sampler.max_new_tokens,
            advantage=tuple(self.advantage),
            aggregation=self.aggregation,
            mini_batches=self.mini_batches,
            epochs=self.epochs,
            observers=observers(self),
        )

    @property
    def recipes(self) -> list[Recipe]:
        """All that is learned in the run, one phase after the other."""
        recipe = self.recipe
        return [recipe] if self.warmup is None else [self.warmup.recipe(recipe), recipe]

    @property
    def warms_up(self) -> bool:
        """Whether the coming batch belongs to the warm-up."""
        return self.warmup is not None and self.global_step < self.warmup.steps

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

    @property
    def teacher_tokenizer(self) -> Any:
        """The tokenizer of the prompts that the teacher reads, where it has another; else None."""
        return self.teacher.prompt_tokenizer

    @cached_property
    def student_config(self) -> Any:
        """The student's transformers configuration."""
        settings = self.student_settings
        return load_config(settings.path, "model.student.path", trust_remote_code=settings.trust_remote_code)

    @cached_property
    def scorer_tokenizers(self) -> dict[str, list[Any]]:
        """(tokenizer, embedding rows) of each scorer's models, by role."""
        return {role: scorer.tokenizers() for role, scorer in self.scorers.items()}

    @cached_property
    def vocabulary(self) -> int:
        """Leading vocabulary entries up to the tokenizer's last id, which is student's and teacher's; checked token by token."""
        rows = self.student_config.get_text_config().vocab_size
        used = agree_vocabularies(
            self.tokenizer, self.tokenizer, student_rows=rows, teacher_rows=rows, field="model.student.path"
        )
        for role, scorer in self.scorers.items():
            for tokenizer, scorer_rows in self.scorer_tokenizers[role]:
                named = {"student_rows": rows, "teacher_rows": scorer_rows, "field": f"{scorer.field}.path"}
                agree_vocabularies(self.tokenizer, tokenizer, **named)
        return used

    @cached_property
    def unused_ids(self) -> tuple[int, ...]:
        """Rows of the student's embedding that name no token: holes in the numbering, and padding after the last id."""
        rows = self.student_config.get_text_config().vocab_size
        return (*unused_ids(self.tokenizer), *range(self.vocabulary, rows))

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end a response."""
        configured = self.sampler.stop_token_ids
        found = configured_stops(self.student_settings.path, self.tokenizer) if configured is None else set(configured)
        if not found or not all(0 <= stop < self.vocabulary for stop in found):
            source = "the model's generation config, config.json and tokenizer" if configured is None else "the setting"
            raise InputError(
                f"`model.sampler.stop_token_ids` must name ids in [0, {self.vocabulary}), got {sorted(found)} from {source}; "
                "name the ids that end a response"
            )
        return tuple(sorted(found))

    @property
    def scorers(self) -> dict[str, Teacher]:
        """The frozen models that score sampled tokens, by role: the teacher, and the reference where something reads it."""
        if self.reference is None or "reference_logprobs" not in self.recipe.required:
            return {"teacher": self.teacher}
        return {"teacher": self.teacher, "reference": self.reference}

    @property
    def progress(self) -> float:
        """Training progress p in [0, 1] of the coming optimizer step."""
        return progress(step=self.global_step, total=self.total_steps)

    @property
    def total_steps(self) -> float:
        """Optimizer steps of the run, which ends at the first of ``trainer.max_steps`` and ``trainer.max_epochs``; infinite where
        it has neither. Epochs count from the start of training on, when their batches are known."""
        trainer, epochs = self.trainer, self.trainer.max_epochs
        # not estimated_stepping_batches: it takes each batch for one optimizer step
        batches = math.inf if epochs is None or epochs < 0 else epochs * trainer.num_training_batches
        return total_steps(max_steps=trainer.max_steps, batches=batches, updates=self.recipe.updates)

    # -- Lightning: before the run -----------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Every check that needs no weights, for those who call the trainer themselves."""
        self.sampler.forget_ahead()
        self.sampler.forget_unfinished()
        self.sampler.forget_weights()
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        self.skips.folder = Path(self.trainer.default_root_dir) / FOLDER
        check_run(self, getattr(self.trainer, "datamodule", None))
        _ = self.vocabulary, self.stop_ids

    def configure_model(self) -> None:
        """Load student and teacher, choose the scoring path, shard where the strategy brings a device mesh."""
        if self.student is not None:
            return
        mesh, trainer, settings = device_mesh(self), attached_trainer(self), self.student_settings
        if mesh is not None and trainer is not None:
            bound_waits(trainer.strategy, mesh)  # type: ignore[arg-type]  # a mesh is ModelParallelStrategy's
        lazy = mesh is not None and settings.lazy and settings.lora is None
        holes = tuple(number for number in self.unused_ids if number < self.vocabulary)
        longest = self.longest_row
        loaded = build_student(settings, empty=lazy, longest=longest)
        student = ScoringModel(loaded, vocabulary=self.vocabulary, unused=holes)
        trains = adapter_names(student) if settings.lora is not None else None
        student.choose_path("student")
        student.freeze_unused()
        self.student = student
        base = None if trains is None else base_mark(settings.path, "model.student.path")
        self.state.note_student(
            {name: value.shape for name, value in self.state_dict().items()}, adapters=trains, base=base
        )
        if settings.compile:
            compile_layers(student)
        place = placement(trainer.strategy, mesh) if trainer else None
        if place is not None:
            self.student = student = place(student, trained=True)
        if lazy:
            fill(student, student.causal_lm, path=settings.path, setting="model.student.path")
        for scorer in self.scorers.values():
            scorer.attach(student)
            scorer.know_longest_row(longest)
            scorer.know_stop_ids(self.stop_ids)
            scorer.know_tokenizer(self.tokenizer)
            if place is not None and mesh is not None:
                scorer.load_sharded(place, vocabulary=self.vocabulary)
                continue
            scorer.load(vocabulary=self.vocabulary)
            if place is not None:
                scorer.shard(place)
        self.state.revisions = self._revisions()
        student.eval()

    def _revisions(self) -> dict[str, str]:
        """What a run that goes on must find as it was: files of frozen models, and saved responses."""
        found, saved = revisions(self.scorers.values()), self.sampler.revision()
        return found if saved is None else {**found, "model.sampler.paths": saved}

    def configure_optimizers(self) -> Any:
        """The configured optimizer over trainable parameters, and its schedule."""
        assert self.student is not None
        optimizer = self.optimizer_factory([p for p in self.student.parameters() if p.requires_grad])
        optimizer.register_load_state_dict_pre_hook(lambda own, state: by_number(state, self, own))
        scheduler = self.scheduler_factory(optimizer) if self.scheduler_factory is not None else None
        self.state.note_options(optimizer, scheduler)
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}

    # -- Lightning: the step -----------------------------------------------------------------------------------------

    def training_step(self, prompts: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """One rollout batch: sample, score, update.

        Returns:
            {"loss": scalar, "step": ``StepRecord``}.
        """
        clock, settings, before = Clock(), self.training_settings(), self.global_step
        with clock("sampling"):
            self.phase("sampling", 0, 1)
            sampled = self._rewarded(self._sample(prompts, settings))
            self._sample_ahead()
            told, hints = self._told(sampled)
            update = self._update(apply_truncated(told, self.truncated))
        record = self._accounted(update.run(sampled, clock), sampled)
        behind = before - sampled.provenance.weights_version
        self._log_step(update.loss, record, settings, behind=behind, hints=hints)
        return {"loss": update.loss, "step": record}

    def _sample(self, prompts: PromptBatch, settings: SamplingSettings) -> Rollout:
        reads_along = self.teacher.on_device(prompts.ids.device) if self.rollout_stop is not None else nullcontext()
        with reads_along, memory_for("sampling", "lower `data.prompt_batch` or `model.sampler.max_new_tokens`"):
            return self.generate(prompts, settings)

    def _accounted(self, record: StepRecord, sampled: Rollout) -> StepRecord:
        """The record, with what was sampled for rows that wait."""
        waiting = self.sampler.take_unfinished()
        if waiting is None:
            return record
        return replace(record, sampled_tokens=waiting.sampled, response_tokens=sampled.lengths.sum(), waiting=waiting)

    def _rewarded(self, rollout: Rollout) -> Rollout:
        """With what the responses are worth, where something asks for it."""
        if self.reward is None and rollout.reward is None:
            return rollout
        with shared_failure():
            found = rollout if self.reward is None else replace(rollout, reward=self.reward(rollout, self.tokenizer))
            assert found.reward is not None  # one of both gave it
            for transform in self.advantage:
                transform.check_rewards(found.reward, found.prompts.row_ids)
        return found

    @property
    def _hindsight(self) -> Hindsight | None:
        """Makes the teacher's prompts of sampled responses; None where they are known before."""
        found: Hindsight | None = getattr(getattr(attached_trainer(self), "datamodule", None), "hindsight", None)
        return found

    def _told(self, rollout: Rollout) -> tuple[Rollout, Tensor | None]:
        """With what the teacher reads of the responses, where that is made of them, and how many got it; see ``Hindsight``."""
        hindsight = self._hindsight
        if hindsight is None:
            return rollout, None
        with shared_failure():
            return hindsight(rollout)

    def _sample_ahead(self) -> None:
        """Begin the batch that the next step will train on, where the sampler can and there is a next step."""
        step = self.global_step + self.recipe.updates
        if self.sampler.ahead and step < self.total_steps:
            coming = looking_ahead(self.trainer.train_dataloader).coming()
            self.sampler.begin(coming, self.training_settings(step))

    def _update(self, rollout: Rollout) -> Update:
        """The optimizer steps that a rollout batch will make."""
        assert self.student is not None
        older = self.sampler.ahead and rollout.provenance.weights_version != self.global_step
        compares = self.gap.bound is not None or not older  # older weights explain a gap of any size
        recipe, temperature = self.recipes[0] if self.warms_up else self.recipe, self.sampler.temperature
        return Update(
            recipe,
            Scores(self.student, self.scorers, recipe, rollout, temperature=temperature, step=self.global_step),
            MicroBatches(rollout, self.budget, self.token_budget, packed=self._packed),
            LightningOptimisation(
                self, self.student, clip_norm=self.gradient_clip_norm, followers=self_teachers(self.scorers).values()
            ),
            self.phase,
            skips=self.skips,
            progress=self.progress,
            gap=self.gap if compares else None,
        )

    @property
    def _packed(self) -> bool:
        """Whether all models score rows without padding; what a server does with them is its own."""
        models = [self.student, *self.scorers.values()]
        return all(part.packs for model in models for part in model.modules() if isinstance(part, ScoringModel))  # type: ignore[union-attr]

    def _new_gap(self) -> SamplerGap:
        own = self.sampler
        return SamplerGap(own.max_logprob_gap, top_p=own.top_p, top_k=own.top_k, in_process=own.in_process)

    def _log_step(
        self, loss: Tensor, record: StepRecord, settings: SamplingSettings, *, behind: int, hints: Tensor | None
    ) -> None:
        values = logged(
            record,
            loss=loss,
            skipped_steps=self.skips.total,
            learning_rate=self.optimizers().param_groups[0]["lr"],  # type: ignore[union-attr]
            max_new_tokens=self.sampler.max_new_tokens,
            length_budget=settings.max_new_tokens if self.length_budget is not None else None,
            stops_early=self.length_budget is not None or self.rollout_stop is not None,
            weights_behind=None if self.sampler.in_process or record.waiting is not None else behind,
            hints=hints,
            engine_seconds=self.sampler.seconds.take() if self.sampler.seconds is not None else {},
        )
        self.log_dict(values, logger=False)
        log_now(self.trainer, values)

    def phase(self, name: str, done: int, total: int) -> None:
        """Tell callbacks that have ``on_phase`` how far the current phase is."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            listener = getattr(callback, "on_phase", None)
            if listener is not None:
                listener(name, done, total)

    # -- sampling ----------------------------------------------------------------------------------------------------

    def generate(self, prompts: PromptBatch, settings: SamplingSettings | None = None) -> Rollout:
        """Responses of the current student, [B, T].

        Args:
            prompts: B rows on the module's device.
            settings: default those of training at this step; see ``sampling_settings``.
        """
        assert self.student is not None
        settings = settings or self.sampling_settings()
        self.sampler.prepare(self.student_weights(), settings.weights_version)
        read_here = is_sharded(self.student) and self.sampler.in_process
        with gathered(self.student) if read_here else nullcontext():
            return self.sampler.sample(self.student, prompts, settings)

    def training_settings(self, step: int | None = None) -> SamplingSettings:
        """Those of a training rollout: as ``sampling_settings``, within the length budget and the stop.

        Args:
            step: optimizer steps made before it is trained on, default those made so far.
        """
        step = self.global_step if step is None else step
        changes: dict[str, Any] = {"step": step, "replay": "all" if self.warms_up else "some"}
        # what reads rewards, or makes the teacher's prompts of responses, may compare the samples of a prompt
        changes["together"] = self.reward is not None or self._hindsight is not None
        if self.length_budget is not None:
            tokens = self.length_budget.tokens(progress(step=step, total=self.total_steps))
            changes |= {"max_new_tokens": tokens, "budgeted": tokens < self.sampler.max_new_tokens}
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
            "unused_ids": self.unused_ids,
            "temperature": self.sampler.temperature,
            "top_p": self.sampler.top_p,
            "top_k": self.sampler.top_k,
            "seed": self.seed or 0,
            "step": self.global_step,
            "weights_version": self.global_step,
        }
        return SamplingSettings(**(values | changes))

    # -- Lightning: validation and prediction ------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Measure the start of a new run; of one that goes on, make the validation that its checkpoint was saved before."""
        self.gap = self._new_gap()
        if self.sampler.ahead:
            looking_ahead(self.trainer.train_dataloader)
        for teacher in self_teachers(self.scorers).values():
            teacher.begin()
        if self.state.take_due(self, at_start=self.validation.before_training):
            validate_now(self.trainer)
        begin_next_epoch(self.trainer)

    def on_train_end(self) -> None:
        """Measure the end, unless that was just done."""
        self.sampler.say_unfinished()
        if self.state.validated_at != self.global_step:
            validate_now(self.trainer)

    def on_validation_epoch_start(self) -> None:
        """Start from empty metrics."""
        self.evaluator.reset()

    @memory_for("validating", "lower `data.val_batch` or `model.validation.max_new_tokens`")
    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Greedy answers, sampled answers, divergence from the teacher; see ``ValidationSettings``."""
        length = self.validation.max_new_tokens or self.sampler.max_new_tokens
        self.evaluator.measure(self, prompts, batch_idx, max_new_tokens=length)

    def on_validation_epoch_end(self) -> None:
        """Log what was measured."""
        self.state.validated_at = self.global_step
        values = self.evaluator.compute()
        if self.trainer.state.fn == "fit":
            values["step"] = float(self.global_step)
        log_agreed(self, values)

    def test_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(prompts, batch_idx)

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, prompts: PromptBatch, batch_idx: int) -> Prediction:
        """A sampled response a row, its signal, and the weights the strategy gives it at the end of training."""
        rollout = self.generate(prompts)
        signal = self.student_signal(rollout)
        weights = self.weighting(self.recipe.as_weighed(signal), 1.0)
        return Prediction(rollout=rollout, signal=signal, weights=weights)

    def student_signal(self, rollout: Rollout) -> TokenSignal:
        """What the weighting reads of a rollout, and full-vocabulary KL(student || teacher) where the teacher can give it."""
        assert self.student is not None
        temperature, reads = self.sampler.temperature, self.weighting.requires
        return student_signal(
            self.student, self.teacher, rollout, temperature=temperature, reads=reads, step=self.global_step
        )

    def teardown(self, stage: str) -> None:
        """End the processes that graded answers."""
        self.evaluator.grader.close()
        if self.reward is not None:
            self.reward.close()

    # -- checkpoints and export --------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Everything but what is frozen and loaded from its own folder: teacher, reference, and the base below adapters."""
        with trained_modules(self):
            found = super().state_dict(*args, **kwargs)
        return self.state.drop_base(found, kwargs.get("prefix", ""))

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the student's weights, of one with adapters those alone or all.

        Raises:
            InputError: the checkpoint is of another architecture; the first names are listed.
        """
        self.state.require_same({name: value.shape for name, value in state_dict.items()})
        with trained_modules(self):
            return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Optimizer state by parameter name, counters, and what ``on_load_checkpoint`` compares."""
        assert self.student is not None
        whole, at_start = is_sharded(self.student), self.validation.before_training
        self.state.save(self, checkpoint, whole=whole, at_start=at_start)
        checkpoint["self_teachers"] = {name: part.state() for name, part in self_teachers(self.scorers).items()}
        ahead = self.sampler.ahead_state()
        if ahead is not None:
            checkpoint["sampled_ahead"] = ahead
        unfinished = self.sampler.unfinished_state()
        if unfinished is not None:
            checkpoint["unfinished_responses"] = unfinished
        checkpoint["skipped_steps"] = self.skips.total
        checkpoint["halved_token_budget"] = self.budget.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting; the checkpoint must be of this student, and where it is only evaluated reach the sampler."""
        trainer = attached_trainer(self)
        only_evaluated = trainer is not None and trainer.state.fn != "fit"
        if only_evaluated:
            self.sampler.check_loaded()
        self.state.load(checkpoint)
        for name, part in self_teachers(self.scorers).items():
            part.restore(checkpoint.get("self_teachers", {}).get(name))
        if "sampled_ahead" in checkpoint and not only_evaluated:  # older weights sampled it, for training
            self.sampler.restore_ahead(checkpoint["sampled_ahead"], self.sampling_settings())
        self.sampler.restore_unfinished(checkpoint.get("unfinished_responses", ()))
        self.skips.total = int(checkpoint.get("skipped_steps", 0))
        self.budget.restore(checkpoint.get("halved_token_budget", [None, None]), self.token_budget)

    def export_student(self, path: str | Path) -> Path:
        """Write the student as a Hugging Face folder (safetensors, tokenizer, generation config; LoRA merged).

        Called on every rank; rank 0 writes, loads the folder again on the CPU and compares its log-probs on a few tokens with
        the student's. The folder appears whole or not at all.

        Raises:
            InputError: on every rank, the folder is not the student.
        """
        return self.student_weights().export(path, compared=True)

    def student_weights(self) -> StudentWeights:
        """The student for a sampler's engine, and for an export."""
        assert self.student is not None
        return StudentWeights(self.student, self.student_settings, self.tokenizer, stop_ids=self.stop_ids)
