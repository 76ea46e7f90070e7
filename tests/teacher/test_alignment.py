"""Alignment by bytes: hand-made tokenisations, and fuzzed texts against a computation on sets of places."""

from __future__ import annotations

import random
import unicodedata
from functools import cache
from itertools import accumulate

import pytest

from lit_opd.models.spelling import Spelling
from lit_opd.teacher.alignment import BROKEN, AlignedRow, Aligner, Chunk, chunks, readable
from lit_opd.teacher.end_of_turn import end_of_turn, roles
from tests.helpers import spelled, tiny

FAMILIES = {
    "byte level": spelled.byte_level,
    "larger byte level": lambda: spelled.byte_level(600),
    "sentence piece": spelled.sentence_piece,
    "sentence piece with a prefix": lambda: spelled.sentence_piece(prefix=True),
}
PAIRS = [
    ("byte level", "sentence piece"),
    ("sentence piece", "byte level"),
    ("larger byte level", "byte level"),
    ("byte level", "sentence piece with a prefix"),
    ("sentence piece with a prefix", "larger byte level"),
]
TEXTS = 400  # for each pair: 2,000 in all
ENDED = -1  # stands for the student's end of turn


@cache
def family(name: str):
    return FAMILIES[name]()


def encode(tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def aligner(student, teacher, **mapped: int) -> Aligner:
    role = mapped or {student.eos_token_id: teacher.eos_token_id}
    ours, theirs = (Spelling.of(tokenizer, "model.teacher.path") for tokenizer in (student, teacher))
    return Aligner(ours, theirs, lambda text: encode(teacher, text), role)


@cache
def between(student: str, teacher: str) -> Aligner:
    return aligner(family(student), family(teacher))


def alphabet() -> list[str]:
    """Characters of one to four bytes, some that belong together."""
    plain = "abc xyz  \n\t.,;0123=+\\{}()'\"<>|-_"
    return [
        *plain,
        *"éßñüŽдяשלمر日本語文字ﬁ½",
        "🚀",
        "👩‍🚀",
        "e\u0301",
        "\u200b",
        "\ufeff",
        "\x00",
        "\u2028",
        "Ġ",
        "<0x41>",
    ]


def texts(count: int, seed: int) -> list[str]:
    draws, letters = random.Random(seed), alphabet()
    words = [word for line in spelled.LINES for word in line.split(" ")]
    found = []
    for _ in range(count):
        parts = [
            draws.choice(words) if draws.random() < 0.4 else draws.choice(letters) for _ in range(draws.randrange(25))
        ]
        found.append("".join(part + draws.choice(["", "", " "]) for part in parts))
    return found


# -- hand-made ---------------------------------------------------------------------------------------------------------


def spans(*lengths: int | None) -> list:
    """Tokens of these lengths one behind the other; None for one without a place, of one byte."""
    ends = list(accumulate(1 if length is None else length for length in lengths))
    return [None if length is None else (end - length, end) for length, end in zip(lengths, ends, strict=True)]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (spans(1, 2, 3), spans(1, 2, 3), [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 3)]),
        (spans(2, 1), spans(1, 1, 1), [(0, 1, 0, 2), (1, 2, 2, 3)]),
        (spans(1, 1, 1), spans(3), [(0, 3, 0, 1)]),
        (spans(2, 2, 2), spans(3, 1, 2), [(0, 2, 0, 2), (2, 3, 2, 3)]),
        (spans(1, 1, None, 1, 1), spans(2, None, 2), [(0, 2, 0, 1), (3, 5, 2, 3)]),
        (spans(2, None, 1), spans(1, 2, 1), [(2, 3, 2, 3)]),
        (spans(1, 1), [(0, 1), None, (1, 2)], [(0, 1, 0, 1), (1, 2, 2, 3)]),
        (spans(0, 2), spans(2), [(0, 2, 0, 1)]),
        (spans(2, 0), spans(2), [(0, 1, 0, 1)]),
        (spans(2, 2), [(0, 1), (3, 4)], []),  # the teacher's tokenizer dropped a byte
        ([], spans(1), []),
        (spans(None), spans(None), []),
    ],
)
def test_chunks_end_where_tokens_of_both_end(student, teacher, expected):
    assert [tuple(chunk) for chunk in chunks(student, teacher)] == expected


