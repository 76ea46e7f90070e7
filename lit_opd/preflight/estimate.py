"""From a run's objects to its memory budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from lit_opd.errors import InputError
from lit_opd.models.loading import load_config
from lit_opd.preflight.memory import (
    ACCURACY,
    DIVERGENCE_TILES,
    LOGPROB_TILES,
    STATISTIC_TILES,
    Budget,
    Held,
    Rank,
    Workload,
)
from lit_opd.preflight.plan import GIB, Plan
from lit_opd.preflight.sizes import ModelSize, NotEstimated, model_size, optimizer_bytes
from lit_opd.preflight.subject import Subject
from lit_opd.prompts import PromptDataModule
from lit_opd.rollout import DecodeSampler
from lit_opd.shipped import program
from lit_opd.step.lists import asked_of, reads_head, required_beside, states_of, whose_lists
from lit_opd.step.recipe import Recipe
from lit_opd.teacher import AlignedTeacher, LocalTeacher, MixedTeacher, Teacher
from lit_opd.teacher.self_teacher import SelfTeacher, self_teachers
from lit_opd.types import LIST_LENGTH

FLOAT32 = 4  # bytes
_FORCED = {"64-true": "float64", "bf16-true": "bfloat16"}  # precisions that convert every weight
HEAD_READERS = frozenset({"teacher_entropy", "teacher_topk", "token_kl", "teacher_distribution"})
_STATISTICS = (
    "student_entropy",
    "student_topk",
    "teacher_entropy",
    "teacher_topk",
    "student_at_teacher_topk",
    "token_kl",
)


def estimate(module: Subject, data: PromptDataModule, plan: Plan) -> Budget:
    """The memory budget of one rank of a run.

    Args:
        module: the ``OPDModule``; no weights are loaded.
        data: the ``PromptDataModule``; its longest prompt counts, or ``max_prompt_tokens`` before it was read.
        plan: where the run runs.
    Raises:
        NotEstimated: a model or optimizer whose size does not follow from its configuration.
    """
    settings = module.student_settings
    dtype = _FORCED.get(plan.precision, settings.dtype)
    code = settings.trust_remote_code
    if settings.quantization is not None:
        raise NotEstimated("the student is quantised")
    size = _named("student", module.student_config, lora=settings.lora, trust_remote_code=code)
    student = Held(size, width=_width(dtype))
    held = {role: [_held(role, part, plan) for part in _local(scorer)] for role, scorer in module.scorers.items()}
    return Rank(
        student,
        _workload(module, data, plan),
        plan,
        frozen=[
            *(model for models in held.values() for model in models),
            *(
                _kept(size, _width(dtype) if settings.lora is None else FLOAT32)
                for part in self_teachers(module.scorers).values()
                if part.update != "live"
            ),
        ],
        state_bytes=optimizer_bytes(module.optimizer_factory, size.trainable, getattr(torch, dtype)),
        compared=[*held["teacher"], *_own(student, module.teacher, plan)],
    ).budget()


def require_memory(found: Budget, plan: Plan) -> None:
    """Refuse what is clearly above the memory of a rank: by more than the estimate may be wrong.

    Raises:
        InputError: naming the phase, the largest part and what makes it smaller.
    """
    if plan.memory is not None and found.peak > (1 + ACCURACY) * plan.memory:
        raise InputError(
            f"{shortage(found, plan)}; {found.remedy}. `{program()} preflight` prints the whole budget, `--memory_gb` names "
            "another memory, `--memory_check false` runs anyway"
        )


def shortage(found: Budget, plan: Plan) -> str:
    """Need against memory, with the largest part of the worst phase, in one sentence."""
    name, part = found.largest_part
    assert plan.memory is not None
    return (
        f"a rank needs about {found.peak / GIB:.1f} GiB in its worst phase ({found.worst}) and has {plan.memory / GIB:.1f} "
        f"({plan.memory_source}); the largest part is {name}, {part / GIB:.1f} GiB"
    )


def _workload(module: Subject, data: PromptDataModule, plan: Plan) -> Workload:
    sampler, required = module.sampler, frozenset().union(*(recipe.required for recipe in module.recipes))
    chosen = any(whose_lists(recipe, module.teacher) == "student" for recipe in module.recipes)
    scored = chosen or any(name in required for name in _STATISTICS)
    trained = "teacher_distribution" in required
    return Workload(
        rows=max(sampler.trained_rows(data.prompt_batch // plan.ranks * data.samples_per_prompt)),
        prompt=data.longest_prompt,
        response=sampler.max_new_tokens,
        token_budget=module.token_budget,
        mini_batches=module.recipe.mini_batches,
        epochs=module.recipe.epochs,
        checkpointing=module.student_settings.gradient_checkpointing,
        eager=module.student_settings.attn_implementation == "eager",
        local_sampler=sampler.in_process,
        decodes=isinstance(sampler.engine, DecodeSampler),
        read_along=module.rollout_stop is not None,
        engine=sampler.memory_fraction * (plan.memory or 0.0),
        engine_sleeps=sampler.sleep,
        val_rows=-(-data.val_batch // plan.ranks) if _validates(module, data) else 0,
        val_response=module.validation.max_new_tokens or sampler.max_new_tokens,
        score_tiles=STATISTIC_TILES if scored else LOGPROB_TILES,
        train_tiles=DIVERGENCE_TILES if trained else STATISTIC_TILES if scored else LOGPROB_TILES,
        listed=max(_listed(recipe, module.teacher) for recipe in module.recipes),
        mixes=any(_mixes(recipe, module.teacher) for recipe in module.recipes),
        compares=any(_compares(recipe, module.teacher, scored=recipe.needs_scoring_pass) for recipe in module.recipes),
        differentiates=any(_compares(recipe, module.teacher, scored=True) for recipe in module.recipes),
        keeps_scored=any(_keeps(recipe, module.teacher, plan) for recipe in module.recipes),
        keeps_states=any(
            _keeps(recipe, module.teacher, plan)
            and recipe.mini_batches == 1
            and _compares(recipe, module.teacher, scored=recipe.needs_scoring_pass)
            for recipe in module.recipes
        ),
        val_compares=module.validation.divergence and "token_kl" in module.teacher.provides,
    )


def _compares(recipe: Recipe, teacher: Teacher, *, scored: bool) -> bool:
    """Whether the update reads the teacher's output head beside the student's; of a batch that was ``scored``, for its loss."""
    return reads_head(recipe, teacher, scored=scored, trains=True)


def _keeps(recipe: Recipe, teacher: Teacher, plan: Plan) -> bool:
    """Whether the teacher's hidden states are kept when it has scored: see ``LocalTeacher.score``."""
    model = teacher.inner if isinstance(teacher, AlignedTeacher) else teacher
    asked = states_of(recipe, asked_of(recipe, teacher))
    return isinstance(model, LocalTeacher) and plan.shards == 1 and bool(asked & {"token_kl", "teacher_distribution"})


