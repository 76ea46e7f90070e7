"""What only the teacher reads, made after sampling: of what the student wrote, and of what it was worth.

    sample -> reward -> what the teacher reads of each row -> scores

The student's ids, mask and response stay what they were: only ``PromptBatch.teacher_ids`` change, and rows that nothing can be
said of leave the denominators where that is asked for.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal, get_args

import numpy
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_opd.errors import InputError, is_finite, require
from lit_opd.prompts.encoding import PromptEncoder, left_padded
from lit_opd.prompts.layouts import Message
from lit_opd.prompts.sources import checked_prompt
from lit_opd.prompts.teacher_prompt import FIELD, TeacherPrompt, columns_of, filled, parsed, require_user_last
from lit_opd.types import DataRow, FinishReason, Rollout

Without = Literal["drop", "plain"]
TEMPLATE = "{prompt}\n\nA correct solution:\n\n{demonstration}\n\nNow solve it yourself."
_END_OF_THINKING = "</think>"
_MADE_UP = "a demonstration"  # stands for one while rows are checked before the run


@dataclass(frozen=True)
class Attempt:
    """One response the student sampled.

    Args:
        row: its data row: the columns, ``answer``, ``row_id``, and ``prompt``, the chat messages that the student read before it:
            those of an environment's ``reset`` where it gave others than the data.
        text: of the response, what an environment said between its turns included; special tokens and NUL left out.
        reward: None where the row has none.
        finished: the student ended it itself.
    """

    row: DataRow
    text: str
    reward: float | None
    finished: bool


class HindsightPrompt(ABC):
    """The teacher's prompt of a sampled response; a subclass in your own file is used by its class path.

    Class attributes say how it is used:

    - ``reads_reward``: it needs ``model.reward``, or an environment that gives rewards.
    - ``compares``: it needs more than one sample of a prompt.
    - ``without``: a row that it has no prompt for leaves the denominators ("drop"), or stays with the prompt that the student
      reads ("plain").
    - ``max_prompt_tokens``: a longer one counts as none.

    >>> class Reported(HindsightPrompt):
    ...     def render(self, attempt, peers):
    ...         return None if "2" in attempt.text else attempt.row.prompt[0]["content"] + " It is not odd."
    >>> row = DataRow(prompt=[{"role": "user", "content": "1 + 1?"}])
    >>> Reported().render(Attempt(row, "3", None, True), [])
    '1 + 1? It is not odd.'
    """

    reads_reward = False
    compares = False
    without: Without = "drop"
    max_prompt_tokens = 4096

    @abstractmethod
    def render(self, attempt: Attempt, peers: Sequence[Attempt]) -> str | list[Message] | None:
        """Text, chat messages that end with a user's turn, or None where there is nothing to say.

        Args:
            attempt: the response that the teacher will score.
            peers: the other samples of the same prompt, in order, without ``attempt``; none that an environment asked something
                else.
        """

    def trial(self, row: DataRow) -> str | list[Message]:
        """What a row's prompt would look like, to find what is wrong with the row before the run; the row's own by default.

        Raises:
            InputError: the row lacks something.
        """
        return [dict(message) for message in row.prompt]

    @property
    def columns(self) -> frozenset[str]:
        """Columns that are known to be read; a hint among them is not taken for the answer by its name."""
        return frozenset()


class PeerDemonstration(HindsightPrompt):
    """Another sample of the same prompt that was successful, before the teacher scores this one.

    The first successful one of the others in the order they were sampled; never the row itself, though one with the same text.
    Source: SDPO, arXiv 2601.20802; see docs/recipes/sdpo.md for what its code does. Groups are the ``data.samples_per_prompt``
    samples of one draw, which are on one rank.

    Args:
        template: text, or chat messages of such texts. ``{demonstration}`` is the other response, ``{prompt}`` the text of the
            last turn that the student reads, which a text replaces (earlier turns stay); other names are columns of the row.
        success: least reward of a demonstration.
        without: a row without one leaves every denominator ("drop", as in the source), or keeps the student's prompt ("plain").
        max_prompt_tokens: of what the teacher reads; a row whose prompt would be longer counts as one without, see
            ``train/hint_refused_fraction``.
        remove_thinking: leave out of a demonstration what stands before its last ``</think>``.
    Raises:
        InputError: a template without ``{demonstration}``, or a value outside its range.

    >>> peers = [Attempt(DataRow(), text, reward, True) for text, reward in (("3", 0.0), ("2", 1.0))]
    >>> row = DataRow(prompt=[{"role": "user", "content": "1 + 1?"}])
    >>> PeerDemonstration("{prompt} E.g. {demonstration}").render(Attempt(row, "4", 0.0, True), peers)
    '1 + 1? E.g. 2'
    """

    reads_reward = True
    compares = True

    def __init__(
        self,
        template: str | list[dict[str, str]] = TEMPLATE,
        success: float = 0.5,
        without: Without = "drop",
        max_prompt_tokens: int = 4096,
        remove_thinking: bool = True,
    ) -> None:
        name = type(self).__name__
        self.template, self.success, self.without = template, success, without
        self.max_prompt_tokens, self.remove_thinking = max_prompt_tokens, remove_thinking
        self._messages = parsed(template)
        named = "demonstration" in columns_of(self._messages)
        require(named, f"{name}.template", "a text or messages with {demonstration} in it", template)
        require(is_finite(success), f"{name}.success", "a finite number", success)
        require(without in get_args(Without), f"{name}.without", "drop or plain", without)
        is_count = isinstance(max_prompt_tokens, int) and not isinstance(max_prompt_tokens, bool)
        require(is_count and max_prompt_tokens >= 1, f"{name}.max_prompt_tokens", "an integer >= 1", max_prompt_tokens)

    @property
    def columns(self) -> frozenset[str]:
        """All that stand in braces, the two of its own left out."""
        return columns_of(self._messages) - {"demonstration", "prompt"}

    def demonstration(self, text: str) -> str:
        """What of a successful response is shown; empty for nothing."""
        return (text.rpartition(_END_OF_THINKING)[2] if self.remove_thinking else text).strip()

    def render(self, attempt: Attempt, peers: Sequence[Attempt]) -> str | list[Message] | None:
        """The template with the first demonstration, None without one."""
        successful = (peer for peer in peers if peer.reward is not None and peer.reward >= self.success)
        found = next(filter(None, (self.demonstration(peer.text) for peer in successful)), None)
        return None if found is None else self._filled(attempt.row, found)

    def trial(self, row: DataRow) -> str | list[Message]:
        """The template with a demonstration that is made up."""
        return self._filled(row, _MADE_UP)

    def _filled(self, row: DataRow, demonstration: str) -> str | list[Message]:
        *before, last = row.prompt
        found = filled(self._messages, {**row, "prompt": last["content"], "demonstration": demonstration})
        if not isinstance(found, str) or (not before and last["role"] == "user"):
            return found
        return [*map(dict, before), {**last, "content": found}]


class Trial(TeacherPrompt):
    """What a ``HindsightPrompt`` would make of the rows of the data, so that reading them finds what is wrong with them."""

    def __init__(self, own: HindsightPrompt) -> None:
        self.own = own

    @property
    def columns(self) -> frozenset[str]:
        """Those of the hindsight prompt."""
        return self.own.columns

    def render(self, row: Mapping[str, Any], prompt: str | list[Message]) -> str | list[Message]:
        """As before a run."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.own.trial(DataRow(row, prompt=messages))


