"""The shapes that a decode step may have: few on a device, where each costs a capture, any on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

COLUMNS = (
    256  # of keys and values, added at once: a capture costs about 30 ms, a masked column of 32 rows about 1 us a step
)
ALIGNED = 16  # columns; kernels read a bias in such pieces
MANY_ROWS = 32  # up to so many rows buckets are powers of two, above multiples of it
FIRST_COLUMNS = 64  # on a CPU, columns by which a buffer is longer than the prompt at first; then it doubles


@dataclass(frozen=True)
class Buckets:
    """How many rows and columns the buffers of a decode step have.

    Args:
        fixed: the shapes of a step stay as long as it stays in a bucket; else a step runs the rows and columns there are, and
            only buffers are longer.
    """

    fixed: bool

    @classmethod
    def of(cls, device: torch.device) -> Buckets:
        """Those of a device."""
        return cls(fixed=device.type != "cpu")

    def rows(self, count: int) -> int:
        """Rows of a step that writes ``count``."""
        if not self.fixed:
            return count
        if count <= MANY_ROWS:
            return 1 << (count - 1).bit_length()
        return _up(count, MANY_ROWS)

    def columns(self, filled: int, *, most: int) -> int:
        """Columns of a buffer that must hold ``filled`` now and ``most`` in the end."""
        if self.fixed:
            return min(_up(filled, COLUMNS), _up(most, ALIGNED))
        return max(filled, min(most, max(2 * (filled - 1), filled + FIRST_COLUMNS)))


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
