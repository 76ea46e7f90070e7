"""What the position profile costs of a quickstart step: wall time inside the callback against that of the step.

    python -m benchmarks.speed.profile_cost --steps 20 --mode offline

Runs the real quickstart with the callback's hooks timed. A step is everything between two ends of a training batch. Windows
(sums, reduction, file, loggers) are the cost of each step; charts and pictures are drawn when they cost under
``pictures_share`` of the time, and once at the end.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from callbacks import PositionProfile, RolloutSamples, default_callbacks
from lit_opd.cli.command import main as run_cli


class Timed:
    """Wraps hooks of a callback class and keeps seconds a call."""

    def __init__(self, owner: type, hook: str) -> None:
        self.seconds: list[float] = []
        self.ends: list[float] = []
        inner: Callable[..., Any] = getattr(owner, hook)

        def timed(*args: Any, **kwargs: Any) -> Any:
            """What the hook returns; its seconds and its end are kept."""
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            self.ends.append(time.perf_counter())
            self.seconds.append(self.ends[-1] - start)
            return result

        setattr(owner, hook, timed)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--mode", choices=["offline", "disabled"], default="offline", help="W&B mode")
    parser.add_argument("--config", default="configs/quickstart.yaml")
    given = parser.parse_args()
    profile, samples = Timed(PositionProfile, "on_train_batch_end"), Timed(RolloutSamples, "on_train_batch_end")
    end = Timed(PositionProfile, "on_train_end")
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["--trainer.max_steps", str(given.steps), "--wandb.mode", given.mode]
        overrides += ["--trainer.limit_val_batches", "0", "--run_dir", str(Path(folder) / "run")]
        run_cli(default_callbacks, ["fit", "--config", given.config, *overrides])
    step = statistics.median(b - a for a, b in zip(profile.ends, profile.ends[1:], strict=False))
    print(f"step: median {step:.3f} s of {len(profile.ends)}")
    for name, timed in (("PositionProfile", profile), ("RolloutSamples", samples)):
        mean, median = statistics.mean(timed.seconds[1:]), statistics.median(timed.seconds[1:])
        print(
            f"{name}: median {1000 * median:.1f} ms ({median / step:.2%} of a step), mean {1000 * mean:.1f} ms "
            f"({mean / step:.2%}), first {1000 * timed.seconds[0]:.1f} ms"
        )
    print(f"charts and pictures at the end, once: {end.seconds[0]:.2f} s")


if __name__ == "__main__":
    main()
