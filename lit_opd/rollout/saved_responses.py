"""Responses that were not sampled now, read from files: whole rollouts of a run, its predictions, or lines of texts."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from lit_opd.errors import InputError
from lit_opd.rollout.base import TextFacts
from lit_opd.saved_steps import load_rollout
from lit_opd.types import FinishReason, Rollout

STEPS, LINES = ".safetensors", ".jsonl"
ID_COLUMNS = ("id", "row_id")
FIELD = "ReplaySampler.paths"
SHOWN = 40  # characters of a prompt in a message


@dataclass(frozen=True, eq=False)
class SavedResponse:
    """One response.

    Args:
        row_id: of the prompt that it answers.
        ids: int64 [n], n >= 1, the end symbol included.
        finish_reason: of ``FinishReason``.
        where: file and line or row, for messages.
        logprobs: float32 [n] nats, the sampler's; None where nobody knows them.
        weights_version: optimizer steps the weights had seen that sampled it, of a continued one its first token; -1 for
            unknown.
        prompt: int64 [p], what it answers; None where the file does not say it.
    """

    row_id: str
    ids: NDArray[numpy.int64]
    finish_reason: int
    where: str
    logprobs: NDArray[numpy.float32] | None = None
    weights_version: int = -1
    prompt: NDArray[numpy.int64] | None = None


def read_responses(
    paths: Sequence[str], facts: TextFacts, *, response_column: str, id_column: str | None
) -> tuple[list[SavedResponse], int]:
    """The responses of all files, in order, and how many rows had no token to train on.

    Args:
        paths: files, or folders of saved rollouts.
        facts: of the run.
        response_column: of the text, in lines.
        id_column: of the row id, in lines; None: "id" or "row_id", else "FILE STEM-ROW", as for the data.
    Raises:
        InputError: naming file and line of what cannot be read.
    """
    found: list[SavedResponse] = []
    empty = 0
    for file in (file for path in paths for file in _files(path)):
        if file.suffix == STEPS:
            rollout, _ = load_rollout(file)
            responses = list(_of_rollout(rollout, file))
            empty += len(rollout) - len(responses)
        else:
            responses = list(_of_lines(file, facts, response_column, id_column))
        found += responses
    for response in found:
        _require_vocabulary(response, facts.vocabulary)
        _require_end(response, facts.stop_ids)
    return found, empty


def _files(path: str) -> list[Path]:
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(place.glob(f"*{STEPS}"), key=_natural)
        if not files:
            raise InputError(
                f"`{FIELD}` must be folders with rollouts (*{STEPS}), got {path!r} without any; write them with "
                "`RolloutSamples.save_rollouts_every`"
            )
        return files
    if place.suffix not in (STEPS, LINES) or not place.is_file():
        raise InputError(f"`{FIELD}` must be folders, {STEPS} or {LINES} files that exist, got {path!r}")
    return [place]


def _natural(path: Path) -> list[Any]:
    """step-2 before step-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _require_vocabulary(response: SavedResponse, vocabulary: int) -> None:
    if int(response.ids.max()) >= vocabulary or int(response.ids.min()) < 0:
        raise InputError(
            f"{response.where}: a response must hold ids in [0, {vocabulary}), got {int(response.ids.max())}; it was written "
            "with another tokenizer"
        )


def _require_end(response: SavedResponse, stops: tuple[int, ...]) -> None:
    """The student would have ended at the first stop id, and nowhere else of itself."""
    ends = numpy.flatnonzero(numpy.isin(response.ids, stops))
    stopped = response.finish_reason == int(FinishReason.STOP)
    if len(ends) and (ends[0] < len(response.ids) - 1 or not stopped):
        what = f"goes on after the stop id {response.ids[ends[0]]}" if stopped else "was cut, and has a stop id"
    elif stopped and not len(ends):
        what = f"ends with {response.ids[-1]}"
    else:
        return
    raise InputError(
        f"{response.where}: a response must end at the first of the run's stop ids {list(stops)}, or be cut before, got one that "
        f"{what}; set `model.sampler.stop_token_ids` as they were, or write it anew"
    )


# -- rollouts ----------------------------------------------------------------------------------------------------------


def _of_rollout(rollout: Rollout, file: Path) -> Iterator[SavedResponse]:
    if rollout.observed is not None:
        raise InputError(
            f"`{FIELD}` must hold responses of one turn, got the conversations of {file}: what an environment said would be "
            "trained on as the student's"
        )
    prompts, replayed = rollout.prompts, rollout.replayed
    greedy = rollout.provenance.temperature == 0.0  # its log-probs are of another distribution
    for row, row_id in enumerate(prompts.row_ids):
        mask = rollout.mask[row]
        if not mask.any():  # truncated rows that the run masked
            continue
        known = not greedy and (replayed is None or bool(replayed.known[row]))
        of_row = replayed is not None and bool(replayed.old[row])
        version = int(replayed.weights_version[row]) if of_row and replayed else rollout.provenance.weights_version
        if rollout.version is not None:
            version = int(rollout.version[row][mask].min())
        yield SavedResponse(
            row_id=row_id,
            ids=rollout.response_ids[row][mask].numpy(),
            finish_reason=int(rollout.finish_reason[row]),
            where=f"{file}: row {row}",
            logprobs=rollout.sampler_logprobs[row][mask].float().numpy() if known else None,
            weights_version=version,
            prompt=prompts.ids[row][prompts.mask[row]].numpy(),
        )


