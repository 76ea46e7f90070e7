"""Chat templates: what one renders, whether all of the prompt is in it, and which characters are the prompt's.

A template is a program and may do anything with a text. What it did is found out by rendering again: with words of our own in
place of the contents, and with contents whose characters are marked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from lit_opd.errors import InputError
from lit_opd.prompts.layouts import Message
from lit_opd.prompts.special_tokens import Part, SpecialTokens
from lit_opd.prompts.tools import first_called

Tools = Sequence[Mapping[str, Any]] | None  # JSON schemas

_SHIFT = 0xF0000  # to the private-use plane: a character that is moved there is the prompt's
_SHIFTED = re.compile("[\U000f0000-\U000fffff]")
_MARKS = range(0xE000, 0xF8FF)  # private-use characters, of which one that occurs nowhere marks those of the prompt
_KEPT = 64  # conversations of different roles that are remembered
_REPLY = "zqreply7xw"
_PROBE_TOOL: dict[str, Any] = {
    "name": "zqtool5xw", "description": "zqword1xw", "parameters": {"type": "object", "properties": {}, "required": []},
}  # fmt: skip
_ENOUGH = 0.5  # share of a text's words that must be found where its characters cannot be followed


@dataclass(frozen=True)
class Skeleton:
    """A rendering with words of our own as contents.

    Args:
        text: for generation.
        missing: place of the first message that is not in it, None where all are.
        head: what stands before the first content of the data.
        opening: what begins the answer; empty where the template adds nothing for it.
        unopened: the template closes the last turn and does not begin the answer's.
    """

    text: str
    missing: int | None
    head: str
    opening: str
    unopened: bool


@dataclass(frozen=True)
class Traced:
    """A rendering whose characters are known to be the template's or the prompt's.

    Args:
        parts: special tokens of the template, and text.
        lost: characters of the prompt that are not in it, white space aside; None where that is not known.
    """

    parts: list[Part]
    lost: int | None


class Template:
    """The chat template of one tokenizer with its options.

    Args:
        tokenizer: a Hugging Face tokenizer.
        options: variables of the template.
        system_prompt: trusted; put before conversations that have no system message.
        special: the tokenizer's special tokens.
        name: what errors call it.
    """

    def __init__(
        self,
        tokenizer: Any,
        options: Mapping[str, Any] | None,
        system_prompt: str | None,
        *,
        special: SpecialTokens,
        name: str,
    ) -> None:
        self.tokenizer, self.options, self.system_prompt = tokenizer, dict(options or {}), system_prompt
        self.special, self.name = special, name
        self.skeleton = lru_cache(maxsize=_KEPT)(self._skeleton)
        self.renders_system = lru_cache(maxsize=_KEPT)(self._renders_system)

    def render(self, messages: Sequence[Message], *, generation: bool = True, tools: Tools = None) -> str:
        """The text for ``messages`` of the data, after the system prompt; raises whatever the template raises."""
        if self._adds_system(messages):
            assert self.system_prompt is not None
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        named = {} if tools is None else {"tools": list(tools)}
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation, **named, **self.options
            )
        )

    def _adds_system(self, messages: Sequence[Message]) -> bool:
        return self.system_prompt is not None and messages[0]["role"] != "system"

    # -- what the template does with any prompt ----------------------------------------------------------------------

    def _skeleton(self, roles: tuple[str, ...]) -> Skeleton | None:
        """For conversations of these roles; None where the template refuses our words."""
        words = [f"zqword{number}xw" for number in range(len(roles))]
        messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
        try:
            text, closed = self.render(messages), self.render(messages, generation=False)
            reply = self.render([*messages, {"role": "assistant", "content": _REPLY}], generation=False)
        except Exception:  # a template is a program of the tokenizer's author and may raise anything
            return self._shorter_skeleton(messages, words)
        opening = text.removeprefix(closed).strip() if text != closed and text.startswith(closed) else ""
        before, found, _ = reply.partition(_REPLY)
        unopened = bool(found) and text == closed and _continues(before, text)
        return Skeleton(text, _first_missing(text, words), _head(text, words[0]), opening, unopened)

    def _shorter_skeleton(self, messages: list[Message], words: list[str]) -> Skeleton | None:
        """Of a template that takes no reply, or none of our words."""
        try:
            text = self.render(messages)
        except Exception:  # as above
            return None
        return Skeleton(text, _first_missing(text, words), _head(text, words[0]), "", False)

    def check(self, messages: Sequence[Message], where: str) -> Skeleton | None:
        """The skeleton of such conversations.

        Raises:
            InputError: the template leaves a message or the system prompt out, or does not begin the answer.
        """
        skeleton = self.skeleton(tuple(message["role"] for message in messages))
        if skeleton is None:
            return None
        if skeleton.missing is not None:
            number = skeleton.missing
            raise self._error(where, f"does not render message {number} (role {messages[number]['role']})")
        if self._adds_system(messages) and not self.renders_system(tuple(m["role"] for m in messages)):
            raise self._error(where, "does not render the configured system prompt")
        if skeleton.unopened:
            raise self._error(where, "adds no generation prompt: the student would have to write the answer's header")
        return skeleton

    def _renders_system(self, roles: tuple[str, ...]) -> bool:
        """Whether another system prompt gives another text that holds it."""
        word = "zqsystemxw"
        other = Template(self.tokenizer, self.options, word, special=self.special, name=self.name)
        skeleton = other.skeleton(roles)
        return skeleton is None or word in skeleton.text.lower()

    @cached_property
    def shows_tools(self) -> bool:
        """The name of a tool is in the text; True where the template refuses our words."""
        return self._shows([{"role": "user", "content": "zqword0xw"}], [{"type": "function", "function": _PROBE_TOOL}])

    @cached_property
    def shows_calls(self) -> bool:
        """Likewise the name of a tool that an earlier answer called."""
        call = {"type": "function", "function": {"name": _PROBE_TOOL["name"], "arguments": {}}}
        asked, heard = ({"role": role, "content": "zqword0xw"} for role in ("user", "tool"))
        return self._shows([asked, {"role": "assistant", "content": "", "tool_calls": [call]}, heard], None)

    def _shows(self, messages: list[Message], tools: Tools) -> bool:
        try:
            return str(_PROBE_TOOL["name"]) in self.render(messages, tools=tools).lower()
        except Exception:  # a template is a program of the tokenizer's author and may raise anything
            return True

    def _error(self, where: str, what: str) -> InputError:
        return InputError(
            f"{where}: {self.name} {what}; give another template (`template_options: {{chat_template: ...}}` or the "
            "tokenizer's), or set `chat_template: false`"
        )

    # -- what it did with this prompt --------------------------------------------------------------------------------

    def traced(self, messages: Sequence[Message], text: str, *, tools: Tools = None) -> Traced | None:
        """Which characters of ``text``, the rendering of ``messages``, are the prompt's; None where that cannot be told.

        Each way of marking is stopped by another kind of template (one that escapes, one that looks for a word, ...); a
        marked rendering counts only if it is ``text`` without its marks.
        """
        contents = [message["content"] for message in messages]
        for mark, unmark, count, whole in _ways(contents, text, self.special.pattern):
            try:
                marked = self.render([{**m, "content": mark(m["content"])} for m in messages], tools=tools)
            except Exception:  # marked text may be what the template refuses
                continue
            if unmark(marked) == text:
                parts = [Part(unmark(part.text), part.special) for part in self.special.parts(marked)]
                kept, all_of = count(marked), sum(count(mark(content)) for content in contents)
                return Traced([part for part in parts if part.text], max(0, all_of - kept) if whole else None)
        return self._located(contents, text)

    def _located(self, contents: Sequence[str], text: str) -> Traced | None:
        """For a template that looks at the strings: contents that hold some are looked for as they are, each there once."""
        if _SHIFTED.search(text):
            return None
        for content in (content.strip() for content in contents if self.special.pattern.search(content)):
            if text.count(content) != 1:
                return None
            text = text.replace(content, _shifted(content))
        return Traced([Part(_unshifted(part.text), part.special) for part in self.special.parts(text)], None)

    def require_prompt(self, messages: Sequence[Message], text: str, where: str, *, tools: Tools = None) -> str | None:
        """Whether ``text`` holds the contents of ``messages``, but for white space around them.

        Earlier answers are left out: many templates drop their thoughts, on purpose.

        Returns:
            a warning where some words are not found and the template may have replaced them.
        Raises:
            InputError: a part of a content is not there.
        """
        if tools and not self.shows_tools:
            raise self._error(where, f"does not render the tool {tools[0]['function']['name']!r}")
        if (called := first_called(messages)) is not None and not self.shows_calls:
            raise self._error(where, f"does not render the call of {called!r}")
        asked = [message["content"].strip() for message in messages if message["role"] != "assistant"]
        if all(content in text for content in asked):
            return None
        traced = self.traced(messages, text, tools=tools) if len(asked) == len(messages) else None
        if traced is not None and traced.lost is not None:
            if traced.lost:
                raise self._error(where, f"drops {traced.lost} characters of the prompt")
            return None
        share, lost = _found_words(asked, text)
        if share < _ENOUGH:
            raise self._error(where, f"does not render the prompt ({lost!r} and more are not there)")
        return None if lost is None else f"{where}: {self.name} leaves {lost!r} of the prompt out, or replaces it"


def _first_missing(text: str, words: Sequence[str]) -> int | None:
    lowered = text.lower()
    return next((number for number, word in enumerate(words) if word not in lowered), None)


def _head(text: str, word: str) -> str:
    return text[: max(0, text.lower().find(word))]


def _continues(longer: str, text: str) -> bool:
    """``longer`` is ``text`` and more than white space."""
    kept = text.rstrip()
    return longer.startswith(kept) and bool(longer[len(kept) :].strip())


def _found_words(contents: Sequence[str], text: str) -> tuple[float, str | None]:
    """Share of the words that ``text`` has in their order, and the first that it has not."""
    words, place, found, lost = [word for content in contents for word in re.findall(r"\w+", content)], 0, 0, None
    lowered = text.lower()
    for word in words:
        at = lowered.find(word.lower(), place)
        if at < 0:
            lost = lost or word
        else:
            place, found = at + len(word), found + 1
    return (found / len(words) if words else 1.0), lost


_Way = tuple[Callable[[str], str], Callable[[str], str], Callable[[str], int], bool]


def _ways(contents: Sequence[str], text: str, special: re.Pattern[str]) -> Iterator[_Way]:
    """Ways to mark contents: mark, unmark, number of marks, and whether every character is marked.

    White space is never marked, so that templates can trim.
    """
    everything = text + "".join(contents)
    shifts = not _SHIFTED.search(everything)
    mark = next(chr(code) for code in _MARKS if chr(code) not in everything)
    escaped = f"\\u{ord(mark):04x}"

    def unmark(marked: str) -> str:
        return marked.replace(mark, "").replace(escaped, "")

    def marks(marked: str) -> int:
        return marked.count(mark) + marked.count(escaped)

    def shifted_count(marked: str) -> int:
        return len(_SHIFTED.findall(marked))

    if shifts:
        yield _shifted, _unshifted, shifted_count, True
    yield lambda content: re.sub(r"(\S)", rf"\1{mark}", content), unmark, marks, True
    if shifts:
        yield lambda content: special.sub(lambda m: _shifted(m[0]), content), _unshifted, shifted_count, False
    yield lambda content: special.sub(lambda m: f"{m[0][0]}{mark}{m[0][1:]}", content), unmark, marks, False


def _shifted(text: str) -> str:
    """Characters in the private-use plane, those beyond the basic plane excepted; no length changes."""
    return re.sub(r"[^\s\U0000fffe-\U0010ffff]", lambda match: chr(_SHIFT + ord(match[0])), text)


def _unshifted(text: str) -> str:
    return _SHIFTED.sub(lambda match: chr(ord(match[0]) - _SHIFT), text)
