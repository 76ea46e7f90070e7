"""What each token of a tokenizer spells, in bytes: all that two tokenizers have in common."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lit_opd.errors import InputError

Speller = Callable[[str], bytes]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a byte token of SentencePiece
_LITERAL = frozenset({"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"})
_CHECKED = 256  # tokens whose spelling is compared with what the tokenizer decodes them to
_SPACE = " "


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes (Radford et al. 2019): printable ones by themselves, the others
    by the characters from 256 on, in order."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


@dataclass(frozen=True, eq=False)
class Spelling:
    """What the tokens of one tokenizer spell.

    Byte-level BPE, SentencePiece (with byte tokens or without; ``▁`` is a space), and tokens that are their own text.

    Args:
        spelled: by token id, the bytes; None where a token spells nothing: special tokens and holes in the numbering.
        special: the strings of special tokens, by id; the unknown token is one of them.
        byte_tokens: ids of tokens that are one byte, beside which another token may spell the same.
        drops_space: a text's first space, if it has one, is the tokenizer's own and no part of the text.
    """

    spelled: tuple[bytes | None, ...]
    special: dict[int, str]
    byte_tokens: frozenset[int]
    drops_space: bool

    @staticmethod
    def of(tokenizer: Any, field: str) -> Spelling:
        """Read off the tokenizer's decoder, and compared with what it decodes.

        Args:
            tokenizer: a Hugging Face tokenizer.
            field: names the setting in errors.
        Raises:
            InputError: it is none of the kinds above.
        """
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise InputError(
                f"`{field}` must have a fast tokenizer (a tokenizer.json) to be aligned with another, got "
                f"{type(tokenizer).__name__}; convert it, or choose a model that has one"
            )
        steps = _steps(backend.decoder)
        spell, added = _speller(steps, field), tokenizer.added_tokens_decoder
        special = {number: str(token) for number, token in added.items() if token.special}
        unknown = backend.model.unk_token if hasattr(backend.model, "unk_token") else None
        vocabulary = backend.get_vocab(with_added_tokens=True)
        spelled: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for text, number in vocabulary.items():
            if text == unknown:
                special.setdefault(number, text)
            elif number not in special:
                spelled[number] = text.encode() if number in added else spell(text)
        byte_tokens = _byte_tokens(vocabulary, steps)
        found = Spelling(tuple(spelled), special, byte_tokens, any(map(_strips, steps)))
        found._require_decoded(backend, field)
        return found

    def of_ids(self, ids: list[int], *, first: bool) -> list[bytes | None]:
        """What the tokens spell one after the other; ``first``: they begin a text."""
        found = [self.spelled[number] if 0 <= number < len(self.spelled) else None for number in ids]
        if first and self.drops_space and found and found[0] is not None:
            found[0] = found[0].removeprefix(_SPACE.encode())
        return found

    def _require_decoded(self, backend: Any, field: str) -> None:
        """The bytes are those of the tokenizer's own decoding, where a token is whole characters."""
        every = max(1, len(self.spelled) // _CHECKED)
        for number in range(0, len(self.spelled), every):
            spelled = self.spelled[number]
            text = None if not spelled else _decoded(spelled)
            if text is None:
                continue
            ours = text.removeprefix(_SPACE) + text if self.drops_space else 2 * text
            theirs = backend.decode([number, number], skip_special_tokens=False)
            if ours != theirs:
                raise InputError(
                    f"`{field}` must have a tokenizer whose tokens spell their text byte by byte, but token {number} twice is "
                    f"decoded to {theirs!r} and spells {ours!r}; choose a model of another tokenizer family"
                )


def _decoded(spelled: bytes) -> str | None:
    """As text; None where it is not whole characters."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return None


def _steps(decoder: Any) -> list[dict[str, Any]]:
    """The decoder's steps, flat; none where there is no decoder."""
    return [] if decoder is None else list(_flat(json.loads(decoder.__getstate__())))


def _flat(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if step["type"] != "Sequence":
        yield step
        return
    for inner in step["decoders"]:
        yield from _flat(inner)


def _strips(step: dict[str, Any]) -> bool:
    """Whether it takes a first space away."""
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return bool(step["type"] == "Strip" and step["content"] == _SPACE and step["start"] == 1)


def _speller(steps: list[dict[str, Any]], field: str) -> Speller:
    """From the token's string to its bytes."""
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level
    replaced = [(step["replacement"], _SPACE) for step in steps if step["type"] == "Metaspace"]
    for step in steps:
        if step["type"] == "Replace" and "String" in step["pattern"]:
            replaced.append((step["pattern"]["String"], step["content"]))
    known = bool(kinds) and set(kinds) <= _LITERAL
    trims = any(step["type"] == "Strip" and not _strips(step) for step in steps)
    if not known or trims or any("Regex" in step.get("pattern", ()) for step in steps):
        raise InputError(
            f"`{field}` must have a byte-level, SentencePiece or literal tokenizer to be aligned with another, got the decoder "
            f"{' + '.join(kinds) or 'none'}; choose a model of another tokenizer family"
        )

    def literal(token: str) -> bytes:
        """The bytes that a token adds to a text: its byte where it names one, else its text as the decoder writes it."""
        byte = _BYTE.fullmatch(token) if "ByteFallback" in kinds else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode()

    return literal


def _byte_level(token: str) -> bytes:
    """As the tokenizer reads it: characters that stand for no byte make the whole token its own text."""
    found = [_ALPHABET.get(character) for character in token]
    return token.encode() if None in found else bytes(found)  # type: ignore[arg-type]


def _byte_tokens(vocabulary: dict[str, int], steps: list[dict[str, Any]]) -> frozenset[int]:
    if not any(step["type"] == "ByteFallback" for step in steps):
        return frozenset()
    return frozenset(number for text, number in vocabulary.items() if _BYTE.fullmatch(text))