def _own(student: Held, teacher: Teacher, plan: Plan) -> Iterator[Held]:
    """The student where it is its own teacher, or a part of it."""
    for part in teacher.modules():
        if isinstance(part, Teacher) and part.shares_student:
            changes = plan.shards > 1 or (isinstance(part, SelfTeacher) and part.update != "live")
            yield replace(student, copied=changes)


def _listed(recipe: Recipe, teacher: Teacher) -> int:
    """Entries a token of the lists that are kept."""
    read = required_beside(recipe, teacher)
    sizes = {
        "teacher_topk": teacher.list_size,
        "student_topk": LIST_LENGTH,
        "student_at_teacher_topk": teacher.list_size,
    }
    chosen = recipe.objective.list_size if whose_lists(recipe, teacher) == "student" else None
    return sum(size for name, size in sizes.items() if name in read) + (chosen or 0)


def _mixes(recipe: Recipe, teacher: Teacher) -> bool:
    """Whether the heads of several models are read together."""
    mixed = [part for part in teacher.modules() if isinstance(part, MixedTeacher)]
    return any(part.how == "product" for part in mixed) or bool(mixed and recipe.required & HEAD_READERS)


def _validates(module: Subject, data: PromptDataModule) -> bool:
    settings = module.validation
    return bool((data.val or data.val_fraction) and (settings.greedy or settings.samples or settings.divergence))


def _local(scorer: Teacher) -> Iterator[LocalTeacher]:
    """The models of a teacher that live in this process."""
    return (part for part in scorer.modules() if isinstance(part, LocalTeacher))


def _kept(size: ModelSize, width: int) -> Held:
    """What a ``SelfTeacher`` keeps of the weights that are trained: its values in at least float32 and, while it scores, the
    student's own, ``width`` bytes each (adapters are float32 whatever the base is); no model that runs."""
    return Held(replace(size, parameters=size.num_trainable), width=max(width, FLOAT32) + width)


def _held(role: str, teacher: LocalTeacher, plan: Plan) -> Held:
    if getattr(teacher, "quantization", None) is not None:
        raise NotEstimated(f"{role}: it is quantised")
    code = teacher.trust_remote_code
    config = load_config(teacher.path, f"{teacher.field}.path", trust_remote_code=code)
    size = _named(role, config, trust_remote_code=code)
    width = _width(_FORCED.get(plan.precision, teacher.dtype))
    return Held(size, width=width, offload=bool(getattr(teacher, "offload", False)) and plan.accelerator == "gpu")


def _named(role: str, config: Any, **options: Any) -> Any:
    try:
        return model_size(config, **options)
    except NotEstimated as error:
        raise NotEstimated(f"{role}: {error}") from error


def _width(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)
