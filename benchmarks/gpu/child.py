"""One section in this process: python -m benchmarks.gpu.child SECTION --folder F --rows F --seconds N --device D [--tiny]"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.sizes import FULL, TINY


def main() -> int:
    """0; what failed is said in the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("section", choices=list(SECTIONS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    SECTIONS[given.section].run(
        Bench(
            section=given.section,
            sizes=TINY if given.tiny else FULL,
            device=given.device,
            folder=given.folder,
            rows=given.rows,
            deadline=time.monotonic() + given.seconds,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