def test_merges_split_by_hand():
    """ "abc|de|f" against "ab|c|de|f": one chunk of 1 : 2, and two singles."""
    student = spelled.literal([("a", "b"), ("ab", "c"), ("d", "e")])
    teacher = spelled.literal([("a", "b"), ("d", "e")])
    row = aligner(student, teacher).row([*encode(student, "abcdef"), student.eos_token_id])
    assert teacher.convert_ids_to_tokens(row.teacher_ids) == ["ab", "c", "de", "f", spelled.EOS]
    assert row.chunks == [Chunk(0, 1, 0, 2), Chunk(1, 2, 2, 3), Chunk(2, 3, 3, 4), Chunk(3, 4, 4, 5)]
    assert [chunk.single for chunk in row.chunks] == [False, True, True, True]


def test_a_tokenisation_of_the_students_own_is_read_in_the_teachers():
    """A student may write a word in pieces that its tokenizer would not make."""
    tokenizer = spelled.literal([("a", "b")])
    a, b = encode(tokenizer, "a")[0], encode(tokenizer, "b")[0]
    assert aligner(tokenizer, tokenizer).row([a, b, a]) == AlignedRow(
        encode(tokenizer, "aba"), [Chunk(0, 2, 0, 1), Chunk(2, 3, 1, 2)]
    )


def test_bytes_that_are_no_character_are_read_as_such_and_never_aligned():
    student, teacher = family("byte level"), family("sentence piece")
    byte = {
        spelled_[0]: number
        for number, spelled_ in enumerate(Spelling.of(student, "f").spelled)
        if spelled_ and len(spelled_) == 1
    }
    a, lead, follow, space = byte[ord("a")], byte[0xE6], byte[0x97], byte[ord(" ")]
    row = between("byte level", "sentence piece").row([a, lead, follow, space, a, student.eos_token_id])
    assert teacher.decode(row.teacher_ids[:-1]) == f"a{BROKEN} a"
    covered = {token for chunk in row.chunks for token in range(chunk.student, chunk.student_end)}
    assert covered == {0, 3, 4, 5}
    whole = between("byte level", "sentence piece").row([a, lead, follow, byte[0xA5], a])
    assert teacher.decode(whole.teacher_ids) == "a日a" and whole.chunks[1][:2] == (1, 4)
    cut = between("byte level", "sentence piece").row([a, lead])
    assert cut.chunks == [Chunk(0, 1, 0, 1)]


