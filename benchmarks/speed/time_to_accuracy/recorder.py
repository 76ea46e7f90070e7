"""What either side records of its run: a clock that stands still while the student's weights are saved.

Both sides' environments import this file, so it needs torch and safetensors only.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def weights_file(folder: Path, batches: int) -> Path:
    """Where the student's weights after so many rollout batches are."""
    return folder / f"weights-{batches:04d}.safetensors"


class Recorder:
    """Training time and sampled tokens at every few rollout batches, with the student's weights of that moment.

    Args:
        folder: of the weights.
        every: rollout batches between two marks.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.cpu = self.wall = 0.0
        self.batches = self.responses = self.tokens = 0
        self.marks: list[dict[str, float]] = []
        self.rows: list[int] = []  # a checksum a sampled row's prompt, in order
        self.first: list[int] = []
        self._since: tuple[float, float] | None = None

    def start(self) -> None:
        """The clock runs: CPU time of this process, and wall time."""
        assert self._since is None
        self._since = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        """The clock stands still."""
        assert self._since is not None
        self.cpu += time.process_time() - self._since[0]
        self.wall += time.perf_counter() - self._since[1]
        self._since = None

    def batch(
        self, *, ids: Tensor, prompt_mask: Tensor, tokens: int, steps: int, weights: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        """One rollout batch more; the clock goes on after it.

        Args:
            ids: int64 [B, P], left-padded prompts.
            prompt_mask: bool [B, P].
            tokens: sampled in this batch.
            steps: optimizer steps made so far.
            weights: the student's, by name.
        """
        self.stop()
        self.batches, self.responses, self.tokens = self.batches + 1, self.responses + len(ids), self.tokens + tokens
        rows = [row[mask.bool()].tolist() for row, mask in zip(ids, prompt_mask, strict=True)]
        self.first = self.first or rows[0]
        self.rows += [zlib.crc32(str(row).encode()) for row in rows]
        if self.batches % self.every == 0:
            counts = {"batches": self.batches, "responses": self.responses, "tokens": self.tokens, "steps": steps}
            self.marks.append(counts | {"cpu": self.cpu, "wall": self.wall})
            save_file(dict(weights()), weights_file(self.folder, self.batches))
        self.start()

    def result(self) -> dict[str, Any]:
        """For JSON."""
        return {"marks": self.marks, "rows": self.rows, "first_prompt": self.first}
