"""What a teacher with another tokenizer needs of the run, and how much of its text it would score."""

from __future__ import annotations

import warnings
from typing import Any

from lit_opd.errors import InputError
from lit_opd.preflight.subject import Subject
from lit_opd.prompts import PromptDataModule
from lit_opd.teacher import AlignedTeacher

MEASURED_PROMPTS = 64
_OF_ONE_TOKEN = frozenset({"student_topk", "token_ids"})  # signal fields that a chunk of several tokens does not have


def check_aligned(module: Subject, data: PromptDataModule | None) -> tuple[int, int] | None:
    """A teacher with another tokenizer is the run's teacher, can be aligned, reads its own prompts, and scores enough of a text.

    The share is measured on the first prompts of the data, which are no responses, but of the same kind.

    Returns:
        of those prompts' tokens how many would have a score, and how many there are; None without such a teacher.
    Raises:
        InputError: one of these does not hold.
    """
    _require_place(module)
    own = module.teacher
    if not isinstance(own, AlignedTeacher):
        return None
    own.know_tokenizer(module.tokenizer)
    own.know_stop_ids(module.stop_ids)
    _ = own.aligner
    _require_tokens(module, own)
    if own.prompt_tokenizer.get_vocab() == module.tokenizer.get_vocab():
        warnings.warn(
            f"`{own.field}`: the teacher has the student's tokenizer, so nothing is to be aligned; take the wrapped teacher "
            "itself, which scores the tokens that were sampled",
            stacklevel=3,
        )
    if data is None:
        return None
    _require_prompts(own, data)
    found = own.aligned_fraction(data.first_prompts(MEASURED_PROMPTS))
    own.require_aligned(*found)
    return found


def own_tokenizer(module: Subject, data: PromptDataModule) -> Any:
    """The tokenizer of the teacher's prompts, where the data does not name one."""
    return module.teacher.prompt_tokenizer if data.teacher_tokenizer_path is None else None


def _require_place(module: Subject) -> None:
    for role, scorer in module.scorers.items():
        for part in scorer.modules():
            if isinstance(part, AlignedTeacher) and part is not module.teacher:
                raise InputError(
                    f"`model.{role}` must not hold an AlignedTeacher inside, got {type(scorer).__name__}: what it scores are "
                    "chunks, not tokens; make it `model.teacher` itself, with the other teachers of its tokenizer inside"
                )


def _require_tokens(module: Subject, own: AlignedTeacher) -> None:
    parts = [part for recipe in module.recipes for part in recipe.parts if part.requires & _OF_ONE_TOKEN]
    if own.chunks == "sum" and parts:
        reads = " and ".join(sorted(parts[0].requires & _OF_ONE_TOKEN))
        raise InputError(
            f"`{own.field}.chunks` must be single with `{type(parts[0]).__name__}`, which reads {reads}, got sum: a chunk of "
            "several tokens has none of its own"
        )


def _require_prompts(own: AlignedTeacher, data: PromptDataModule) -> None:
    encoder = data.teacher_encoder
    theirs = None if encoder is None else encoder.tokenizer
    if theirs is None or theirs.get_vocab() != own.prompt_tokenizer.get_vocab():
        raise InputError(
            f"`data.teacher_tokenizer` must be that of `{own.field}`, got {getattr(theirs, 'name_or_path', None)!r}; leave it "
            "out, and the teacher's own is taken"
        )
