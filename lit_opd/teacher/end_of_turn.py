"""Special tokens by their role: which of one tokenizer stands for which of another."""

from __future__ import annotations

from typing import Any

from lit_opd.errors import InputError
from lit_opd.models.vocabulary import configured_stops

_QUESTION, _ANSWER = "1 + 1?", "two"  # any conversation shows what ends an answer


def end_of_turn(tokenizer: Any, field: str, given: str | None = None) -> int:
    """The token with which a model ends its answer.

    What its chat template writes after an answer, if the model stops there; else the tokenizer's end of text; else the one
    token that it stops at.

    Args:
        tokenizer: the model's, which names its folder.
        field: of the teacher, in errors.
        given: the token's string, as the user set it; None to find it.
    Raises:
        InputError: ``given`` is no token, or none is found.
    """
    if given is not None:
        if given not in tokenizer.get_vocab():
            raise InputError(f"`{field}.end_token` must be a token of the teacher's tokenizer, got {given!r}")
        return int(tokenizer.convert_tokens_to_ids(given))
    stops = configured_stops(tokenizer.name_or_path, tokenizer)
    for found in (_behind_an_answer(tokenizer, stops), tokenizer.eos_token_id):
        if found in stops:
            return int(found)
    if len(stops) == 1:
        return next(iter(stops))
    raise InputError(
        f"`{field}.end_token` must name the token that ends the teacher's answers: its chat template and tokenizer name none of "
        f"those it stops at, {sorted(tokenizer.convert_ids_to_tokens(sorted(stops)))}; set it"
    )


def _behind_an_answer(tokenizer: Any, stops: set[int]) -> int | None:
    """The first of ``stops`` that the chat template writes after an answer; None without one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template is a program and may refuse a conversation; the tokenizer's own end is asked next
        return None
    behind = text.rpartition(_ANSWER)[2]
    names = {stop: str(tokenizer.convert_ids_to_tokens(stop)) for stop in stops}
    found = {behind.find(name): stop for stop, name in names.items() if name in behind}
    return found[min(found)] if found else None


def roles(
    student: dict[int, str], teacher: dict[int, str], *, stops: tuple[int, ...], teacher_stops: set[int], end: int
) -> dict[int, int]:
    """The teacher's token for each special token of the student that it has one for.

    What ends the student's answers becomes what ends the teacher's: the token of the same name where the teacher stops there
    too, else its end of turn. Other special tokens become those of the same name.

    Args:
        student: special token strings by id.
        teacher: likewise.
        stops: at which the student's responses end.
        teacher_stops: at which the teacher's end.
        end: the teacher's end of turn.
    """
    named = {text: number for number, text in teacher.items()}
    found = {number: named[text] for number, text in student.items() if text in named}
    for stop in stops:
        if found.get(stop) not in teacher_stops:
            found[stop] = end
    return found
