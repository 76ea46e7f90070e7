"""What must hold of a module, its trainer and its data before a run; nothing here needs weights.

``OPDModule.setup`` runs them all, the rows of ``checks.py`` one by one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator

from lit_opd.advantage import GroupReward, ResidualReward, RewardGate, order_warning
from lit_opd.distributed import check_master_port, shared_failure
from lit_opd.errors import InputError
from lit_opd.evaluation.reward import AnswerReward
from lit_opd.models.sharding import shards
from lit_opd.models.student import base_quantization
from lit_opd.models.vocabulary import stop_warning
from lit_opd.preflight.aligned_checks import check_aligned, own_tokenizer
from lit_opd.preflight.baseline_checks import baseline_warnings
from lit_opd.preflight.callback_checks import check_batches
from lit_opd.preflight.hindsight_checks import check_hindsight
from lit_opd.preflight.list_checks import (
    check_candidates,
    remedy,
    require_lists,
    require_long_lists,
    require_single_stops,
    require_transforms,
)
from lit_opd.preflight.partial_checks import check_partial
from lit_opd.preflight.replay_checks import check_replay, likelihood_warnings
from lit_opd.preflight.strategy_checks import check_dtypes, check_ranks, check_strategy
from lit_opd.preflight.subject import Subject
from lit_opd.prompts import PromptDataModule
from lit_opd.run.checkpoint_kinds import check_checkpoint
from lit_opd.scoring.heads import check_choice
from lit_opd.step.lists import required_beside
from lit_opd.step.recipe import Recipe
from lit_opd.teacher import SelfTeacher, Teacher

ALWAYS_AVAILABLE = frozenset(
    {"student_entropy", "student_topk", "student_at_teacher_topk", "sampler_logprobs", "token_ids"}
)


def check_settings(module: Subject, *, max_skipped_steps: int) -> None:
    """The constructor's numbers are in their ranges."""
    numbers = {
        "mini_batches": module.recipe.mini_batches,
        "epochs": module.recipe.epochs,
        "token_budget": module.token_budget,
    }
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise InputError(f"`OPDModule.{name}` must be >= 1, got {value}")
    if max_skipped_steps < 0:
        raise InputError(f"`OPDModule.max_skipped_steps` must be >= 0, got {max_skipped_steps}")
    if module.gradient_clip_norm is not None and not module.gradient_clip_norm > 0:
        raise InputError(f"`OPDModule.gradient_clip_norm` must be > 0 or null, got {module.gradient_clip_norm}")
    if module.length_budget is not None:
        module.length_budget.check(module.sampler.max_new_tokens)
    require_transforms(module.recipe)


def check_before(
    module: Subject,
    trainer: Trainer,
    data: PromptDataModule | None,
    *,
    ckpt_path: str | None = None,
    training: bool = True,
) -> None:
    """Every check that needs no weights, data included; an InputError here costs no GPU time and leaves no file.

    Args:
        module: of the run.
        trainer: the trainer the run will use.
        data: the run's data module.
        ckpt_path: what the run goes on from.
        training: False where the run takes the weights only.
    """
    module.trainer = trainer
    if ckpt_path is not None:
        check_checkpoint(ckpt_path, trainer.strategy, training=training)
        if not training:
            module.sampler.check_loaded()
    _ = module.vocabulary, module.stop_ids
    if data is not None:
        data.use_tokenizer(module.tokenizer, own_tokenizer(module, data)).use_sampler(module.sampler)
        data.trainer = trainer
        data.setup("fit")
    check_run(module, data)


def check_run(module: Subject, data: PromptDataModule | None) -> None:
    """The checks of a module that has its trainer; ``data`` is set up."""
    module.longest_row = longest_row(module, data)
    check_trainer(module)
    check_scorers(module)
    check_reward(module, data)
    check_hindsight(module, data)
    check_aligned(module, data)
    check_batch(module, data, ranks=module.trainer.world_size)
    check_window(module, data)
    check_token_budget(module, data)
    check_rollout_stop(module, sharded=shards(module.trainer.strategy))
    check_self_teacher(module, data)
    check_replay(module, data)
    check_partial(module, data, ranks=module.trainer.world_size)
    check_servers(module, data)
    for warning in (*setting_warnings(module), *stop_warnings(module)):
        warnings.warn(warning, stacklevel=2)


# -- the trainer -------------------------------------------------------------------------------------------------------


def check_attention(module: Subject) -> None:
    """FlashAttention's kernels know 16-bit values only; in float32 the first step would fail."""
    settings = module.student_settings
    if "flash" in str(settings.attn_implementation) and "bf16" not in str(module.trainer.precision):
        if settings.dtype == "float32" or str(module.trainer.precision).startswith("64"):
            raise InputError(
                f"`trainer.precision` must be bf16-mixed for `model.student.attn_implementation` {settings.attn_implementation}, "
                f"which computes in 16 bits only, got {module.trainer.precision}; set it, or take sdpa"
            )


