"""The part of a file that a command writes, between two markers with words by hand around it."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lit_opd.errors import InputError
from lit_opd.files import replace_whole


@dataclass(frozen=True)
class Part:
    """Lines that stand between two markers.

    Args:
        start, end: the markers, whole lines without their break.
        option: of the command, that named the file.
    """

    start: str
    end: str
    option: str = "--out"

    def require(self, path: Path) -> str:
        """The whole text of a file that has the part once.

        Raises:
            InputError: there is no file, or not each marker once.
        """
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.count(f"{self.start}\n") != 1 or text.count(f"{self.end}\n") != 1:
            raise InputError(
                f"`{self.option}` must lead to a file with the lines {self.start} and {self.end} once each, got {path}"
            )
        return text

    def write(self, path: Path, body: str) -> None:
        """Replace what stands between the markers; the rest stays to the letter.

        Args:
            path: the file.
            body: whole lines.
        Raises:
            InputError: as ``require``.
        """
        before, rest = self.require(path).split(f"{self.start}\n")
        after = rest.split(f"{self.end}\n")[1]
        replace_whole(path, f"{before}{self.start}\n{body}{self.end}\n{after}".encode())

    def in_folder(self, page: str) -> Callable[[str], Path]:
        """An argparse type: a folder whose ``page`` has the part, so that another is refused before anything is measured."""

        def folder(text: str) -> Path:
            """The path of ``text``, refused without the part in its ``page``."""
            try:
                self.require(Path(text) / page)
            except InputError as error:
                raise ArgumentTypeError(str(error)) from error
            return Path(text)

        return folder


def part(name: str) -> Part:
    """Of a Markdown page, which shows no comments."""
    return Part(f"<!-- {name} -->", f"<!-- /{name} -->")
