"""Evaluation sets: problems with reference answers, rendered for the student, in a seeded order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_opd.answers import BOX
from lit_opd.errors import InputError
from lit_opd.evaluation.grading import is_integer, math_verify_available
from lit_opd.prompts.encoding import EncodedPrompt, PromptEncoder, encode_rows
from lit_opd.prompts.sources import DataSource, NotLoaded, PromptRow, read_prompts
from lit_opd.streams import stable_hash

PROMPT_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
_BOXED = "\\boxed"
_HUB_SPLITS = ("test", "validation", "train")  # tried in this order for a hub id given without a split
_LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True, eq=False)
class Problem:
    """One problem.

    Args:
        problem_id: its row id, unique in the set.
        text: the prompt as given to the student, before the chat template.
        reference: the answer to compare with.
        prompt: its tokens; the row id inside names the random streams.
        group: id of the first problem with the same tokens, mostly its own: repeats are one problem with more samples.
    """

    problem_id: str
    text: str
    reference: str
    prompt: EncodedPrompt
    group: str


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """A set to evaluate on.

    Args:
        name: part of metric names.
        problems: in an order drawn from the seed, so that the first n are a random subset.
    """

    name: str
    problems: tuple[Problem, ...]

    @property
    def integers(self) -> bool:
        """True when every reference is a whole number: then math-verify may be missing, see ``Grader.grade``."""
        return all(is_integer(problem.reference) for problem in self.problems)

    @property
    def repeats(self) -> bool:
        """True when a problem stands in more than one row."""
        return len({problem.group for problem in self.problems}) < len(self.problems)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(problem.prompt.ids) for problem in self.problems)


def load_sets(
    sources: Sequence[DataSource], encoder: PromptEncoder, *, suffix: str | None, seed: int
) -> list[EvaluationSet]:
    """Read, check and render every set.

    Args:
        sources: files, folders or hub ids; ``id_prefix``, else the file's or data set's name, names the set.
        encoder: how the student's prompts are rendered.
        suffix: added at the end of prompts that do not mention a box; None or empty for none.
        seed: of the order of the problems.
    Raises:
        InputError: a row is wrong or has no answer (file and line are named), two sets share a name, or answers need
            math-verify and it is not installed.
    """
    sets = [_load(source, encoder, suffix=suffix or "", seed=seed) for source in sources]
    names = [loaded.name for loaded in sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"`EarlyAIMEEvaluation.sets` must have different names, got {twice[0]!r} twice; "
            "set `id_prefix` of one of the sources"
        )
    for loaded in sets:
        _require_math_verify(loaded)
    return sets


def set_name(source: DataSource) -> str:
    """``id_prefix``, else the stem of the path, in letters that metric names can hold.

    >>> set_name(DataSource("HuggingFaceH4/aime_2024")), set_name(DataSource("data/aime25.jsonl"))
    ('aime_2024', 'aime25')
    """
    path = Path(source.path)
    name = path.stem if path.suffix in _LOCAL_SUFFIXES else path.name
    return re.sub(r"[^\w.-]+", "_", source.id_prefix or name)


def _load(source: DataSource, encoder: PromptEncoder, *, suffix: str, seed: int) -> EvaluationSet:
    name = set_name(source)
    rows = [_with_suffix(row, suffix) for row in _rows(source)]
    references = [_reference(row) for row in rows]
    streams = [replace(row, row_id=f"{name}/{row.row_id}") for row in rows]
    first: dict[tuple[int, ...], str] = {}
    encoded = encode_rows(streams, encoder, keep_rows=True)  # which an environment asks for
    problems = [
        Problem(row.row_id, _text(row), reference, prompt, first.setdefault(tuple(prompt.ids.tolist()), row.row_id))
        for row, reference, prompt in zip(rows, references, encoded, strict=True)
    ]
    _tell_repeats(name, len(rows), len(first))
    problems.sort(key=lambda problem: stable_hash(f"evaluation\0{seed}\0{problem.prompt.row_id}"))
    return EvaluationSet(name, tuple(problems))


def _tell_repeats(name: str, rows: int, different: int) -> None:
    if different < rows:
        rank_zero_info(
            f"evaluation set {name}: {different} different problems in {rows} rows; a repeated problem counts once, with the "
            f"samples of all its rows, and intervals are over the {different}"
        )


def _rows(source: DataSource) -> list[PromptRow]:
    """The rows; a hub id given as plain text is looked for in the test split first, then the others."""
    plain = replace(source, id_prefix=None)
    if plain != DataSource(source.path) or Path(source.path).expanduser().exists():
        return read_prompts(plain)
    if Path(source.path).suffix in _LOCAL_SUFFIXES:
        return read_prompts(plain)
    for split in _HUB_SPLITS[:-1]:
        try:
            return read_prompts(replace(plain, split=split))
        except NotLoaded:
            continue
    return read_prompts(replace(plain, split=_HUB_SPLITS[-1]))


def _reference(row: PromptRow) -> str:
    """The answer of a row, which must not be empty or an unfinished solution."""
    answer = (row.answer or "").strip()
    if not answer or BOX in answer:
        raise InputError(f"{row.where}: the answer is missing; give every problem of an evaluation set one")
    return answer


def _text(row: PromptRow) -> str:
    return row.prompt if isinstance(row.prompt, str) else "\n".join(message["content"] for message in row.prompt)


def _with_suffix(row: PromptRow, suffix: str) -> PromptRow:
    if not suffix or _BOXED in _text(row):
        return row
    if isinstance(row.prompt, str):
        return replace(row, prompt=row.prompt + suffix)
    last = row.prompt[-1]
    return replace(row, prompt=[*row.prompt[:-1], {**last, "content": last["content"] + suffix}])


def _require_math_verify(loaded: EvaluationSet) -> None:
    if not loaded.integers and not math_verify_available():
        example = next(problem for problem in loaded.problems if not is_integer(problem.reference))
        raise InputError(
            f"the evaluation set {loaded.name!r} has answers that are no integers (problem {example.problem_id!r}: "
            f"{example.reference[:60]!r}), which needs the package math-verify; pip install 'lit-opd[eval]'"
        )