def check_quantization(module: Subject) -> None:
    """A quantised base is held whole by every rank, and sampled by what holds it."""
    given = module.student_settings.quantization
    if given is None:
        return
    if shards(module.trainer.strategy):
        raise InputError(
            f"`model.student.quantization` must be null when weights are sharded, got {given!r}; train with ddp or on one device"
        )
    if not module.sampler.in_process:
        raise InputError(
            f"`model.student.quantization` must be null with {type(module.sampler).__name__}, got {given!r}: its engine would "
            "sample from other weights; take DecodeSampler or TransformersSampler"
        )
    base_quantization(module.student_settings)


def check_trainer(module: Subject) -> None:
    """The trainer's settings are ones that this module's own optimisation can follow."""
    trainer = module.trainer
    check_strategy(trainer.strategy)
    check_ranks(trainer.strategy, local_ranks=trainer.num_devices, nodes=trainer.num_nodes)
    check_choice("cpu" if isinstance(getattr(trainer, "accelerator", None), CPUAccelerator) else "cuda")
    parts = [part for scorer in module.scorers.values() for part in scorer.modules()]
    found = {getattr(part, "dtype", None) for part in parts} | {module.student_settings.dtype}
    check_dtypes(trainer.strategy, {dtype for dtype in found if isinstance(dtype, str)})
    if trainer.world_size > 1:
        check_master_port()
    updates = module.recipe.updates
    if trainer.max_steps == 0 or trainer.max_epochs == 0:
        raise InputError("`trainer.max_steps` must be >= 1, or -1 for no bound, got 0: nothing would be trained")
    if trainer.max_steps > 0 and trainer.max_steps % updates:
        by = f", which `trainer.fast_dev_run` set; give {updates} batches" if trainer.fast_dev_run else ""  # type: ignore[attr-defined]
        raise InputError(
            f"`trainer.max_steps` must be a multiple of mini_batches * epochs = {updates}, got {trainer.max_steps}{by}"
        )
    check_batches(trainer)
    check_quantization(module)
    if str(trainer.precision).startswith("16"):
        raise InputError(f"`trainer.precision` must be 32-true, 64-true or bf16, got {trainer.precision}")
    check_attention(module)
    if trainer.gradient_clip_val is not None:
        raise InputError("`trainer.gradient_clip_val` has no effect here; set `model.gradient_clip_norm`")
    if trainer.accumulate_grad_batches != 1:
        raise InputError("`trainer.accumulate_grad_batches` has no effect here; set `model.token_budget`")
    check_optimizer(module)