@pytest.mark.parametrize(
    "broken", [b"\xff", b"\xe6\x97", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\xff\xfe"]
)
def test_what_is_readable_is_what_stands_around_broken_bytes(broken):
    text, blocks = readable("é".encode() + broken + b"x")
    assert text == f"é{BROKEN}x"
    assert blocks == [(0, 0, 2), (2 + len(broken), 5, 1)]
    assert readable(broken) == (BROKEN, [])


def test_a_normal_form_of_the_teachers_leaves_what_it_changed_unaligned():
    student, teacher = family("byte level"), spelled.byte_level(form="NFC")
    text = "air e\u0301 moon"
    ids = encode(student, text)
    row = aligner(student, teacher).row(ids)
    assert teacher.decode(row.teacher_ids) == unicodedata.normalize("NFC", text) != text
    read = "".join(student.decode(ids[chunk.student : chunk.student_end]) for chunk in row.chunks)
    assert read == "air  moon"


def test_a_sentence_piece_reads_its_own_sign_as_a_space_and_that_is_seen():
    student = family("byte level")
    ids = encode(student, "air\u2581moon, so")
    row = between("byte level", "sentence piece").row(ids)
    assert family("sentence piece").decode(row.teacher_ids) == "air moon, so"
    read = "".join(student.decode(ids[chunk.student : chunk.student_end]) for chunk in row.chunks)
    assert read == "air, so"  # the teacher's token is the space and the word


def test_a_character_that_the_teacher_does_not_know_is_unaligned():
    student, teacher = family("byte level"), spelled.sentence_piece(byte_tokens=False)
    ids = encode(student, "air Ω moon")
    row = aligner(student, teacher).row(ids)
    assert teacher.unk_token_id in row.teacher_ids
    assert "".join(student.decode(ids[chunk.student : chunk.student_end]) for chunk in row.chunks) == "air  moon"


def test_the_prefix_of_a_sentence_piece_is_no_part_of_the_text():
    student, teacher = family("sentence piece with a prefix"), family("byte level")
    row = between("sentence piece with a prefix", "byte level").row(encode(student, "The moon"))
    assert teacher.decode(row.teacher_ids) == "The moon"
    back = between("byte level", "sentence piece with a prefix").row(encode(teacher, "The moon"))
    assert student.decode(back.teacher_ids) == "The moon"
    assert [sum(len(chunk[1:2]) for chunk in found.chunks) > 0 for found in (row, back)] == [True, True]
    assert row.chunks[-1].student_end == len(encode(student, "The moon"))


# -- special tokens ----------------------------------------------------------------------------------------------------


def test_special_tokens_are_mapped_by_role_and_never_by_their_bytes():
    student = spelled.byte_level(special=("<tool>", "<only here>"))
    teacher = spelled.sentence_piece()
    teacher.add_special_tokens({"additional_special_tokens": ["<tool>", "<turn>"]})
    tool, only, there = (
        tokenizer.convert_tokens_to_ids(name)
        for tokenizer, name in ((student, "<tool>"), (student, "<only here>"), (teacher, "<tool>"))
    )
    turn = teacher.convert_tokens_to_ids("<turn>")
    mapped = roles(
        {student.eos_token_id: spelled.EOS, tool: "<tool>", only: "<only here>"},
        {teacher.eos_token_id: spelled.EOS, there: "<tool>", turn: "<turn>"},
        stops=(student.eos_token_id,), teacher_stops={turn}, end=turn,
    )  # fmt: skip
    assert mapped == {student.eos_token_id: turn, tool: there}
    ours, theirs = Spelling.of(student, "f"), Spelling.of(teacher, "f")
    found = Aligner(ours, theirs, lambda text: encode(teacher, text), mapped)
    ids = [*encode(student, "air<tool>"), tool, only, *encode(student, "air"), student.eos_token_id]
    row = found.row(ids)
    assert teacher.decode(row.teacher_ids) == "air<tool><tool>air<turn>"
    assert row.teacher_ids.count(there) == 1  # the text that spells it stays text
    covered = [token for chunk in row.chunks for token in range(chunk.student, chunk.student_end)]
    assert covered == [place for place, token in enumerate(ids) if token != only]


def test_an_end_of_turn_keeps_its_name_where_the_teacher_stops_there_too():
    named = {5: "<a>", 6: "<b>"}
    assert roles({1: "<a>", 2: "<b>"}, named, stops=(1, 2), teacher_stops={5, 6}, end=5) == {1: 5, 2: 6}
    assert roles({1: "<a>", 2: "<b>"}, named, stops=(1, 2), teacher_stops={5}, end=5) == {1: 5, 2: 5}
    assert roles({1: "<a>", 2: "<b>"}, named, stops=(1,), teacher_stops={5}, end=5) == {1: 5, 2: 6}
    assert roles({}, named, stops=(9,), teacher_stops={5}, end=5) == {9: 5}


TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '<turn>' if m.role == 'assistant' else '' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "stops", "given", "expected"),
    [
        (TURNS, [1, 4], None, "<turn>"),
        (TURNS, [1], None, spelled.EOS),  # the template writes what the model does not stop at
        (None, [1, 4], None, spelled.EOS),
        ("{{ raise_exception('no') }}", [1, 4], None, spelled.EOS),
        (TURNS, [1, 4], "<tool>", "<tool>"),
    ],
)
def test_the_end_of_turn_is_what_the_template_writes_behind_an_answer(tmp_path, template, stops, given, expected):
    tokenizer = spelled.literal([], ids={letter: place + 10 for place, letter in enumerate("ab")})
    tokenizer = spelled.wrapped(tokenizer.backend_tokenizer, special=("<turn>", "<tool>"))
    tokenizer.chat_template = template
    names = tokenizer.get_vocab()
    chosen = [names[{1: spelled.EOS, 4: "<turn>"}[stop]] for stop in stops]
    tiny.save(tiny.qwen3(seed=0), tmp_path, with_tokenizer=tokenizer)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {chosen}}}')
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"eos_token_id": 1', f'"eos_token_id": {chosen[0]}'))
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded.convert_ids_to_tokens(end_of_turn(loaded, "model.teacher", given)) == expected