# -- lines -------------------------------------------------------------------------------------------------------------


def _of_lines(file: Path, facts: TextFacts, column: str, id_column: str | None) -> Iterator[SavedResponse]:
    index = -1
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        index += 1
        where = f"{file}:{number}"
        try:
            values = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deeply
            raise InputError(f"{where}: a line must be a JSON object, got {line[:40]!r}: {error}") from error
        if not isinstance(values, dict):
            raise InputError(f"{where}: a line must be a JSON object, got {type(values).__name__}")
        yield _of_line(values, where, facts, column=column, row_id=_row_id(values, id_column, file, index, where))
    if index < 0:
        raise InputError(f"{file}: the file must hold responses, got none")


def _row_id(values: dict[str, Any], column: str | None, file: Path, index: int, where: str) -> str:
    name = column or next((name for name in ID_COLUMNS if name in values), None)
    if name is None:
        return f"{file.stem}-{index}"
    value = values.get(name)
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise InputError(f"{where}: column {name!r} must be the id of a row of the data, got {value!r}")
    return str(value)


def _of_line(values: dict[str, Any], where: str, facts: TextFacts, *, column: str, row_id: str) -> SavedResponse:
    text, tokens, finish = values.get(column), values.get("tokens"), values.get("finish_reason", "stop")
    if isinstance(tokens, dict):
        raise InputError(
            f"{where}: a line of samples.jsonl is no response to train on, its text holds special tokens; save rollouts with "
            "`RolloutSamples.save_rollouts_every`"
        )
    if not isinstance(text, str) or not text:
        raise InputError(
            f"{where}: column {column!r} must be the response's text, got {text!r}; name it by `ReplaySampler.response_column`"
        )
    if text.encode("utf-8", "replace").decode() != text:
        raise InputError(
            f"{where}: column {column!r} must be text of whole characters, got a lone surrogate; correct the line"
        )
    names = {reason.name.lower(): reason for reason in FinishReason}
    if not isinstance(finish, str) or finish not in names:
        raise InputError(f"{where}: finish_reason must be one of {', '.join(names)}, or left out, got {finish!r}")
    if tokens is not None:
        ids = _told_ids(tokens, text, where, facts)
    else:
        ids = [*facts.encode(text), *([facts.end_id] if finish == "stop" else [])]
    if not ids:
        raise InputError(f"{where}: column {column!r} must be text of at least one token, got {text!r}")
    if row_id in facts.texts:
        _require_asked(values.get("prompt"), facts.texts[row_id], where, row_id=row_id)
    return SavedResponse(row_id, numpy.array(ids, numpy.int64), int(names[finish]), where)


def _require_asked(prompt: Any, asked: str, where: str, *, row_id: str) -> None:
    """The prompt of a line, where it says one, holds what the data's row asks; in whichever template."""
    turns = prompt if isinstance(prompt, list) else [{"content": prompt}]
    texts = [turn["content"] for turn in turns if isinstance(turn, dict) and isinstance(turn.get("content"), str)]
    given = _letters("".join(texts))
    if not given or _letters(asked) in given:
        return
    raise InputError(
        f"{where}: the response to {row_id!r} must be to the data's prompt, got one whose `prompt` does not hold its last user "
        f"turn {asked[:SHOWN]!r}; rows of another file, split or slice have the same ids: name an `id_column` with ids of their "
        "own, or delete the column `prompt` where the answers do belong to these rows"
    )


def _letters(text: str) -> str:
    """What decoding and templates leave of a text: no white space, one case, one form of each character."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _told_ids(tokens: Any, text: str, where: str, facts: TextFacts) -> list[int]:
    """Ids of a line of predictions.jsonl, where they are those of the text in the student's tokenizer."""
    told = [token if isinstance(token, dict) else {} for token in tokens] if isinstance(tokens, list) else []
    if any(token.get("turn") for token in told):
        raise InputError(
            f"{where}: `tokens` must be of a response of one turn, got those of a conversation, whose answers are not among them"
        )
    ids = [token.get("id") for token in told]
    fine = bool(ids) and all(isinstance(id_, int) and 0 <= id_ < facts.vocabulary for id_ in ids)
    if not fine or facts.decode(ids) != text:  # type: ignore[arg-type]  # ``fine`` says that all are ids
        raise InputError(
            f"{where}: `tokens` must be those of the response in the student's tokenizer, got others; delete the column to "
            "read the text"
        )
    return ids  # type: ignore[return-value]