def check_optimizer(module: Subject) -> None:
    """Optimizer and schedule accept their settings, tried on a small weight, and the learning rate is one."""
    with _explained("model.optimizer"):
        optimizer = module.optimizer_factory([torch.nn.Parameter(torch.zeros(2, 2))])
    rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
    if not all(0 <= rate < math.inf for rate in rates):
        raise InputError(f"`model.optimizer.lr` must be >= 0 and finite, got {rates}")
    if module.scheduler_factory is None:
        return
    with _explained("model.lr_scheduler"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer has made no step yet
        module.scheduler_factory(optimizer).step()


@contextmanager
def _explained(field: str) -> Iterator[None]:
    """Whatever a class of torch's or the user's raises about its arguments, as an InputError that names ``field``."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"`{field}` must accept its settings, got {type(error).__name__}: {error}; correct them"
        ) from error


# -- what is read ------------------------------------------------------------------------------------------------------


def check_scorers(module: Subject) -> None:
    """See ``require_scored``."""
    for recipe in module.recipes:
        require_scored(recipe, module.teacher, module.reference)


def require_scored(recipe: Recipe, teacher: Teacher, reference: Teacher | None) -> None:
    """Weighting, objective and advantage find what they read in the teacher, and the reference where one is read."""
    if reference is None and "reference_logprobs" in recipe.required:
        raise InputError(
            "`model.reference` must be a teacher such as `LocalTeacher` when reference_logprobs are read, got null; "
            "give it the path of the initial student"
        )
    require_single_stops(recipe, teacher)
    require_lists(recipe, teacher)
    require_long_lists(recipe, teacher)
    missing = required_beside(recipe, teacher) - teacher.provides - ALWAYS_AVAILABLE - {"reference_logprobs", "reward"}
    if missing:
        asking = [part for part in recipe.parts if part.requires & missing]
        names = " and ".join(f"`{type(part).__name__}`" for part in asking)
        raise InputError(
            f"{names} must have {sorted(missing)}, which `{type(teacher).__name__}` cannot give; {remedy(missing, teacher)}"
            "choose another weighting, objective, advantage transform, callback or teacher"
        )


def check_reward(module: Subject, data: PromptDataModule | None) -> None:
    """What reads a reward gets one, from one place, and has rows to compare.

    Raises:
        InputError: it does not.
    """
    readers = [part for recipe in module.recipes for part in recipe.parts if "reward" in part.requires]
    plays = getattr(module.sampler, "environment", None) is not None
    if plays and module.reward is not None:
        raise InputError(
            f"`model.reward` must be null where an environment gives rewards (`{type(module.sampler).__name__}`), got "
            f"{type(module.reward).__name__}; leave it out, or let the environment's `step` return what it would"
        )
    if not readers:
        return
    name = f"`{type(readers[0]).__name__}`"
    if module.reward is None and not plays:
        raise InputError(
            f"`model.reward` must be given for {name}, which reads a reward, got null; set it to AnswerReward, to a class of "
            "your own, or sample with TurnsSampler"
        )
    _require_unit_rewards(module, readers)
    samples = getattr(data, "samples_per_prompt", 2)
    if samples < 2 and any(isinstance(part, GroupReward | ResidualReward) for part in readers):
        raise InputError(
            f"`data.samples_per_prompt` must be >= 2 for {name}, which compares the samples of a prompt, got {samples}; "
            "8 is usual"
        )


def _require_unit_rewards(module: Subject, readers: Sequence[object]) -> None:
    """What ``AnswerReward`` gives is what a gate reads; of a class of the user's it is known at the first batch."""
    given = module.reward
    if not isinstance(given, AnswerReward) or not any(isinstance(part, RewardGate) for part in readers):
        return
    for name in ("right", "wrong"):
        value = getattr(given, name)
        if not 0.0 <= value <= 1.0:
            raise InputError(
                f"`AnswerReward.{name}` must be in [0, 1] with `RewardGate`, which reads how right an answer is, got {value:g}"
            )


def setting_warnings(module: Subject) -> Iterator[str]:
    """What is allowed and probably not meant: a biased baseline, transforms in an odd order, settings without effect."""
    advantage, objective = list(module.recipe.advantage), module.recipe.objective
    yield from baseline_warnings(module)
    odd = order_warning(advantage)
    if odd is not None:
        yield odd
    idle = [] if objective.reads_advantage else [part for part in advantage if not part.drops_tokens]
    if idle:
        what = "" if idle == advantage else f"{', '.join(f'`{type(part).__name__}`' for part in idle)} in "
        yield f"{what}`model.advantage` has no effect: `{type(objective).__name__}` reads no advantage"
    yield from likelihood_warnings(module)
    if module.reference is not None and "reference" not in module.scorers:
        yield "`model.reference` has no effect and is not loaded: nothing reads its log-probs"


def stop_warnings(module: Subject) -> Iterator[str]:
    """Where a response of the student ends at another token than one of a teacher's."""
    for role, pairs in module.scorer_tokenizers.items():
        for tokenizer, _ in pairs:
            summed = module.scorers[role].sums_stops
            warning = stop_warning(module.tokenizer, module.stop_ids, tokenizer, role=role, summed=summed)
            if warning is not None:
                yield warning


def check_rollout_stop(module: Subject, *, sharded: bool) -> None:
    """Sampler and teacher are ones that can stop a response by its prefix ratio, and weights are not ``sharded``."""
    if module.rollout_stop is not None:
        teacher, config = type(module.teacher).__name__, module.teacher.reader_config
        module.rollout_stop.check(module.sampler, teacher=teacher, config=config, sharded=sharded)


def check_self_teacher(module: Subject, data: PromptDataModule | None) -> None:
    """A student that is its own teacher learns from what only the teacher reads; its average keeps small changes."""
    found = [part for scorer in module.scorers.values() for part in scorer.modules() if isinstance(part, SelfTeacher)]
    averages = any(part.update == "ema" for part in found)
    if averages and str(module.trainer.precision) == "bf16-true":
        raise InputError(
            "`trainer.precision` must be bf16-mixed or 32-true with SelfTeacher(update=ema), got bf16-true: the student would "
            "lose the small changes that are averaged"
        )
    own = module.teacher
    if not isinstance(own, SelfTeacher) or data is None or data.teacher_reads_more:
        return
    what = f"`data.teacher_prompt` must give SelfTeacher(update={own.update}) something that the student does not read"
    why = "with the same prompt both are equal and there is nothing to learn"
    if own.update == "live":
        raise InputError(f"{what}, got the same prompts: {why}; set it, or take another teacher")
    warnings.warn(f"{what}: {why}, unless the student starts elsewhere", stacklevel=2)


# -- sizes -------------------------------------------------------------------------------------------------------------


def check_batch(module: Subject, data: PromptDataModule | None, *, ranks: int) -> None:
    """The global batch divides over ``ranks``, and a rank's rows over the mini-batches."""
    mini_batches = module.recipe.mini_batches
    batch = getattr(data, "prompt_batch", ranks)
    if batch % ranks:
        raise InputError(f"`data.prompt_batch` must be a multiple of the {ranks} ranks, got {batch}")
    rows = batch // ranks * getattr(data, "samples_per_prompt", mini_batches)
    fewest, _ = module.sampler.trained_rows(rows)
    if fewest < mini_batches:
        waits = "" if fewest == rows else f", of which {rows - fewest} may wait"
        raise InputError(f"`model.mini_batches` must be at most the {fewest} rows of a rank{waits}, got {mini_batches}")


def check_window(module: Subject, data: PromptDataModule | None) -> None:
    """The longest prompt and response fit into the context windows of student, teacher and reference; a prompt that only the
    teacher reads into the teacher's. Responses of the validation fit into the student's and, where it compares with it, the
    teacher's."""
    _check_windows(module, data, "sampler", module.scorers)
    if module.validation.max_new_tokens is not None:
        _check_windows(module, data, "validation", {"teacher": module.teacher} if module.validation.divergence else {})


def _check_windows(module: Subject, data: PromptDataModule | None, name: str, scorers: Mapping[str, Teacher]) -> None:
    limit, read = getattr(data, "max_prompt_tokens", None), getattr(data, "longest_prompt", None)
    response, own = getattr(module, name).max_new_tokens, module.student_config.get_text_config()
    _require_window(name, "model.student", own, limit, response)
    students = read if read is None or limit is None else min(limit, read)
    for role, scorer in scorers.items():
        for part in (part for part in scorer.modules() if isinstance(part, Teacher)):
            config = own if part.shares_student else part.reader_config
            _require_window(name, scorer.field, config, read if role == "teacher" else students, response)


def _require_window(name: str, field: str, config: Any, prompt: int | None, response: int) -> None:
    window = getattr(config, "max_position_embeddings", None)
    if prompt is not None and window is not None and prompt + response > window:
        raise InputError(
            f"`model.{name}.max_new_tokens` must leave room in the context window of `{field}`, {window} tokens, got "
            f"{response} after prompts of up to {prompt}; lower it or `data.max_prompt_tokens` (or `max_prompt_tokens` of "
            "`data.teacher_prompt`), or shorten what the template adds"
        )


def check_token_budget(module: Subject, data: PromptDataModule | None) -> None:
    """A micro-batch holds the longest row."""
    limit, response = _longest_prompt(data), module.sampler.max_new_tokens
    if limit is not None and module.token_budget is not None and limit + response > module.token_budget:
        raise InputError(
            f"`model.token_budget` must hold the longest row, {limit} + {response} tokens, got {module.token_budget}"
        )


def _longest_prompt(data: PromptDataModule | None) -> int | None:
    """Tokens that a row's prompt may have: the limit, which holds for the student's, or more where a teacher's are longer."""
    limit = getattr(data, "max_prompt_tokens", None)
    return None if limit is None else max(limit, getattr(data, "longest_prompt", limit))


def longest_row(module: Subject, data: PromptDataModule | None) -> int | None:
    """Tokens that a prompt and response may have together, validation included; None where the data sets no limit."""
    limit = _longest_prompt(data)
    response = max(module.sampler.max_new_tokens, module.validation.max_new_tokens or 0)
    return None if limit is None else limit + response


def check_servers(module: Subject, data: PromptDataModule | None) -> None:
    """Servers of teacher and sampler answer, serve the right model and hold the longest row."""
    tokens = longest_row(module, data)
    with shared_failure():
        for scorer in module.scorers.values():
            scorer.check_student(module.student_settings)
            scorer.check(temperature=module.sampler.temperature, tokens=tokens)
            scorer.check_data(getattr(data, "rows_by_teacher", dict)())
        warnings_ = [check_candidates(recipe, module.teacher) for recipe in module.recipes]
        lora = module.student_settings.lora
        module.sampler.attach(module.tokenizer, getattr(data, "encoder", None))
        module.sampler.check_student(None if lora is None else lora.rank)
        module.sampler.check(tokens=tokens, vocabulary=module.student_config.get_text_config().vocab_size)
    for warning in dict.fromkeys(filter(None, warnings_)):
        warnings.warn(warning, stacklevel=2)
