"""What a chat template puts after an answer: its end, the next messages, and the opening of the next answer.

An answer that was sampled is never rendered: words of our own stand in its place, and in that of everything before it. So the
tokens of a conversation are those that were sampled and those that the template adds, each encoded once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_opd.errors import InputError
from lit_opd.prompts.encoding import PromptEncoder
from lit_opd.prompts.special_tokens import Part
from lit_opd.prompts.tools import texts_beside

_ANSWER = "zqanswer9xw"
_PROBE = "zqobserved9xw"
_KEPT = 4096  # answers of environments whose tokens are remembered
WHERE = "answer of the environment"


class Following:
    """The tokens after a sampled answer.

    Args:
        encoder: of the prompts.
    Raises:
        InputError: prompts are not rendered by a chat template.
    """

    def __init__(self, encoder: PromptEncoder) -> None:
        if not encoder.renders:
            raise InputError(
                "`model.sampler` plays an environment, whose answers are rendered by a chat template, and prompts have none; "
                "use a tokenizer with a chat template, and leave `data.chat_template` at auto"
            )
        self.encoder, self._warned = encoder, False
        self._remembered = lru_cache(maxsize=_KEPT)(self._ids)

    def check(self, role: str) -> None:
        """An InputError where the template cannot answer a user's turn and an assistant's with a message of ``role``."""
        self.ids(("user",), [{"role": role, "content": _PROBE}], closing=None)

    def ids(self, roles: Sequence[str], messages: Sequence[Mapping[str, Any]], *, closing: int | None) -> list[int]:
        """Token ids after an answer.

        Args:
            roles: of the conversation before the answer.
            messages: what comes next.
            closing: the token that ended the answer, which is not repeated; None for none.
        Raises:
            InputError: the template fails, leaves a message out, or says something else after the answer once more follows;
                or the text has a special token's string that is to be refused or cannot be kept as text.
        """
        return list(self._remembered(tuple(roles), json.dumps(list(messages)), closing))

    def _ids(self, roles: tuple[str, ...], messages: str, closing: int | None) -> tuple[int, ...]:
        new = json.loads(messages)
        text, start = self._rendered(roles, new)
        parts = self._parts(roles, new, text, start)
        special, name = self.encoder.special, None
        if closing is not None:
            name = str(self.encoder.tokenizer.convert_ids_to_tokens(closing))
        if name is None or name not in special.found:
            said = "" if closing is None else self.encoder.tokenizer.decode([closing], skip_special_tokens=False)
            return tuple(special.encode(_without(parts, said), WHERE))
        if not (parts and parts[0] == Part(name, True)):
            parts = [Part(name, True), *parts]
        return tuple(special.encode(parts, WHERE)[1:])

    def _rendered(self, roles: tuple[str, ...], new: list[dict[str, Any]]) -> tuple[str, int]:
        """The whole conversation as text, and where the answer in it ends."""
        template = self.encoder.template
        history = [{"role": role, "content": f"zqword{number}xw"} for number, role in enumerate(roles)]
        answered = [*history, {"role": "assistant", "content": _ANSWER}]
        try:
            asked, closed = template.render(history), template.render(answered, generation=False)
            text = template.render([*answered, *new])
        except Exception as error:  # a template is a program of the tokenizer's author and may raise anything
            raise self._error(f"failed ({type(error).__name__}: {error})") from error
        template.check([*answered, *new], WHERE)
        before, found, behind = text.partition(_ANSWER)
        end = closed.partition(_ANSWER)[2]
        if not found or _ANSWER in behind or not behind.startswith(end):
            raise self._error(
                "writes an answer otherwise once a message follows it, so what stands between them cannot be told"
            )
        template.require_prompt(new, behind, WHERE)
        if before != asked and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{template.name} writes what stands before an answer otherwise once a message follows it (it may drop "
                "thoughts); rows keep the tokens that were read when they were sampled"
            )
        return text, len(before) + len(_ANSWER)

    def _parts(self, roles: tuple[str, ...], new: list[dict[str, Any]], text: str, start: int) -> list[Part]:
        """``text`` from ``start`` on; special tokens are the template's alone, unless the data may write them."""
        special, template = self.encoder.special, self.encoder.template
        if self.encoder.special_tokens_in_text == "allow":
            return special.parts(text[start:])
        for beside in texts_beside(new, None):  # a tool's name, which the student may have spelled
            if match := special.pattern.search(beside):
                raise InputError(
                    f"{WHERE} must not hold a special token's string beside its content, got {match[0]!r}; leave it out"
                )
        contents = [str(message["content"]) for message in new]
        hostile = next((match for content in contents if (match := special.pattern.search(content))), None)
        if hostile is None:
            return special.parts(text[start:])
        if self.encoder.special_tokens_in_text == "refuse":
            raise InputError(f"{WHERE} must not hold a special token's string, got {hostile[0]!r}")
        history = [{"role": role, "content": f"zqword{number}xw"} for number, role in enumerate(roles)]
        traced = template.traced([*history, {"role": "assistant", "content": _ANSWER}, *new], text)
        if traced is None:
            raise self._error(
                f"changes the text, so that {hostile[0]!r} in it cannot be distinguished from the template's own"
            )
        return _behind(traced.parts, start)

    def _error(self, what: str) -> InputError:
        return InputError(
            f"{self.encoder.template.name} {what}; give another template (`data.template_options: {{chat_template: ...}}` or "
            "the tokenizer's), or let the environment answer in another role"
        )


def _behind(parts: Sequence[Part], start: int) -> list[Part]:
    """The parts from character ``start`` on."""
    found = []
    for part in parts:
        if start < len(part.text):
            found.append(Part(part.text[start:], part.special) if start else part)
        start = max(0, start - len(part.text))
    return found


def _without(parts: list[Part], text: str) -> list[Part]:
    """The parts without ``text`` at their beginning, where it stands there."""
    if text and parts and not parts[0].special and parts[0].text.startswith(text):
        return [part for part in (Part(parts[0].text[len(text) :], False), *parts[1:]) if part.text]
    return parts
