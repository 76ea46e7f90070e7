"""Text or chat messages -> token ids -> left-padded ``PromptBatch``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_opd.errors import InputError
from lit_opd.prompts.filters import shown
from lit_opd.prompts.sources import Message, PromptRow
from lit_opd.prompts.special_tokens import SpecialTokens
from lit_opd.prompts.templates import Skeleton, Template, Tools
from lit_opd.prompts.tools import texts_beside
from lit_opd.streams import row_key
from lit_opd.types import DataRow, PromptBatch

ChatTemplate = bool | Literal["auto"]
SpecialTokensInText = Literal["escape", "refuse", "allow"]
_OURS = ("conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors")


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """One prompt as token ids.

    Args:
        row_id: unique name.
        ids: int32 [length], at least one token.
        answer: reference answer or None.
        teacher: name of the teacher that scores the row, None for the only one.
        teacher_ids: int32 [length'] where the teacher reads a prompt or template of its own, else None.
        data: the data row, where something asks for it.
    """

    row_id: str
    ids: Tensor
    answer: str | None = None
    teacher: str | None = None
    teacher_ids: Tensor | None = None
    data: DataRow | None = None


@dataclass(frozen=True, eq=False)
class PromptEncoder:
    """Renders a prompt the way one model expects it and tokenises it.

    With a chat template, the ids are those of ``tokenizer.apply_chat_template(messages, add_generation_prompt=True,
    **template_options)``. A text in the data that spells a special token's string changes none of the template's own tokens:
    it is rendered again with its characters marked (``Template.traced``), and what is the prompt's is encoded as text
    (``SpecialTokens.encode``). A rendering that lacks a message, the system prompt or the generation prompt is an error.
    Without a template the ids are the text's, after the begin token where the tokenizer adds one; an end or separator that
    it adds is left out. Control and bidirectional characters pass through unchanged.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat_template: True: needed; False: plain text with the tokenizer's own BOS; "auto": used when there is one.
        template_options: variables of the template, e.g. {"enable_thinking": False}.
        system_prompt: put before conversations that have no system message of their own; it is trusted, special
            tokens in it stay control tokens.
        special_tokens_in_text: "escape"; "refuse" to make such a text an error; "allow" to let the data write control tokens,
            and to take texts that are rendered already as they are.
        owner: "Class" or "Class.teacher", put before field names in messages.
        tools: JSON schemas that the template shows, for prompts that name none themselves.
    """

    tokenizer: Any
    chat_template: ChatTemplate = "auto"
    template_options: Mapping[str, Any] | None = None
    system_prompt: str | None = None
    special_tokens_in_text: SpecialTokensInText = "escape"
    owner: str = field(default="PromptEncoder.", repr=False)
    tools: Tools = field(default=None, repr=False)
    _said: set[str] = field(default_factory=set, init=False, repr=False)  # warnings that were given

    def __post_init__(self) -> None:
        if self.chat_template not in (True, False, "auto"):
            raise self._error("chat_template", "True, False or 'auto'", self.chat_template)
        if self.special_tokens_in_text not in get_args(SpecialTokensInText):
            raise self._error("special_tokens_in_text", "'escape', 'refuse' or 'allow'", self.special_tokens_in_text)
        if self.chat_template is True and not self._source:
            raise self._error(
                "chat_template",
                "False or 'auto' for a tokenizer without a chat template",
                True,
                "or use another tokenizer",
            )
        self._check_options()

    def _check_options(self) -> None:
        options = dict(self.template_options or {})
        if reserved := sorted(set(options) & set(_OURS)):
            raise self._error("template_options", "variables of the template", reserved, "these are set by the encoder")
        if self.renders:
            unknown = sorted(name for name in options if name != "chat_template" and name not in self._source)
            if unknown:
                rank_zero_warn(f"`{self.owner}template_options`: the chat template never reads {', '.join(unknown)}")
        elif self.system_prompt is not None:
            raise self._error(
                "system_prompt", "None without a chat template", self.system_prompt, "put it into the data"
            )
        elif options:
            rank_zero_warn(f"`{self.owner}template_options` has no effect without a chat template, got {options}")

    def _error(self, name: str, wanted: str, value: object, remedy: str = "") -> InputError:
        end = f"; {remedy}" if remedy else ""
        return InputError(f"`{self.owner}{name}` must be {wanted}, got {shown(value)}{end}")

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            rank_zero_warn(message)

    @cached_property
    def _source(self) -> str:
        """The template's source, empty without one."""
        template = (self.template_options or {}).get("chat_template") or getattr(self.tokenizer, "chat_template", None)
        return str(template or "")

    @property
    def renders(self) -> bool:
        """Whether a chat template is used."""
        return self.chat_template is not False and bool(self._source)

    @cached_property
    def special(self) -> SpecialTokens:
        """Those of the tokenizer."""
        return SpecialTokens(self.tokenizer)

    @cached_property
    def template(self) -> Template:
        """What prompts are rendered with, where they are."""
        if (self.template_options or {}).get("chat_template"):
            name = f"the chat template of `{self.owner}template_options`"
        else:
            name = f"the chat template of {getattr(self.tokenizer, 'name_or_path', '') or 'the tokenizer'}"
        return Template(self.tokenizer, self.template_options, self.system_prompt, special=self.special, name=name)

    def encode(self, prompt: str | Sequence[Message], where: str = "prompt", *, tools: Tools = None) -> list[int]:
        """Token ids of one prompt, ready for generation.

        Args:
            prompt: plain text, or chat messages that end with a user turn.
            where: "FILE:LINE" for messages.
            tools: JSON schemas that the template shows; None for the encoder's own.
        Raises:
            InputError: the template raises or leaves a part of the prompt out, nothing is left to encode, or a special token's
                string is to be refused.
        """
        tools = self.tools if tools is None else tools
        if self.special_tokens_in_text == "refuse":
            self._refuse_special(prompt, where)
        self._refuse_beside(prompt, tools, where)
        ids = self._rendered(prompt, where, tools) if self.renders else self._plain(prompt, where)
        if not ids:
            raise InputError(f"{where}: the prompt has no tokens after rendering; check the text and the chat template")
        return [int(token) for token in ids]

    def _refuse_special(self, prompt: str | Sequence[Message], where: str) -> None:
        for text in [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]:
            if match := self.special.pattern.search(text):
                raise InputError(
                    f"{where}: the prompt must not hold a special token's string, got {match[0]!r}; remove it, or set "
                    "`special_tokens_in_text: escape` to keep it as ordinary text"
                )

    def _refuse_beside(self, prompt: str | Sequence[Message], tools: Tools, where: str) -> None:
        """Tools need a template; special tokens that they spell look like the template's own."""
        messages = [] if isinstance(prompt, str) else prompt
        if not self.renders and tools:
            raise InputError(
                f"{where}: tools need a chat template, and the tokenizer has none (or `chat_template` is False); use another "
                "tokenizer, or leave the column `tools` out"
            )
        if self.special_tokens_in_text == "allow":
            return
        for text in texts_beside(messages, tools):
            if match := self.special.pattern.search(text):
                raise InputError(
                    f"{where}: tools and their calls must not hold a special token's string, got {match[0]!r}; remove it from "
                    "the row"
                )

    # -- without a template ------------------------------------------------------------------------------------------

    def _plain(self, prompt: str | Sequence[Message], where: str) -> list[int]:
        if not isinstance(prompt, str):
            raise InputError(
                f"{where}: chat messages need a chat template, and the tokenizer has none (or `chat_template` is "
                "False); give plain text or another tokenizer"
            )
        if self.special_tokens_in_text == "allow":
            return self._as_it_is(prompt)
        if match := self.special.pattern.match(prompt.lstrip()):
            self._warn_once(
                "plain",
                f"{where}: the prompt begins with {match[0]!r}, which is kept as text; if it is rendered already, set "
                "`special_tokens_in_text: allow`",
            )
        ids = self.special.ordinary(prompt)
        return [*self.special.begin, *ids] if ids else []

    def _as_it_is(self, text: str) -> list[int]:
        """Control tokens in ``text`` count; the begin token is added where the tokenizer adds one and the text has none."""
        ids, begin = self._with_control(text), self.special.begin
        return ids if not ids or ids[: len(begin)] == begin else [*begin, *ids]

    def _with_control(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # -- with a template ---------------------------------------------------------------------------------------------

    def _rendered(self, prompt: str | Sequence[Message], where: str, tools: Tools) -> list[int]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        skeleton = self.template.skeleton(("user",))
        if isinstance(prompt, str) and skeleton is not None and self._is_rendered(prompt, skeleton, where):
            begins = self._with_control(skeleton.text)[: len(self.special.begin)] == self.special.begin
            return self._as_it_is(prompt) if begins else self._with_control(prompt)
        text = self._apply_template(messages, where, tools)
        ids = self._with_control(text)
        if not ids:
            return []
        skeleton = self.template.check(messages, where)
        if warning := self.template.require_prompt(messages, text, where, tools=tools):
            self._warn_once("words", warning)
        if self.special_tokens_in_text == "allow":
            return ids
        hostile = any(self.special.pattern.search(message["content"]) for message in messages)
        own = None if skeleton is None else self.special.sequence(skeleton.text)
        if hostile or (own is not None and len(own) != sum(token in self.special.ids for token in ids)):
            return self._escaped(messages, text, own, where, tools)
        return ids

    def _apply_template(self, messages: Sequence[Message], where: str, tools: Tools) -> str:
        try:
            return self.template.render(messages, tools=tools)
        except Exception as error:  # a template is a program of the tokenizer's author and may raise anything
            raise InputError(
                f"{where}: the chat template failed ({type(error).__name__}: {error}); "
                "change the row, `template_options`, or set `chat_template: false`"
            ) from error

    def _escaped(
        self, messages: Sequence[Message], text: str, own: list[str] | None, where: str, tools: Tools
    ) -> list[int]:
        """Ids of ``text`` in which only the template's own special tokens count; ``own`` are those it has for other prompts."""
        traced = self.template.traced(messages, text, tools=tools)
        if traced is not None:
            return self.special.encode(traced.parts, where)
        if self.special.sequence(text) != own:
            raise InputError(
                f"{where}: {self.template.name} changes the text, so that special token strings in it cannot be distinguished "
                "from the template's; remove them from the row or set `special_tokens_in_text: allow`"
            )
        return self.special.encode(self.special.parts(text), where)

    def _is_rendered(self, prompt: str, skeleton: Skeleton, where: str) -> bool:
        """Whether the template need not be applied, because the data did; only where the data may write control tokens."""
        if not self._looks_rendered(prompt, skeleton):
            return False
        if self.special_tokens_in_text == "allow":
            self._warn_once(
                "rendered", f"{where}: the prompt is rendered already and taken as it is, without the chat template"
            )
            return True
        self._warn_once(
            "rendered",
            f"{where}: the prompt looks rendered already; it is kept as the text of one user turn, its special tokens too. If "
            "it is meant as it is, set `special_tokens_in_text: allow`",
        )
        return False

    def _looks_rendered(self, prompt: str, skeleton: Skeleton) -> bool:
        """It begins as the template does, begin token aside, and ends with what the template begins an answer with."""
        begin = str(self.tokenizer.bos_token or "")
        text, head = (part.strip().removeprefix(begin).lstrip() for part in (prompt, skeleton.head))
        special = self.special.pattern.match(head)
        first = special[0] if special else head.strip()
        if not first or not text.startswith(first) or not text.removeprefix(first).strip():
            return False
        opening = next(iter(skeleton.opening.splitlines()), "")
        at = text.rfind(opening) if opening else 0
        return not opening or (at > 0 and not self.special.pattern.search(text, at + len(opening)))


def pad_token_id(tokenizer: Any, pad_token: str | None = None, *, field: str = "pad_token") -> int:
    """The id that fills the left of short prompts; ``field`` names the setting in errors.

    Raises:
        InputError: when there is no pad token and none was given, or the given one is not in the vocabulary.
    """
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise InputError(f"`{field}` must be in the student's vocabulary, got {pad_token!r}; e.g. its end token")
        return int(tokenizer.convert_tokens_to_ids(pad_token))
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"the student tokenizer has no pad token; set one in its folder or pass `{field}` "
            f"(its end token is {tokenizer.eos_token!r})"
        )
    return int(tokenizer.pad_token_id)


def encode_rows(
    rows: Iterable[PromptRow],
    encoder: PromptEncoder,
    teacher_encoder: PromptEncoder | None = None,
    *,
    keep_rows: bool = False,
) -> list[EncodedPrompt]:
    """The rows as token ids, in order.

    Args:
        rows: checked.
        encoder: of the student.
        teacher_encoder: fills ``teacher_ids``; None where the teacher reads the student's.
        keep_rows: fill ``data``.
    """
    encoded = []
    for row in rows:
        own = row.prompt if row.teacher_prompt is None else row.teacher_prompt
        tools = row.tools
        teacher_ids = teacher_encoder.encode(own, f"{row.where} (teacher)", tools=tools) if teacher_encoder else None
        ids = torch.tensor(encoder.encode(row.prompt, row.where, tools=tools), dtype=torch.int32)
        teacher = None if teacher_ids is None else torch.tensor(teacher_ids, dtype=torch.int32)
        data = _data_row(row) if keep_rows else None
        encoded.append(EncodedPrompt(row.row_id, ids, row.answer, row.teacher, teacher, data))
    return encoded


def _data_row(row: PromptRow) -> DataRow:
    return DataRow(row.columns, row_id=row.row_id, prompt=row.messages, answer=row.answer, tools=row.tools)


def collate(
    prompts: Sequence[EncodedPrompt],
    pad_id: int,
    *,
    samples: Sequence[int] | None = None,
    teacher_pad_id: int | None = None,
    counted: Sequence[bool] | None = None,
) -> PromptBatch:
    """Left-pads prompts into a batch.

    Args:
        prompts: B prompts, all or none with ``teacher_ids``.
        pad_id: fills ``ids``.
        samples: B sample indices, part of the row keys; default 0.
        teacher_pad_id: fills ``teacher_ids``; default ``pad_id``.
        counted: B flags, False on rows that only fill the batch; default True.
    Returns:
        ``PromptBatch`` with ids int64 [B, P], P the longest prompt.
    """
    samples = [0] * len(prompts) if samples is None else samples
    ids, mask = left_padded([prompt.ids for prompt in prompts], pad_id)
    own = [prompt.teacher_ids for prompt in prompts if prompt.teacher_ids is not None]
    if own and len(own) != len(prompts):
        raise InputError(f"`collate.prompts` must all or none have teacher_ids, got {len(own)} of {len(prompts)}")
    fill = pad_id if teacher_pad_id is None else teacher_pad_id
    teacher_ids, teacher_mask = left_padded(own, fill) if own else (None, None)
    return PromptBatch(
        ids=ids,
        mask=mask,
        row_keys=torch.tensor([row_key(p.row_id, k) for p, k in zip(prompts, samples, strict=True)], dtype=torch.int64),
        row_ids=tuple(prompt.row_id for prompt in prompts),
        answers=tuple(prompt.answer for prompt in prompts),
        teachers=tuple(prompt.teacher for prompt in prompts),
        teacher_ids=teacher_ids,
        teacher_mask=teacher_mask,
        counted=None if counted is None else torch.tensor(list(counted), dtype=torch.bool),
        data=_data([prompt.data for prompt in prompts]),
    )


def _data(rows: Sequence[DataRow | None]) -> tuple[DataRow, ...] | None:
    """The data rows, where all prompts have them."""
    kept = tuple(row for row in rows if row is not None)
    return kept if kept and len(kept) == len(rows) else None


def left_padded(rows: Sequence[Tensor], fill: int) -> tuple[Tensor, Tensor]:
    """int64 [B, P] and bool [B, P], True on the rows' own tokens."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), fill, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = True
    return ids, mask
