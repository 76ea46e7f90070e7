"""What teachers that are made of teachers share: each is asked, told and loaded."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from lit_opd.models.sharding import Placement
from lit_opd.models.student import StudentSettings
from lit_opd.scoring.model import ScoringModel
from lit_opd.teacher.base import Teacher


class SeveralTeachers(Teacher):
    """A teacher made of others."""

    @abstractmethod
    def named(self) -> dict[str, Teacher]:
        """Teacher by name; errors call each by its own setting."""

    def tokenizers(self) -> list[Any]:
        """Those of every teacher."""
        return [pair for teacher in self.named().values() for pair in teacher.tokenizers()]

    def revision(self) -> str | None:
        """Of all of them; None where one has none."""
        found = [teacher.revision() for teacher in self.named().values()]
        return None if None in found else " ".join(map(str, found))

    @property
    def window(self) -> int | None:
        """The smallest of theirs."""
        found = [teacher.window for teacher in self.named().values()]
        return min((window for window in found if window is not None), default=None)

    def check(self, *, temperature: float, tokens: int | None) -> None:
        """Check every teacher."""
        for teacher in self.named().values():
            teacher.check(temperature=temperature, tokens=tokens)

    def check_student(self, settings: StudentSettings) -> None:
        """Ask every teacher."""
        for teacher in self.named().values():
            teacher.check_student(settings)

    def attach(self, student: ScoringModel) -> None:
        """Tell every teacher."""
        for teacher in self.named().values():
            teacher.attach(student)

    def load(self, *, vocabulary: int) -> None:
        """Load every teacher."""
        for teacher in self.named().values():
            teacher.load(vocabulary=vocabulary)

    def shard(self, place: Placement) -> None:
        """Shard every teacher."""
        for teacher in self.named().values():
            teacher.shard(place)

    def load_sharded(self, place: Placement, *, vocabulary: int) -> None:
        """Load and shard every teacher."""
        for teacher in self.named().values():
            teacher.load_sharded(place, vocabulary=vocabulary)

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        """All of them at once."""
        with ExitStack() as stack:
            for teacher in self.named().values():
                stack.enter_context(teacher.on_device(device))
            yield
