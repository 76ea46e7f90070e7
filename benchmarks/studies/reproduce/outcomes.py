"""Answers and divergence of every single validation problem, as a run's folder and its record hold them.

``problems.jsonl`` has a line a validation: ``step``; ``right``: greedy answers on all ``problems`` as bits, see ``packed``;
``kl``: of the problems whose samples are drawn [whole response, first 30 %, last 30 %], thousandths of a nat a token;
``kl_bands`` and ``weight_bands``: means by tenth of the response. Weights are those of all steps so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_opd.files import read_lines

FILE = "problems.jsonl"
PER_NAT = 1000


def packed(verdicts: Sequence[bool]) -> str:
    """Verdicts as hexadecimal digits, four a digit, the first in the highest bit; filled up with 0.

    >>> packed([True, False, False, False, True])
    '88'
    """
    return np.packbits(np.asarray(verdicts, dtype=bool)).tobytes().hex()[: math.ceil(len(verdicts) / 4)]


def unpacked(text: str, count: int) -> list[bool]:
    """The ``count`` verdicts of ``packed``.

    >>> unpacked("88", 5)
    [True, False, False, False, True]
    """
    digits = bytes.fromhex(text + "0" * (len(text) % 2))
    return [bool(bit) for bit in np.unpackbits(np.frombuffer(digits, dtype=np.uint8))[:count]]


def by_problem(folder: Path) -> dict[str, Any]:
    """What a run's record keeps of its ``problems.jsonl``: nothing where the run wrote none.

    A resumed run has validated a step twice; the newest line counts. Divergence and bands: of the start and the end.
    """
    lines = {line["step"]: line for line in read_lines(folder / FILE)}
    if not lines:
        return {}
    steps = sorted(lines)
    first, last = lines[steps[0]], lines[steps[-1]]
    return {
        "problems": last["problems"],
        "right": [[step, lines[step]["right"]] for step in steps],
        "kl": last["kl"],
        "kl_bands": [[line["step"], line["kl_bands"]] for line in (first, last)],
        "weight_bands": last["weight_bands"],
    }
