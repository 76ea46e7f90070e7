"""Two tokenisations of one response, aligned by the bytes that their tokens spell.

Minimal chunks: from one place where tokens of both end to the next. The name and the idea are those of approximate likelihood
matching (arXiv 2503.20083) and dual-pointer chunk alignment (arXiv 2606.09456).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

from lit_opd.models.spelling import Spelling

BROKEN = "�"  # what a reader sees where bytes are no character
_NO_CHARACTER = re.compile("([\udc80-\udcff]+)")  # bytes that Python keeps as lone surrogates

Span = tuple[int, int] | None  # bytes [begin, end) of the readable text; None for a token that has no sure place in it


class Chunk(NamedTuple):
    """Tokens [student, student_end) of the student and [teacher, teacher_end) of the teacher that spell the same bytes."""

    student: int
    student_end: int
    teacher: int
    teacher_end: int

    @property
    def single(self) -> bool:
        """One token of each."""
        return self.student_end - self.student == 1 == self.teacher_end - self.teacher


@dataclass(frozen=True)
class AlignedRow:
    """One response in the teacher's tokens.

    Args:
        teacher_ids: what the teacher reads.
        chunks: in order, without overlap; a token of either side in none of them is unaligned.
    """

    teacher_ids: list[int]
    chunks: list[Chunk]


@dataclass(frozen=True, eq=False)
class Aligner:
    """Re-encodes a student's response for the teacher and aligns the two.

    Stretches of text between special tokens are encoded one by one. Bytes that are no UTF-8 are read by the teacher as U+FFFD,
    and no token that touches them is aligned. A special token becomes the teacher's of the same role, or nothing.

    Args:
        student: what the student's tokens spell.
        teacher: likewise the teacher's.
        encode: the teacher's ids of a text, in which no special token counts.
        roles: the teacher's special token for each special token of the student that it has one for.
    """

    student: Spelling
    teacher: Spelling
    encode: Callable[[str], list[int]]
    roles: Mapping[int, int]

    def row(self, ids: Sequence[int]) -> AlignedRow:
        """A response, its end symbol included."""
        found = AlignedRow([], [])
        for start, tokens in _runs(ids, self.is_text):
            if self.is_text(tokens[0]):
                theirs, chunks = self._text(tokens, first=start == 0)
                at = len(found.teacher_ids)
                found.chunks.extend(Chunk(a + start, b + start, c + at, d + at) for a, b, c, d in chunks)
                found.teacher_ids.extend(theirs)
                continue
            for place, token in enumerate(tokens, start):
                if token in self.roles:
                    at = len(found.teacher_ids)
                    found.chunks.append(Chunk(place, place + 1, at, at + 1))
                    found.teacher_ids.append(self.roles[token])
        return found

    def is_text(self, token: int) -> bool:
        """Whether it spells something and has no role, as an end of turn does that is made of text."""
        spelled = self.student.spelled
        return token not in self.roles and 0 <= token < len(spelled) and spelled[token] is not None

    def _text(self, tokens: list[int], *, first: bool) -> tuple[list[int], list[Chunk]]:
        """Of a stretch of text: what the teacher reads, and its chunks."""
        ours = [part or b"" for part in self.student.of_ids(tokens, first=first)]
        text, blocks = readable(b"".join(ours))
        theirs = self.encode(text)
        spelled = self.teacher.of_ids(theirs, first=True)
        return theirs, list(chunks(_placed(ours, blocks), _in_text(spelled, text.encode())))


def _runs(ids: Sequence[int], is_text: Callable[[int], bool]) -> Iterator[tuple[int, list[int]]]:
    """(place of the first, tokens) of stretches that are text or are not."""
    start = 0
    for _, group in groupby(ids, key=is_text):
        tokens = list(group)
        yield start, tokens
        start += len(tokens)


def readable(spelled: bytes) -> tuple[str, list[tuple[int, int, int]]]:
    """The text that bytes spell, U+FFFD for each stretch of them that is no UTF-8.

    Returns:
        the text, and what of it is sure: (begin in the bytes, begin in the text's bytes, length).

    >>> readable(b"a\\xffb")
    ('a\\ufffdb', [(0, 0, 1), (2, 4, 1)])
    """
    parts, blocks, ours, theirs = [], [], 0, 0
    for number, part in enumerate(_NO_CHARACTER.split(spelled.decode("utf-8", "surrogateescape"))):
        if number % 2:
            parts.append(BROKEN)
            ours, theirs = ours + len(part), theirs + len(BROKEN.encode())
        elif part:
            size = len(part.encode())
            blocks.append((ours, theirs, size))
            parts.append(part)
            ours, theirs = ours + size, theirs + size
    return "".join(parts), blocks


def _placed(spelled: Sequence[bytes], blocks: Sequence[tuple[int, int, int]]) -> list[Span]:
    """Where in the readable text each token stands; nowhere where it touches a byte that is no character."""
    ends = list(accumulate(map(len, spelled)))
    found: list[Span] = []
    block = 0
    for part, end in zip(spelled, ends, strict=True):
        begin = end - len(part)
        while block + 1 < len(blocks) and blocks[block][0] + blocks[block][2] <= begin:
            block += 1
        ours, theirs, size = blocks[block] if blocks else (0, 0, -1)
        inside = ours <= begin and end <= ours + size
        found.append((begin - ours + theirs, end - ours + theirs) if inside else None)
    return found


def _in_text(spelled: Sequence[bytes | None], text: bytes) -> list[Span]:
    """Where in ``text`` each token stands that was made of it.

    A tokenizer may change its text (Unicode's normal forms, characters it does not know). Then the tokens before the first
    change and those after the last have a place.
    """
    ahead = _leading(spelled, text)
    if len(ahead) == len(spelled) and (ahead[-1][1] if ahead else 0) == len(text):
        return list(ahead)
    back = _leading([part and part[::-1] for part in reversed(spelled[len(ahead) :])], text[::-1])
    behind = [(len(text) - end, len(text) - begin) for begin, end in reversed(back)]
    if ahead and behind and behind[0][0] < ahead[-1][1]:
        behind = []  # they would overlap: which of them is right is not known
    return [*ahead, *[None] * (len(spelled) - len(ahead) - len(behind)), *behind]


def _leading(spelled: Sequence[bytes | None], text: bytes) -> list[tuple[int, int]]:
    """Places of the first tokens, as far as they spell what ``text`` begins with."""
    found: list[tuple[int, int]] = []
    at = 0
    for part in spelled:
        if part is None or not text.startswith(part, at):
            break
        found.append((at, at + len(part)))
        at += len(part)
    return found


def chunks(student: Sequence[Span], teacher: Sequence[Span]) -> Iterator[Chunk]:
    """The minimal chunks of two tokenisations, from where in one text their tokens stand.

    Both advance to the next place where they end together; what lies between is one chunk, if every token in it has a place.

    >>> list(chunks([(0, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)]))
    [Chunk(student=0, student_end=1, teacher=0, teacher_end=2), Chunk(student=1, student_end=2, teacher=2, teacher_end=3)]
    """
    ours = theirs = 0
    while ours < len(student) and theirs < len(teacher):
        first, other = student[ours], teacher[theirs]
        if first is None or (other is not None and first[0] < other[0]):
            ours += 1
        elif other is None or other[0] < first[0]:
            theirs += 1
        else:
            end, other_end, closed = _closed(student, teacher, ours, theirs)
            if closed:
                yield Chunk(ours, end, theirs, other_end)
            ours, theirs = end, other_end


def _closed(student: Sequence[Span], teacher: Sequence[Span], ours: int, theirs: int) -> tuple[int, int, bool]:
    """How far two tokens that begin together must be followed until both end together, and whether they do."""
    mine, other = student[ours], teacher[theirs]
    while mine is not None and other is not None and mine[1] != other[1]:
        if mine[1] < other[1]:
            ours, mine = _next(student, ours, mine)
        else:
            theirs, other = _next(teacher, theirs, other)
    return ours + 1, theirs + 1, mine is not None and other is not None


def _next(spans: Sequence[Span], at: int, last: tuple[int, int]) -> tuple[int, Span]:
    """The token after ``at``, None where it does not follow ``last`` without a gap."""
    following = spans[at + 1] if at + 1 < len(spans) else None
    follows = following is not None and following[0] == last[1]
    return (at + 1, following) if follows else (at, None)
