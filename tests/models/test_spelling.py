"""What tokens spell: by the tokenizers' own decoding, over whole vocabularies."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_opd.errors import InputError
from lit_opd.models.spelling import Spelling
from tests.helpers import spelled

FAMILIES = {
    "byte level": spelled.byte_level,
    "sentence piece": spelled.sentence_piece,
    "sentence piece with a prefix": lambda: spelled.sentence_piece(prefix=True),
    "without byte tokens": lambda: spelled.sentence_piece(byte_tokens=False),
    "literal": lambda: spelled.literal([("a", "b")]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_of_a_text_are_those_its_tokens_spell(family):
    tokenizer = FAMILIES[family]()
    spelling = Spelling.of(tokenizer, "model.teacher.path")
    for text in ("abba", " ab  ba", "ab ab ") if family == "literal" else (*spelled.LINES, "  two ", "\n", " x"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if spelled.UNK in tokenizer.get_vocab() and tokenizer.unk_token_id in ids:
            assert family == "without byte tokens"
            continue
        assert b"".join(spelling.of_ids(ids, first=True)) == text.encode()


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_characters_are_spelled_as_they_are_decoded(family):
    tokenizer = FAMILIES[family]()
    spelling = Spelling.of(tokenizer, "model.teacher.path")
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = tokenizer.backend_tokenizer.decode(anchor)
    compared = 0
    for number, part in enumerate(spelling.spelled):
        if part and part.decode(errors="ignore").encode() == part:
            assert tokenizer.backend_tokenizer.decode([*anchor, number]) == start + part.decode()
            compared += 1
    assert compared > 5


def test_special_tokens_and_the_unknown_one_spell_nothing():
    tokenizer = spelled.sentence_piece()
    spelling = Spelling.of(tokenizer, "model.teacher.path")
    assert set(spelling.special.values()) == {spelled.PAD, spelled.EOS, spelled.UNK}
    assert all(spelling.spelled[number] is None for number in spelling.special)
    assert len(spelling.byte_tokens) == 256 and spelling.spelled[tokenizer.convert_tokens_to_ids("<0x41>")] == b"A"


def test_an_added_token_that_is_not_special_is_its_own_text():
    tokenizer = spelled.byte_level()
    tokenizer.add_tokens(["<think>\n é"])
    spelling = Spelling.of(tokenizer, "model.teacher.path")
    assert spelling.spelled[tokenizer.convert_tokens_to_ids("<think>\n é")] == "<think>\n é".encode()


def test_only_a_tokenizer_with_a_prefix_drops_a_first_space():
    found = {name: Spelling.of(build(), "f").drops_space for name, build in FAMILIES.items()}
    assert [name for name, drops in found.items() if drops] == ["sentence piece with a prefix"]


@pytest.mark.parametrize(
    ("decoder", "named"),
    [(None, "none"), (decoders.WordPiece(), "WordPiece"), (decoders.Strip(" ", 0, 1), "Strip")],
)
def test_a_tokenizer_of_another_kind_is_refused_by_the_name_of_its_decoder(decoder, named):
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoder
    with pytest.raises(InputError, match=rf"`model.teacher.teacher.path` must have a byte-level.*decoder {named}"):
        Spelling.of(PreTrainedTokenizerFast(tokenizer_object=inner), "model.teacher.teacher.path")


def test_a_decoding_that_is_not_the_bytes_is_refused():
    inner = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    inner.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("aa", "b")])
    with pytest.raises(InputError, match="token 0 twice is decoded to 'b' and spells 'aa'"):
        Spelling.of(spelled.wrapped(inner), "model.student.path")
    slow = type("SlowTokenizer", (), {})()
    with pytest.raises(InputError, match="must have a fast tokenizer .*got SlowTokenizer"):
        Spelling.of(slow, "model.student.path")