# -- fuzzed ------------------------------------------------------------------------------------------------------------


def boundaries(parts: list[bytes]) -> list[int]:
    return [0, *accumulate(map(len, parts))]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_fuzzed_texts_are_cut_where_both_tokenisations_have_a_boundary(student, teacher):
    found, ours = between(student, teacher), family(student)
    for text in texts(TEXTS, seed=len(student) * 100 + len(teacher)):
        ids = encode(ours, text)
        row = found.row(ids)
        assert row.teacher_ids == encode(family(teacher), text)
        mine = [part or b"" for part in found.student.of_ids(ids, first=True)]
        their = [part or b"" for part in found.teacher.of_ids(row.teacher_ids, first=True)]
        assert b"".join(mine) == b"".join(their) == text.encode()
        common = sorted(set(boundaries(mine)) & set(boundaries(their)))
        read = [b"".join(mine[a:b]) for a, b, _, _ in row.chunks]
        assert read == [b"".join(their[c:d]) for _, _, c, d in row.chunks]
        assert [len(part) for part in read if part] == [b - a for a, b in zip(common, common[1:], strict=False)], text
        assert [(a, c) for a, _, c, _ in row.chunks[1:]] == [(b, d) for _, b, _, d in row.chunks[:-1]]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_any_tokens_of_a_student_are_aligned_where_they_spell_characters(student, teacher):
    """Tokens drawn blindly: broken characters, special tokens in the middle, words in odd pieces."""
    found, draws = between(student, teacher), random.Random(5)
    size = len(found.student.spelled)
    broken = 0
    for _ in range(60):
        ids = [draws.randrange(size) for _ in range(draws.randrange(1, 40))]
        row = found.row(ids)
        last = (0, 0)
        for chunk in row.chunks:
            assert chunk.student >= last[0] and chunk.teacher >= last[1]
            assert chunk.student < chunk.student_end and chunk.teacher < chunk.teacher_end
            last = chunk.student_end, chunk.teacher_end
            pieces = ids[chunk.student : chunk.student_end]
            theirs = row.teacher_ids[chunk.teacher : chunk.teacher_end]
            if pieces[0] in found.roles:
                assert len(pieces) == 1 and theirs == [found.roles[pieces[0]]]
                continue
            mine = b"".join(part or b"" for part in found.student.of_ids(pieces, first=chunk.student == 0))
            other = b"".join(part or b"" for part in found.teacher.of_ids(theirs, first=False))
            assert mine in (other, other.removeprefix(b" "))
        assert row.teacher_ids[last[1] :] == [] or last[0] < len(ids)
        broken += BROKEN in family(teacher).decode(row.teacher_ids)
    assert broken > 10
