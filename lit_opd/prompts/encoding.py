"""Text or chat messages -> token ids -> left-padded ``PromptBatch``."""

from __future__ import annotations

import re
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
from lit_opd.streams import stable_hash
from lit_opd.types import PromptBatch

ChatTemplate = bool | Literal["auto"]
SpecialTokens = Literal["escape", "refuse", "allow"]
_OURS = ("conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors")
_MASK_OPEN, _MASK_CLOSE = "\ue0f0", "\ue0f1"  # private-use characters around the number of a masked special token


def row_key(row_id: str, sample: int) -> int:
    """The 63-bit name of the random stream of one sample of one prompt; the same on every machine and run.

    >>> row_key("aime-0", 0) == row_key("aime-0", 0), row_key("aime-0", 0) == row_key("aime-0", 1)
    (True, False)
    """
    return stable_hash(f"{row_id}\0{sample}")


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """One prompt as token ids.

    Args:
        row_id: unique name.
        ids: int32 [length], at least one token.
        answer: reference answer or None.
        teacher: name of the teacher that scores the row, None for the only one.
        teacher_ids: int32 [length'] where the teacher renders its own template, else None.
    """

    row_id: str
    ids: Tensor
    answer: str | None = None
    teacher: str | None = None
    teacher_ids: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PromptEncoder:
    """Renders a prompt the way one model expects it and tokenises it.

    With a chat template, ordinary prompts give exactly ``tokenizer.apply_chat_template(messages,
    add_generation_prompt=True, **template_options)``. A text in the data that contains a special token's string takes
    a careful path: the string is masked while the template is rendered, and the text between the template's own
    special tokens is tokenised with ``split_special_tokens=True``, so it stays ordinary text. Added tokens that the
    tokenizer does not declare special (``<think>`` in Qwen3) are ordinary vocabulary and stay tokens. Control and
    bidirectional characters pass through unchanged.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat_template: True: needed; False: plain text with the tokenizer's own BOS; "auto": used when there is one.
        template_options: variables of the template, e.g. {"enable_thinking": False}.
        system_prompt: put before conversations that have no system message of their own; it is trusted, special
            tokens in it stay control tokens.
        special_tokens_in_text: "escape"; "refuse" to make such a text an error; "allow" to let the data write control tokens.
        owner: "Class" or "Class.teacher", put before field names in messages.
    """

    tokenizer: Any
    chat_template: ChatTemplate = "auto"
    template_options: Mapping[str, Any] | None = None
    system_prompt: str | None = None
    special_tokens_in_text: SpecialTokens = "escape"
    owner: str = field(default="PromptEncoder.", repr=False)

    def __post_init__(self) -> None:
        if self.chat_template not in (True, False, "auto"):
            raise self._error("chat_template", "True, False or 'auto'", self.chat_template)
        if self.special_tokens_in_text not in get_args(SpecialTokens):
            raise self._error("special_tokens_in_text", "'escape', 'refuse' or 'allow'", self.special_tokens_in_text)
        if self.chat_template is True and not self._template:
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
            unknown = sorted(name for name in options if name != "chat_template" and name not in self._template)
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

    @cached_property
    def _template(self) -> str:
        """The template's source, empty without one."""
        template = (self.template_options or {}).get("chat_template") or getattr(self.tokenizer, "chat_template", None)
        return str(template or "")

    @property
    def renders(self) -> bool:
        """Whether a chat template is used."""
        return self.chat_template is not False and bool(self._template)

    @cached_property
    def _special(self) -> dict[str, Any]:
        """Special token string -> its ``AddedToken``, longest first, so that no token hides a longer one."""
        tokens = {str(t): t for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        tokens |= {text: None for text in self.tokenizer.all_special_tokens if text not in tokens}
        return {text: tokens[text] for text in sorted(tokens, key=len, reverse=True) if text}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._special)) or r"(?!)")

    def encode(self, prompt: str | Sequence[Message], where: str = "prompt") -> list[int]:
        """Token ids of one prompt, ready for generation.

        Args:
            prompt: plain text, or chat messages that end with a user turn.
            where: "FILE:LINE" for messages.
        Raises:
            InputError: when the template raises, nothing is left to encode, or a special token's string is to be refused.
        """
        if self.special_tokens_in_text == "refuse":
            self._refuse_special(prompt, where)
        ids = self._rendered(prompt, where) if self.renders else self._plain(prompt, where)
        if not ids:
            raise InputError(f"{where}: the prompt has no tokens after rendering; check the text and the chat template")
        return [int(token) for token in ids]

    def _refuse_special(self, prompt: str | Sequence[Message], where: str) -> None:
        for text in [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]:
            if match := self._special_pattern.search(text):
                raise InputError(
                    f"{where}: the prompt must not hold a special token's string, got {match[0]!r}; remove it, or set "
                    "`special_tokens_in_text: escape` to keep it as ordinary text"
                )

    def _plain(self, prompt: str | Sequence[Message], where: str) -> list[int]:
        if not isinstance(prompt, str):
            raise InputError(
                f"{where}: chat messages need a chat template, and the tokenizer has none (or `chat_template` is "
                "False); give plain text or another tokenizer"
            )
        escape = self.special_tokens_in_text == "escape" and bool(self._special_pattern.search(prompt))
        return (
            self.tokenizer(prompt, split_special_tokens=True)["input_ids"]
            if escape
            else self.tokenizer(prompt)["input_ids"]
        )

    def _rendered(self, prompt: str | Sequence[Message], where: str) -> list[int]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        hostile = any(self._special_pattern.search(message["content"]) for message in messages)
        masked: list[str] = []
        if hostile and self.special_tokens_in_text == "escape":
            messages = [{**m, "content": self._masked(m["content"], masked, where)} for m in messages]
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        text = self._apply_template(messages, where)
        if masked:
            return self._encode_masked(text, masked, where)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _apply_template(self, messages: list[Message], where: str) -> str:
        options = dict(self.template_options or {})
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        except Exception as error:  # a template is a program of the tokenizer's author and may raise anything
            raise InputError(
                f"{where}: the chat template failed ({type(error).__name__}: {error}); "
                "change the row, `template_options`, or set `chat_template: false`"
            ) from error

    def _masked(self, content: str, masked: list[str], where: str) -> str:
        """``content`` with each special token string replaced by a numbered mask; the strings go to ``masked``."""
        if _MASK_OPEN in content or _MASK_CLOSE in content:
            raise InputError(f"{where}: private-use characters U+E0F0/U+E0F1 beside a special token string; remove one")

        def mask(match: re.Match[str]) -> str:
            masked.append(match[0])
            return f"{_MASK_OPEN}{len(masked) - 1}{_MASK_CLOSE}"

        return self._special_pattern.sub(mask, content)

    def _encode_masked(self, text: str, masked: list[str], where: str) -> list[int]:
        """Special tokens that are visible in ``text`` are the template's; what is masked becomes text again."""
        ids: list[int] = []
        position, strip_left = 0, False
        for match in [*self._special_pattern.finditer(text), None]:
            between = text[position : match.start() if match else len(text)]
            token = self._special[match[0]] if match else None
            between = between.lstrip() if strip_left else between
            between = between.rstrip() if getattr(token, "lstrip", False) else between
            ids += self._encode_text(between, masked, where)
            if match:
                ids.append(self.tokenizer.convert_tokens_to_ids(match[0]))
                position, strip_left = match.end(), getattr(token, "rstrip", False)
        return ids

    def _encode_text(self, text: str, masked: list[str], where: str) -> list[int]:
        text = re.sub(f"{_MASK_OPEN}([0-9]+){_MASK_CLOSE}", lambda match: masked[int(match[1])], text)
        if _MASK_OPEN in text or _MASK_CLOSE in text:
            raise InputError(
                f"{where}: the chat template cuts the text, so its special token strings can't be escaped; "
                "remove them from the row or set `special_tokens_in_text: allow`"
            )
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def pad_token_id(tokenizer: Any, pad_token: str | None = None) -> int:
    """The id that fills the left of short prompts.

    Raises:
        InputError: when there is no pad token and none was given, or the given one is not in the vocabulary.
    """
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise InputError(f"`pad_token` must be in the student's vocabulary, got {pad_token!r}; e.g. its end token")
        return int(tokenizer.convert_tokens_to_ids(pad_token))
    if tokenizer.pad_token_id is None:
        raise InputError(
            "the student tokenizer has no pad token; set one in its folder or pass `pad_token` "
            f"(its end token is {tokenizer.eos_token!r})"
        )
    return int(tokenizer.pad_token_id)


