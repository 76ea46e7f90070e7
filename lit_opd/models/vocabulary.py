"""Agreement of tokenizers: shared ids, and where a response ends."""

from __future__ import annotations

import warnings
from typing import Any

from lit_opd.errors import InputError
from lit_opd.models.loading import load_generation_config, named_ends

NAMED_DIFFERENCES = 10  # differing tokens listed in an error


def agree_vocabularies(
    student: Any, teacher: Any, *, student_rows: int, teacher_rows: int, field: str = "model.teacher.path"
) -> int:
    """Check that both tokenizers map the same tokens to the same ids.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer.
        student_rows: rows of the student's embedding, padding included.
        teacher_rows: rows of the teacher's embedding.
        field: names the teacher's setting in errors.
    Returns:
        number of leading vocabulary entries that count: up to the tokenizer's last id. Embedding rows beyond are padding.
    Raises:
        InputError: naming the first ten tokens that differ.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differing = [token for token in sorted(ours.keys() | theirs.keys()) if ours.get(token) != theirs.get(token)]
    if differing:
        shown = ", ".join(
            f"{token!r} (student {ours.get(token, 'absent')}, teacher {theirs.get(token, 'absent')})"
            for token in differing[:NAMED_DIFFERENCES]
        )
        raise InputError(
            f"`{field}` must share the student's vocabulary, but {len(differing)} tokens differ: {shown}; "
            "choose a teacher of the same tokenizer family"
        )
    used = num_used(student)
    if min(student_rows, teacher_rows) < used:
        raise InputError(
            f"`{field}`: the embeddings must cover the tokenizer's {used} ids, got student {student_rows} and teacher "
            f"{teacher_rows} rows; give models and tokenizers that were saved together"
        )
    return used


def num_used(tokenizer: Any) -> int:
    """Leading vocabulary entries up to the tokenizer's last id; embeddings are often padded beyond them."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def unused_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids below the last one that name no token: holes in the numbering, ascending."""
    used = set(tokenizer.get_vocab().values())
    return tuple(number for number in range(num_used(tokenizer)) if number not in used)


def configured_stops(path: str, tokenizer: Any) -> set[int]:
    """Token ids at which the model of ``path`` ends a response.

    All that its generation config, its config.json and the tokenizer name; transformers and servers differ in which of the
    three they read. Ids that the tokenizer does not have cannot be sampled; they are left out with a warning.

    Raises:
        InputError: an end token that is no id.
    """
    named = [
        ("generation_config.json", load_generation_config(path).eos_token_id),
        *(("config.json", ends) for ends in named_ends(path)),
        ("the tokenizer", tokenizer.eos_token_id),
    ]
    found: set[int] = set()
    for source, ends in named:
        ids = ends if isinstance(ends, list) else [ends]
        if not all(end is None or type(end) is int for end in ids):
            raise InputError(f"`eos_token_id` in {source} of {path!r} must be token ids, got {ids}; correct it")
        found |= set(ids) - {None}
    unknown = found - set(tokenizer.get_vocab().values())
    if unknown:
        warnings.warn(
            f"{path}: the end tokens {sorted(unknown)} are ids that its tokenizer does not have; no response ends there",
            stacklevel=2,
        )
    return found - unknown


def stop_warning(
    student: Any, stop_ids: tuple[int, ...], teacher: Any, *, role: str = "teacher", summed: bool = False
) -> str | None:
    """A warning where student and teacher end a response differently, as Base and Instruct models of one family do.

    A stop id that the teacher never writes makes it call every end of a response unlikely; an end of turn of the teacher's
    that does not stop the student makes it write on after its answers.

    Args:
        student: the student's tokenizer.
        stop_ids: ids that end a response of the student.
        teacher: the teacher's tokenizer, which names its folder.
        role: what the warning calls it.
        summed: the teacher scores a stop token with the mass of all stop tokens, so it need not write the student's.
    Returns:
        None where all stop ids are the teacher's too, and the end of turn of its tokenizer is among them.
    """
    theirs = configured_stops(teacher.name_or_path, teacher)
    if summed:
        if {*stop_ids, *theirs} == {*stop_ids[:1]}:
            return f"`model.{role}.stop_mass` sum has no effect: there is one stop token, {stop_ids[0]}"
        return _end_of_turn_warning(stop_ids, teacher, role=role)
    if not theirs or (set(stop_ids) <= theirs and teacher.eos_token_id in (None, *stop_ids)):
        return None
    ours = ", ".join(f"{student.convert_ids_to_tokens(stop)!r} ({stop})" for stop in sorted(stop_ids))
    other = ", ".join(f"{teacher.convert_ids_to_tokens(stop)!r} ({stop})" for stop in sorted(theirs))
    end = "none" if teacher.eos_token_id is None else f"{teacher.eos_token!r} ({teacher.eos_token_id})"
    return (
        f"the student stops at {ours}, but the {role} at {other} with the end of turn {end}: a stop that the {role} never "
        "writes is scored as unlikely; set `model.sampler.stop_token_ids` to ids that both end a response with, or score a stop "
        f"with the mass of all of them (`model.{role}.stop_mass` sum)"
    )


def _end_of_turn_warning(stop_ids: tuple[int, ...], teacher: Any, *, role: str) -> str | None:
    """A warning where the student does not stop at the teacher's end of turn, and so writes on after it."""
    if teacher.eos_token_id in (None, *stop_ids):
        return None
    return (
        f"the student does not stop at the {role}'s end of turn {teacher.eos_token!r} ({teacher.eos_token_id}), and would write "
        "on after it; add it to `model.sampler.stop_token_ids`"
    )
