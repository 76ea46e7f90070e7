"""Where an objective that compares distributions reads lists of the teacher's likeliest tokens in place of its output head."""

from __future__ import annotations

from lit_opd.objective.base import Whose
from lit_opd.step.recipe import Recipe, with_implied
from lit_opd.teacher.base import Teacher

HEAD, LISTS, KL = "teacher_distribution", "teacher_topk", "token_kl"


def whose_lists(recipe: Recipe, teacher: Teacher) -> Whose | None:
    """Whose likeliest tokens the teacher's lists hold; None where the objective reads no lists."""
    objective = recipe.objective
    if HEAD not in objective.requires or HEAD in teacher.provides or LISTS not in teacher.provides:
        return None
    return None if objective.list_size is None else objective.whose_list(asked=teacher.takes_candidates)


def reads_head(recipe: Recipe, teacher: Teacher, *, scored: bool, trains: bool) -> bool:
    """Whether a forward pass of the student reads the teacher's output head.

    Args:
        recipe: what is learned.
        teacher: whose signal is learned from.
        scored: the student has scored the whole batch before.
        trains: the loss is wanted, with its gradient.
    """
    distribution = HEAD in recipe.objective.requires and whose_lists(recipe, teacher) is None
    return (trains and distribution) or (not scored and KL in recipe.required)


def states_of(recipe: Recipe, asked: frozenset[str]) -> frozenset[str]:
    """What the teacher is asked for when it scores the batch, without what would make it keep states that nothing finds again:
    mini-batches are cut otherwise."""
    return asked - {HEAD} if recipe.mini_batches > 1 else asked


def required_beside(recipe: Recipe, teacher: Teacher) -> frozenset[str]:
    """Optional ``TokenSignal`` fields that something reads, whoever gives them: lists in place of a head that the teacher does
    not have."""
    whose = whose_lists(recipe, teacher)
    if whose is None:
        return recipe.required
    others = (part.requires for part in recipe.parts if part is not recipe.objective)
    own = recipe.objective.requires - {HEAD} | ({LISTS} if whose == "teacher" else set())
    return with_implied(own.union(*others))


def asked_of(recipe: Recipe, teacher: Teacher) -> frozenset[str]:
    """Those of them that the teacher's ``score`` is asked for: the student, the run and a reference model give the others."""
    return required_beside(recipe, teacher) & teacher.provides