def encode_rows(
    rows: Iterable[PromptRow], encoder: PromptEncoder, teacher_encoder: PromptEncoder | None = None
) -> list[EncodedPrompt]:
    """The rows as token ids, in order; ``teacher_ids`` are filled only when some row differs for the teacher."""
    encoded = []
    for row in rows:
        teacher_ids = teacher_encoder.encode(row.prompt, row.where) if teacher_encoder else None
        ids = torch.tensor(encoder.encode(row.prompt, row.where), dtype=torch.int32)
        teacher = None if teacher_ids is None else torch.tensor(teacher_ids, dtype=torch.int32)
        encoded.append(EncodedPrompt(row.row_id, ids, row.answer, row.teacher, teacher))
    return encoded


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
    ids, mask = _left_padded([prompt.ids for prompt in prompts], pad_id)
    own = [prompt.teacher_ids for prompt in prompts if prompt.teacher_ids is not None]
    if own and len(own) != len(prompts):
        raise InputError(f"`collate.prompts` must all or none have teacher_ids, got {len(own)} of {len(prompts)}")
    fill = pad_id if teacher_pad_id is None else teacher_pad_id
    teacher_ids, teacher_mask = _left_padded(own, fill) if own else (None, None)
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
    )


def _left_padded(rows: Sequence[Tensor], fill: int) -> tuple[Tensor, Tensor]:
    """int64 [B, P] and bool [B, P], True on the rows' own tokens."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), fill, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = True
    return ids, mask
