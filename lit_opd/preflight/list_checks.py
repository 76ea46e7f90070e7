"""What an objective or a weighting asks of a teacher that gives lists of its likeliest tokens, as those on servers do."""

from __future__ import annotations

from lit_opd.advantage import AdvantageTransform
from lit_opd.errors import InputError
from lit_opd.step.lists import whose_lists
from lit_opd.step.recipe import Recipe
from lit_opd.teacher import AlignedTeacher, CachedTeacher, RemoteTeacher, Teacher

NO_ADVANTAGE = (
    "a divergence is the same for every token that might have been sampled, so as a detached advantage its expected gradient is "
    "zero"
)


def require_transforms(recipe: Recipe) -> None:
    """The advantage is made by transforms, not by an objective."""
    for part in recipe.advantage:
        if not isinstance(part, AdvantageTransform):
            name = type(part).__name__
            raise InputError(
                f"`OPDModule.advantage` must hold advantage transforms, got {name}: {NO_ADVANTAGE}; give it as `objective`"
            )


def remedy(missing: frozenset[str], teacher: Teacher) -> str:
    """What a teacher on servers, behind a cache or with another tokenizer, can be asked for in place of ``missing``."""
    if isinstance(teacher, AlignedTeacher) and teacher.chunks == "sum" and "teacher_distribution" in missing:
        return f"set `{teacher.field}.chunks: single`, whose chunks are tokens, or "
    if isinstance(teacher, CachedTeacher) and teacher.list_size and "teacher_distribution" in missing:
        return f"set the objective's `top_k`, at most {teacher.list_size}, to read the teacher's lists, or "
    if not isinstance(teacher, RemoteTeacher):
        return ""
    if "token_kl" in missing:
        return (
            f"a KL over a list of the likeliest tokens is not that of the whole vocabulary, and {NO_ADVANTAGE}: minimise it by "
            "the objective `Divergence`, or "
        )
    if "teacher_distribution" in missing:
        return f"set `top_k` of the objective and of `{teacher.field}`, or "
    if teacher.top_k is None:
        more = "" if missing == {"teacher_topk"} else " and `entropy_bound`"
        return f"set `{teacher.field}.top_k`{more}, or "
    return f"set `{teacher.field}.entropy_bound` to take a bound of it, or "


def require_single_stops(recipe: Recipe, teacher: Teacher) -> None:
    """What compares whole distributions knows no class of stop tokens."""
    readers = [part for part in recipe.parts if part.requires & {"teacher_distribution", "token_kl"}]
    if teacher.sums_stops and readers:
        raise InputError(
            f"`{teacher.field}.stop_mass` must be own with `{type(readers[0]).__name__}`, got sum: a divergence compares single "
            "tokens, and would still call a stop unlikely that the teacher writes otherwise; take `PolicyLoss`, or set "
            "`model.sampler.stop_token_ids` to ids that both end a response with"
        )


def require_lists(recipe: Recipe, teacher: Teacher) -> None:
    """The teacher's lists are as long as the objective reads them."""
    objective = recipe.objective
    if whose_lists(recipe, teacher) is None:
        return
    name, asked, given = type(objective).__name__, objective.list_size, teacher.list_size
    if asked is not None and asked > given:
        raise InputError(
            f"`{name}.top_k` must be at most the {given} tokens that `{type(teacher).__name__}` lists, got {asked}; lower it, or "
            f"raise `{teacher.field}.top_k`"
        )


def require_long_lists(recipe: Recipe, teacher: Teacher) -> None:
    """The teacher's lists are as long as weightings and callbacks read them: a share of a shorter one would be another number."""
    for part in recipe.parts:
        asked = getattr(part, "list_length", 0)
        if "teacher_topk" in teacher.provides and asked > teacher.list_size:
            name, given = type(part).__name__, teacher.list_size
            raise InputError(
                f"`{name}` must read at most the {given} tokens that `{type(teacher).__name__}` lists, got {asked}; lower its "
                f"number of list entries, or raise `{teacher.field}.top_k`"
            )


def check_candidates(recipe: Recipe, teacher: Teacher) -> str | None:
    """Ask whether the teacher scores the student's likeliest tokens, where the objective would read that.

    Returns:
        a warning where the objective takes the teacher's in their place.
    Raises:
        InputError: the objective was told to take the student's, and cannot.
    """
    objective = recipe.objective
    if whose_lists(recipe, teacher) is None or objective.whose_list(asked=True) != "student":
        return None
    assert objective.list_size is not None  # what reads lists has a size
    why = teacher.ask_candidates(objective.list_size)
    name = type(objective).__name__
    if why is not None and objective.whose_list(asked=False) == "student":
        raise InputError(f"`{name}.top_k_of` must be teacher or null, got student: {why}")
    if why is not None:
        return f"`{name}` keeps the teacher's {objective.list_size} likeliest tokens, not the student's: {why}"
    return None