@lru_cache
def warn_once(message: str) -> None:
    """Warn once a process."""
    rank_zero_warn(message)


@dataclass(frozen=True, eq=False)
class Hindsight:
    """Gives sampled responses what the teacher reads of them.

    Args:
        own: makes the prompts.
        student: decodes responses.
        teacher: renders and tokenises prompts.
        samples: rows that answer one draw of a prompt: neighbours, the first of its rows first.
        pad_id: fills the left of the teacher's prompts.
        keeps_rows: something else reads the data rows behind the prompts; else they go no further.
    """

    own: HindsightPrompt
    student: PromptEncoder
    teacher: PromptEncoder
    samples: int
    pad_id: int
    keeps_rows: bool = False

    def __call__(self, rollout: Rollout) -> tuple[Rollout, Tensor]:
        """The rollout with the teacher's prompts, and int64 [3]: rows, those with a prompt of their own, those whose was refused.

        Args:
            rollout: B rows as they were sampled, with their rewards.
        Raises:
            InputError: the class failed, or made what is no prompt; the row is named.
        """
        attempts = self._attempts(rollout)
        known: dict[str, list[int] | None] = {}
        draws = _draws(rollout.prompts.row_ids, self.samples)
        texts = [self._rendered(attempts, place, draw) for place, draw in enumerate(draws)]
        hints = [self._encoded(one.row, text, known) for one, text in zip(attempts, texts, strict=True)]
        has = [hint is not None for hint in hints]
        refused = sum(text is not None for text in texts) - sum(has)
        counts = torch.tensor([len(has), sum(has), refused], device=rollout.mask.device)
        told = self._told(rollout, hints)
        return told.silenced(numpy.array(has, dtype=bool)) if self.own.without == "drop" else told, counts

    def _attempts(self, rollout: Rollout) -> list[Attempt]:
        data = rollout.prompts.data
        assert data is not None  # the data module keeps them
        ids = rollout.response_ids.cpu()
        rows = [row[torch.from_numpy(read)].tolist() for row, read in zip(ids, rollout.layout.read, strict=True)]
        texts = self.student.tokenizer.batch_decode(rows, skip_special_tokens=True)
        rewards = [math.nan] * len(rollout) if rollout.reward is None else rollout.reward.tolist()
        ended = rollout.layout.finish_reason == int(FinishReason.STOP)
        return [
            Attempt(row, str(text).replace("\0", ""), None if math.isnan(reward) else reward, bool(end))
            for row, text, reward, end in zip(data, texts, rewards, ended, strict=True)
        ]

    def _rendered(self, attempts: Sequence[Attempt], place: int, draw: range) -> str | list[Message] | None:
        """What the teacher reads of one row, None where there is nothing to say; ``draw`` are the rows of its draw."""
        asked = attempts[place].row.prompt
        peers = [attempts[other] for other in draw if other != place and attempts[other].row.prompt == asked]
        where = f"row {attempts[place].row.row_id!r}"
        try:
            text = self.own.render(attempts[place], peers)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        except Exception as error:  # a class of the user's may raise anything
            name = type(self.own).__name__
            raise InputError(f"{where}: `{FIELD}` {name} failed ({type(error).__name__}: {error})") from error
        if text is None:
            return None
        require_user_last(text, where)
        return checked_prompt(text, where, "teacher_prompt")

    def _encoded(
        self, row: DataRow, text: str | list[Message] | None, known: dict[str, list[int] | None]
    ) -> list[int] | None:
        """Its ids; None where there are none, where they are too many, and where the chat template cannot take the text: what
        a student writes must not end the run."""
        if text is None:
            return None
        key = json.dumps([row.row_id, text])  # peers mostly read the same demonstration
        if key not in known:
            known[key] = self._ids(row, text)
        return known[key]

    def _ids(self, row: DataRow, text: str | list[Message]) -> list[int] | None:
        try:
            ids = self.teacher.encode(text, f"row {row.row_id!r} (teacher)", tools=row.tools)
        except InputError as error:
            warn_once(f"{error}; the row counts as one that there is nothing to say of (train/hint_refused_fraction)")
            return None
        return ids if len(ids) <= self.own.max_prompt_tokens else None

    def _told(self, rollout: Rollout, hints: Sequence[list[int] | None]) -> Rollout:
        """With what the teacher reads: the hint, and on rows without one what it would have read."""
        prompts, layout = rollout.prompts, rollout.layout
        own = prompts.teacher_ids is not None
        plain = (prompts.teacher_ids if prompts.teacher_ids is not None else prompts.ids).cpu()
        slots = layout.teacher if own and layout.teacher is not None else layout.prompt
        rows = [
            plain[row][torch.from_numpy(slots[row])] if hint is None else torch.tensor(hint)
            for row, hint in enumerate(hints)
        ]
        ids, mask = left_padded(rows, self.pad_id)
        device = prompts.ids.device
        read: dict[str, Any] = {"teacher_ids": ids.to(device), "teacher_mask": mask.to(device)}
        data = prompts.data if self.keeps_rows else None
        told = replace(rollout, prompts=replace(prompts, **read, data=data))
        return told.with_layout(replace(layout, teacher=mask.numpy()))


def _draws(row_ids: Sequence[str], samples: int) -> list[range]:
    """Of each row the rows of its draw: neighbours of one prompt, ``samples`` at a time. Never those of another prompt, however
    many rows a batch has of each."""
    found: list[range] = []
    for _, run in groupby(range(len(row_ids)), key=lambda row: row_ids[row]):
        rows = list(run)
        for first in range(rows[0], rows[-1] + 1, samples):
            draw = range(first, min(first + samples, rows[-1] + 1))
            found += [draw] * len(draw)
    return found
