"""How the reference reads our docstrings: sections that follow each other without an empty line, and doctests as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SECTION = re.compile(r"(?<!\n)\n(?=(Args|Returns|Raises|Yields):\n|(Returns|Raises):)")
_DOCTEST = re.compile(r"(?:^>>> .*\n?)(?:^.+\n?)*", flags=re.M)


def readable(text: str) -> str:
    """A docstring as the parser for Google's style expects it."""
    fenced = _DOCTEST.sub(lambda match: f"\n```pycon\n{match[0].rstrip()}\n```\n", text)
    return _SECTION.sub("\n\n", fenced)


class Readable(griffe.Extension):
    """Applies ``readable`` to every docstring."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)
