"""Data on disk or on the hub -> validated ``PromptRow``: reading, columns, row filters. No tokenizer here.

Every message about a row begins with where it stands: "FILE:LINE" for JSON lines, "FILE: row N" (from 0) elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lit_opd import hub
from lit_opd.answers import last_box
from lit_opd.errors import InputError, first_line
from lit_opd.prompts.filters import MISSING, RowFilter, shown, value_at
from lit_opd.prompts.layouts import Message, column_names, holds, left_out, prompt_of
from lit_opd.prompts.splits import split_ranges
from lit_opd.prompts.teacher_prompt import TeacherPrompt, rendered
from lit_opd.prompts.tools import CALLS, KEPT_WITH_MESSAGE, Schema, checked_calls, row_tools, without_padding
from lit_opd.shipped import shown_path

PROMPT_COLUMNS = (
    "prompt",
    "problem",
    "question",
    "Problem",
    "Question",
    "instruction",
    "messages",
    "conversations",
    "conversation",
    "input",
    "query",
)
ANSWER_COLUMNS = (
    "answer",
    "Answer",
    "ground_truth",
    "expected_answer",
    "final_answer",
    "reward_model.ground_truth",  # verl
    "reward_spec.ground_truth",
    "extra_info.answer",
    "extra_info.ground_truth",
    "solution",
    "Solution",
)
WORKED_SOLUTIONS = ("solution", "Solution")
ID_COLUMNS = ("id",)
ROW_NUMBER = "#"  # as `id_column`: name rows by their number even where the data has an id column
ROLES = ("system", "developer", "user", "assistant", "tool")
DATA_EXTRA = "pip install 'lit-opd[data]'"
_FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
_FILE_SPLIT = "train"  # what a file counts as
_UTF8_BOM = b"\xef\xbb\xbf"
_GSM8K_MARK = "####"
# control characters but tab and line ends; bidirectional embeddings, overrides and isolates
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

Filters = str | list[str] | None


@dataclass(frozen=True)
class DataSource:
    """One file, folder or hub data set.

    Args:
        path: a .jsonl, .json (lines) or .parquet file, a folder, or a hub data set id.
        weight: share of the training prompts, relative to the other sources; None (in all sources) = as many as it has
            rows, so that the sources are concatenated.
        filter: row filter, or several that must all hold, e.g. ``difficulty >= 6``.
        split: of a folder or hub data set, or a part of it such as "train[:80%]". A file, and a saved data set that is no
            dictionary of splits, is one split, "train", of which this may take a part.
        name: configuration of a hub data set, e.g. "main"; files and saved data sets have none.
        prompt_column: column of the prompt; None: the data module's, or the first usual name.
        answer_column: column of the reference answer; None likewise.
        id_column: column of unique row ids; None likewise; "#" for row numbers.
        id_prefix: row ids become "prefix/id"; needed where two sources would share ids.
    """

    path: str
    weight: float | None = None
    filter: str | list[str] | None = None
    split: str = "train"
    name: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    id_column: str | None = None
    id_prefix: str | None = None


@dataclass(frozen=True)
class ColumnNames:
    """The columns to read, inside objects with dots; None is looked for among the usual names (``teacher``: there is none)."""

    prompt: str | None = None
    answer: str | None = None
    id: str | None = None
    teacher: str | None = None


@dataclass(frozen=True)
class PromptRow:
    """One validated row, not yet rendered.

    Args:
        row_id: unique name.
        prompt: plain text, or chat messages that end with a user or tool turn.
        answer: reference answer, None where the data has none or an empty one.
        teacher: name of the teacher that scores the row, None for the only one.
        where: "FILE:LINE" for messages.
        teacher_prompt: what the teacher reads instead, in the forms of ``prompt``; None where it reads the same.
        tools: JSON schemas that the row names, None where it names none.
        columns: of the row, as they were read.
    """

    row_id: str
    prompt: str | list[Message]
    answer: str | None = None
    teacher: str | None = None
    where: str = "prompt"
    teacher_prompt: str | list[Message] | None = field(default=None, repr=False)  # it may hold what must not be shown
    tools: list[Schema] | None = field(default=None, repr=False)
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def messages(self) -> list[Message]:
        """The prompt as chat messages."""
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else list(self.prompt)


@dataclass(frozen=True)
class _RawRow:
    where: str
    index: int  # number of the row in its source, from 0, filtered rows counted
    values: dict[str, Any]


def read_prompts(
    source: str | DataSource,
    columns: ColumnNames | None = None,
    *,
    filters: Filters = None,
    teacher_prompt: TeacherPrompt | None = None,
) -> list[PromptRow]:
    """The rows of one source, in order, that pass its filters.

    Args:
        source: path, hub id, or a ``DataSource``, whose own columns come before ``columns``.
        columns: configured column names.
        filters: row filters for all sources, and-ed with the source's own.
        teacher_prompt: makes what the teacher reads of a row; None where it reads the student's prompt.
    Returns:
        At least one row; ids are unique within the source.
    Raises:
        InputError: naming file and line (or row) of what is wrong.
    """
    source = DataSource(source) if isinstance(source, str) else source
    raw = list(_read_raw(source))
    if not raw:
        raise InputError(f"{source.path}: the data is empty; give a file with at least one row")
    found = column_names([row.values for row in raw])
    columns = columns or ColumnNames()
    names = _resolved_columns(source, columns, raw, found)
    joins = source.prompt_column is None and columns.prompt is None
    tests = [RowFilter.parse(text) for text in _as_list(filters) + _as_list(source.filter)]
    kept = [row for row in raw if all(test.keeps(row.values, row.where, found) for test in tests)]
    rows = [_prompt_row(row, names, source, joins=joins) for row in kept]
    _report(source, names, tests, rows, total=len(raw))
    require_unique_ids(rows)
    if teacher_prompt is not None:
        guessed = names.answer if source.answer_column is None and columns.answer is None else None
        rows = _with_teacher_prompts(source, kept, rows, teacher_prompt, guessed=guessed)
    _warn_of_invisible(source, rows)
    _warn_of_left_out(source, kept, names, joins=joins)
    return rows


def _with_teacher_prompts(
    source: DataSource, raw: Sequence[_RawRow], rows: Sequence[PromptRow], own: TeacherPrompt, *, guessed: str | None
) -> list[PromptRow]:
    """``rows`` with what the teacher reads of each.

    Args:
        source: of the rows.
        raw: the same rows as they were read.
        rows: checked.
        own: makes the teacher's prompts.
        guessed: the answer column where nobody named it. A hint in it is an answer only where it ends in one: a worked solution
            would stand as the row's answer in the samples otherwise.
    """
    found, hidden = [], 0
    worked = guessed in WORKED_SOLUTIONS and guessed in own.columns
    for values, row in zip((row.values for row in raw), rows, strict=True):
        text = rendered(own, values, row.prompt, row.where)
        given = checked_prompt(text, row.where, "teacher_prompt")
        is_hint = worked and row.answer is not None and row.answer == value_at(values, str(guessed))
        hidden += is_hint
        found.append(replace(row, teacher_prompt=given, answer=None if is_hint else row.answer))
    if hidden:
        rank_zero_warn(
            f"{source.path}: {hidden} of {len(rows)} rows have no answer to be graded by: {guessed!r} holds the teacher's hint "
            "and no boxed answer; name the `answer_column`"
        )
    return found


def require_unique_ids(rows: Sequence[PromptRow]) -> None:
    """Raise when two rows share an id; the message names both places."""
    seen: dict[str, str] = {}
    for row in rows:
        if row.row_id in seen:
            raise InputError(
                f"{row.where}: row id {row.row_id!r} was already used at {seen[row.row_id]}; choose a unique "
                f"`id_column`, `id_column: '{ROW_NUMBER}'` for row numbers, or `id_prefix` in the sources"
            )
        seen[row.row_id] = row.where


def _warn_of_invisible(source: DataSource, rows: Sequence[PromptRow]) -> None:
    """Control and direction characters are legitimate in some data and stay; a reader who sees none should know of them."""
    found = [(row, invisible) for row in rows if (invisible := _invisible(row.prompt))]
    if found:
        row, invisible = found[0]
        rank_zero_warn(
            f"{source.path}: {len(found)} of {len(rows)} prompts hold control or bidirectional characters, kept as they are "
            f"(first: {row.where}, U+{ord(invisible):04X})"
        )


def _warn_of_left_out(source: DataSource, rows: Sequence[_RawRow], names: ColumnNames, *, joins: bool) -> None:
    """A prompt without its passage, choices or input cannot be answered, and looks like one."""
    assert names.prompt is not None
    first: dict[str, str] = {}
    for row in rows:
        for column in left_out(row.values, names.prompt, joins=joins):
            if column != names.answer:
                first.setdefault(column, row.where)
    if first:
        listed = ", ".join(f"{column!r} (first: {where})" for column, where in first.items())
        rank_zero_warn(
            f"{source.path}: the prompt is column {names.prompt!r} alone; it holds nothing of {listed}. Write what belongs "
            "to the prompt into that column, or name another `prompt_column`"
        )


def _invisible(prompt: str | list[Message]) -> str | None:
    """The first control or direction character, white space aside."""
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    found = next((match for text in texts if (match := _INVISIBLE.search(text))), None)
    return found[0] if found else None


def _report(
    source: DataSource, names: ColumnNames, tests: Sequence[RowFilter], rows: Sequence[PromptRow], *, total: int
) -> None:
    rules = " and ".join(test.text for test in tests) or "no filter"
    kept, unanswered = len(rows), sum(row.answer is None for row in rows)
    ungraded = f" ({unanswered} rows without an answer, not graded)" if names.answer and unanswered else ""
    rank_zero_info(
        f"{shown_path(source.path)}: {kept} of {total} rows kept, {total - kept} filtered out ({rules}); "
        f"prompt column {names.prompt!r}, answer column {names.answer!r}{ungraded}"
    )
    if not kept:
        raise InputError(f"{source.path}: the filter {rules!r} keeps none of {total} rows; relax it")


# ---------------------------------------------------------------------------------------------------------- reading


def _read_raw(source: DataSource) -> Iterator[_RawRow]:
    path = Path(source.path).expanduser()
    if not source.path.strip():
        raise InputError("`DataSource.path` must be a file, a folder or a hub id, got an empty string")
    if path.is_dir():
        return _read_folder(source, path)
    if path.suffix in _FILE_SUFFIXES:
        if not path.is_file():
            raise InputError(
                f"{source.path}: no such file; check the path (relative paths start at the current folder)"
            )
        return _part_of_file(source, _read_parquet(path) if path.suffix == ".parquet" else _read_json_lines(path))
    if path.is_file():
        raise InputError(f"{source.path}: must be one of {', '.join(_FILE_SUFFIXES)}, a folder or a hub id; convert it")
    return _read_hub(source)


def _part_of_file(source: DataSource, read: Iterator[_RawRow]) -> Iterator[_RawRow]:
    """The rows that the split takes; they keep their numbers in the file."""
    _refuse_name(source, "a file")
    rows = list(read)
    ranges = split_ranges(source.split, {_FILE_SPLIT: len(rows)}, source.path, "give the file of that split as `path`")
    return (rows[index] for _, taken in ranges for index in taken)


def _refuse_name(source: DataSource, kind: str) -> None:
    if source.name is not None:
        raise InputError(
            f"{source.path}: `DataSource.name` must be null for {kind}, got {source.name!r}; "
            "leave it out, or give the path of that configuration"
        )


def _read_json_lines(path: Path) -> Iterator[_RawRow]:
    try:
        with path.open("rb") as lines:
            index = 0
            for number, line in enumerate(lines, start=1):
                text = (line.removeprefix(_UTF8_BOM) if number == 1 else line).strip()
                if text:
                    where = f"{path}:{number}"
                    yield _RawRow(where, index, _json_object(text, where))
                    index += 1
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); check its permissions and the disk") from error


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        hint = "; the file looks like one JSON array, write one object a line" if line[:1] == b"[" else ""
        raise InputError(f"{where}: broken JSON ({error}){hint}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be a JSON object, got {shown(value)}; write one object a line")
    return value


def _read_parquet(path: Path) -> Iterator[_RawRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: reading Parquet needs the package pyarrow; {DATA_EXTRA}") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for index, row in enumerate(rows):
                yield _RawRow(f"{path}: row {index}", index, without_padding(row))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable Parquet file ({first_line(error)})") from error


def _datasets(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{path}: folders and hub data sets need the package datasets; {DATA_EXTRA}, or give a .jsonl file"
        ) from error
    return datasets


def _read_folder(source: DataSource, path: Path) -> Iterator[_RawRow]:
    datasets = _datasets(source.path)
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if saved:
        _refuse_name(source, "a saved data set")
    try:
        if saved:
            data = _part_of_saved(source, datasets.load_from_disk(str(path)))
        else:
            data = datasets.load_dataset(str(path), source.name, split=source.split)
    except InputError:
        raise
    except Exception as error:  # whatever a reader of a third party raises about a user's folder is the user's news
        raise InputError(
            f"{source.path}: no data set could be loaded from this folder, split {source.split!r} "
            f"({first_line(error)}); give one of its files (.jsonl, .parquet) instead"
        ) from error
    return _read_table(source, data)


def _part_of_saved(source: DataSource, data: Any) -> Any:
    """The split that is named, or the part of it; one data set alone is "train", and what it was saved as."""
    sets = data if isinstance(data, dict) else {_FILE_SPLIT: data, str(data.split or _FILE_SPLIT): data}
    if source.split in sets:
        return sets[source.split]
    sizes = {name: len(rows) for name, rows in sets.items()}
    ranges = split_ranges(source.split, sizes, source.path, "name a split that was saved")
    return _datasets(source.path).concatenate_datasets([sets[name].select(taken) for name, taken in ranges])


class NotLoaded(InputError):
    """A hub id whose split could not be loaded: another split may be there."""


def _read_hub(source: DataSource) -> Iterator[_RawRow]:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path):
        raise InputError(f"{source.path}: no such file or folder; check the path (relative ones start here)")
    hub.silence()  # once, before its client tries again and again
    datasets = _datasets(source.path)
    try:
        data = datasets.load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # network, authorisation, missing split: one message for all of them
        reason, remedy = hub.failure(first_line(error), "data set")
        raise NotLoaded(
            f"{source.path}: neither a local file or folder, nor could split {source.split!r} be loaded from the "
            f"hub ({reason}); {remedy}"
        ) from error
    return _read_table(source, data)


def _read_table(source: DataSource, data: Any) -> Iterator[_RawRow]:
    for index, row in enumerate(data):
        yield _RawRow(f"{source.path}[{source.split}]: row {index}", index, without_padding(row))


# ---------------------------------------------------------------------------------------------------------- columns


def _resolved_columns(
    source: DataSource, configured: ColumnNames, raw: Sequence[_RawRow], found: list[str]
) -> ColumnNames:
    def column(field: str, wanted: str | None, usual: Sequence[str]) -> str | None:
        return _column(source, field, wanted, usual, raw, found)

    wanted_id = source.id_column or configured.id
    names = ColumnNames(
        prompt=column("prompt_column", source.prompt_column or configured.prompt, PROMPT_COLUMNS),
        answer=column("answer_column", source.answer_column or configured.answer, ANSWER_COLUMNS),
        id=None if wanted_id == ROW_NUMBER else column("id_column", wanted_id, ID_COLUMNS),
        teacher=column("teacher_column", configured.teacher, ()),
    )
    if names.prompt is None:
        raise InputError(
            f"{source.path}: no prompt column found among {', '.join(PROMPT_COLUMNS)}; "
            f"set `prompt_column` to one of the columns found: {', '.join(found) or 'none'}"
        )
    return names


def _column(
    source: DataSource,
    field: str,
    wanted: str | None,
    usual: Sequence[str],
    raw: Sequence[_RawRow],
    found: list[str],
) -> str | None:
    """``wanted``, checked; or the first usual name under which some row holds something, else that is there at all."""
    if wanted is None:
        filled = (name for name in usual if any(holds(value_at(row.values, name)) for row in raw))
        return next(filled, next((name for name in usual if name in found), None))
    if wanted not in found and all(value_at(row.values, wanted) is MISSING for row in raw):
        raise InputError(
            f"{source.path}: `PromptDataModule.{field}` must be a column of the data, got {wanted!r}; "
            f"columns found: {', '.join(found) or 'none'}"
        )
    return wanted


def _prompt_row(row: _RawRow, names: ColumnNames, source: DataSource, *, joins: bool) -> PromptRow:
    assert names.prompt is not None  # _resolved_columns raised otherwise
    if value_at(row.values, names.prompt) is MISSING:
        raise InputError(f"{row.where}: column {names.prompt!r} is missing; columns found: {', '.join(row.values)}")
    teacher = value_at(row.values, names.teacher) if names.teacher else None
    if names.teacher and not isinstance(teacher, str):
        wrong = None if teacher is MISSING else teacher
        raise InputError(f"{row.where}: {names.teacher!r} must name a teacher, got {shown(wrong)}")
    prompt = prompt_of(row.values, names.prompt, row.where, joins=joins)
    return PromptRow(
        row_id=_row_id(row, names.id, source),
        prompt=checked_prompt(prompt, row.where, names.prompt),
        answer=_answer(value_at(row.values, names.answer), row.where, names.answer) if names.answer else None,
        teacher=teacher,
        where=row.where,
        tools=row_tools(row.values, row.where),
        columns=row.values,
    )


def _row_id(row: _RawRow, column: str | None, source: DataSource) -> str:
    prefix = f"{source.id_prefix}/" if source.id_prefix else ""
    if column is None:
        return f"{prefix}{Path(source.path).stem}-{row.index}"
    value = value_at(row.values, column)
    value = None if value is MISSING else value
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise InputError(
            f"{row.where}: id column {column!r} must hold text or a whole number, got {shown(value)}; "
            f"choose another `id_column`, or '{ROW_NUMBER}' for row numbers"
        )
    return prefix + (_checked_text(value, row.where, column) if isinstance(value, str) else str(value))


def _answer(value: Any, where: str, column: str) -> str | None:
    """The reference, None where there is none that a response could equal: null, NaN, nothing but white space, an empty box,
    one that is not closed, nothing after the last "####"."""
    if value is None or value is MISSING or value != value:  # NaN
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise InputError(
            f"{where}: answer column {column!r} must hold text or a number, got {shown(value)}; name another `answer_column`, "
            f"or a part of it with a dot (reward_model.ground_truth, {column}.0)"
        )
    text = _checked_text(value, where, column)
    boxed, unclosed = last_box(text)
    if boxed is None and not unclosed:
        cut = text.rsplit(_GSM8K_MARK, 1)[-1].strip() if _GSM8K_MARK in text else text
    else:  # a worked solution: the grader wants what it ends in
        cut = (boxed or "").strip()
    return cut if cut.strip() else None


def checked_prompt(value: Any, where: str, column: str = "prompt") -> str | list[Message]:
    """Plain text, or chat messages without a trailing assistant turn (which is what the student has to write).

    Raises:
        InputError: for another type, an empty text, NUL, lone surrogates, unknown roles, broken tool calls, no user turn.
    """
    if isinstance(value, str):
        return _checked_text(value, where, column, allow_empty=False)
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where}: {column!r} must hold text or a list of chat messages, got {shown(value)}")
    messages = [_checked_message(message, f"{where}: message {n} of {column!r}") for n, message in enumerate(value)]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise InputError(f"{where}: {column!r} must hold a conversation in which a user turn awaits its answer")
    return messages


def _checked_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f"{where} must be an object with `role` and `content`, got {shown(message)}")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise InputError(f"{where}: role must be one of {', '.join(ROLES)}, got {shown(role)}")
    beside: dict[str, Any] = {name: message[name] for name in KEPT_WITH_MESSAGE if isinstance(message.get(name), str)}
    if message.get(CALLS):
        if role != "assistant":
            raise InputError(f"{where}: only an assistant's message may have tool calls, got one of role {role}")
        beside[CALLS], content = checked_calls(message[CALLS], where), content or ""
    if not isinstance(content, str):
        raise InputError(f"{where}: content must be text, got {shown(content)}")
    return {"role": role, "content": _checked_text(content, where, "content", allow_empty=role != "user"), **beside}


def _checked_text(text: str, where: str, column: str, *, allow_empty: bool = True) -> str:
    if "\0" in text:
        raise InputError(f"{where}: NUL character in {column!r}; remove it from the data")
    if not allow_empty and not text.strip():
        raise InputError(f"{where}: {column!r} is empty; remove the row or fill it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: lone surrogate (half a character) in {column!r} at {error.start}; remove it from the data"
        ) from error
    return text


def _as_list(value: Filters) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
