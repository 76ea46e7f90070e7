"""Special tokens: where their strings stand in a text, and ids of a text in which only chosen ones count."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lit_opd.errors import InputError

_OPEN, _CLOSE = "\U000f2700", "\U000f2701"  # private-use characters around the number of a stand-in
_PROBES = ("a", "0", "the")  # texts of which every tokenizer makes something


@dataclass(frozen=True)
class Part:
    """A piece of a rendered text.

    Args:
        text: what stands there.
        special: it is a special token; False: ordinary text, whatever it spells.
    """

    text: str
    special: bool


@dataclass(frozen=True, eq=False)
class SpecialTokens:
    """The special tokens of one tokenizer.

    Added tokens that the tokenizer does not declare special (``<think>`` in Qwen3) are ordinary vocabulary.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    tokenizer: Any

    @cached_property
    def found(self) -> dict[str, Any]:
        """Special token string -> its ``AddedToken``, longest first, so that no token hides a longer one."""
        tokens = {str(t): t for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        tokens |= {
            text: None for text in self.tokenizer.all_special_tokens if text not in tokens and self._is_one(text)
        }
        return {text: tokens[text] for text in sorted(tokens, key=len, reverse=True) if text}

    def _is_one(self, text: str) -> bool:
        """The tokenizer finds the token in a text; it may be named and not added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) == [
            self.tokenizer.convert_tokens_to_ids(text)
        ]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Finds the strings."""
        return re.compile("|".join(map(_expression, self.found, self.found.values())) or r"(?!)")

    @cached_property
    def ids(self) -> frozenset[int]:
        """Ids that only these strings give; the unknown token's comes of ordinary text too."""
        model = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None)
        unknown = {self.tokenizer.unk_token, getattr(model, "unk_token", None)}
        return frozenset(self.tokenizer.convert_tokens_to_ids(text) for text in self.found if text not in unknown)

    @cached_property
    def begin(self) -> list[int]:
        """Ids that the tokenizer puts before a plain text (its begin token, where it adds one); often none."""
        for probe in _PROBES:
            whole, bare = self.tokenizer(probe)["input_ids"], self.ordinary(probe)
            starts = range(len(whole) - len(bare) + 1)
            if bare and (at := next((n for n in starts if whole[n : n + len(bare)] == bare), None)) is not None:
                return list(whole[:at])
        return []

    def ordinary(self, text: str) -> list[int]:
        """Ids of ``text`` in which no special token counts, and to which none is added."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def parts(self, text: str) -> list[Part]:
        """``text`` cut at the strings, all of which are taken for tokens."""
        parts, position = [], 0
        for match in self.pattern.finditer(text):
            parts += [Part(text[position : match.start()], False), Part(match[0], True)]
            position = match.end()
        return [part for part in (*parts, Part(text[position:], False)) if part.text]

    def sequence(self, text: str) -> list[str]:
        """The strings in ``text``, in order."""
        return [match[0] for match in self.pattern.finditer(text)]

    def encode(self, parts: Sequence[Part], where: str) -> list[int]:
        """Ids of the parts together, as the tokenizer would give them if ordinary parts held no special token's string.

        One call encodes all of them, because many tokenizers treat the start of a text otherwise than what follows a token:
        in a copy of the tokenizer, special tokens are ordinary text, and a stand-in takes the place of each that counts.

        Raises:
            InputError: the tokenizer does not allow that.
        """
        if self._stand_ins is None:
            return self._piecewise(parts, where)
        copy, names, numbers = self._stand_ins
        text = "".join(names[part.text] if part.special else part.text for part in parts)
        ids = copy.encode(text, add_special_tokens=False).ids
        placed = [numbers[token] for token in ids if token in numbers]
        wanted = [self.tokenizer.convert_tokens_to_ids(part.text) for part in parts if part.special]
        if placed != wanted:
            raise self._refusal(where)
        return [numbers.get(token, token) for token in ids]

    @cached_property
    def _stand_ins(self) -> tuple[Any, dict[str, str], dict[int, int]] | None:
        """The copy; special token -> its stand-in; id of a stand-in -> that of the token. None for a tokenizer in Python."""
        from tokenizers import AddedToken, Tokenizer

        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            return None
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = True
        names = {text: f"{_OPEN}{number}{_CLOSE}" for number, text in enumerate(self.found)}
        for text, token in self.found.items():
            copied = {name: getattr(token, name, False) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            copy.add_tokens([AddedToken(names[text], special=False, **copied)])
        vocabulary = copy.get_vocab()
        own: dict[str, int] = {text: self.tokenizer.convert_tokens_to_ids(text) for text in names}
        ids = {vocabulary[name]: own[text] for text, name in names.items()}
        return copy, names, ids

    def _piecewise(self, parts: Sequence[Part], where: str) -> list[int]:
        """Part by part; a tokenizer that this would change is refused."""
        plain = [Part("a" if not part.special else part.text, part.special) for part in parts]
        if self._joined(plain) != self.tokenizer("".join(p.text for p in plain), add_special_tokens=False)["input_ids"]:
            raise self._refusal(where)
        return self._joined(parts)

    def _joined(self, parts: Sequence[Part]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += [self.tokenizer.convert_tokens_to_ids(part.text)] if part.special else self.ordinary(part.text)
        return ids

    def _refusal(self, where: str) -> InputError:
        name = type(self.tokenizer).__name__
        return InputError(
            f"{where}: special token strings in the text can't be kept as text with a {name}; remove them from the row, "
            "or set `special_tokens_in_text: allow`"
        )


def _expression(text: str, token: Any) -> str:
    """Matches the string where the tokenizer would."""
    expression = re.escape(text)
    return rf"(?<!\w){expression}(?!\w)" if getattr(token, "single_word", False) else expression
