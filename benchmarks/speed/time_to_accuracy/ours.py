"""This project's side: the quickstart's own command line with overrides; prints one JSON line.

    python -m benchmarks.speed.time_to_accuracy.ours '{"words": [...], "folder": ..., "every": 2}'

Reading and tokenising the prompts counts; loading models does not.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from benchmarks.speed.sides import RESULT
from benchmarks.speed.time_to_accuracy.recorder import Recorder
from benchmarks.timed import Timed
from lit_opd.cli.command import main as run_cli
from lit_opd.prompts.datamodule import PromptDataModule


class Watch(Callback):
    """Feeds the recorder, and knows the CPU seconds spent in sampling and in the teacher."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.parts: dict[str, Timed] = {}
        self.stop_ids: list[int] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Models are loaded."""
        self.parts = {
            "generate": Timed(pl_module.sampler, "sample", time.process_time),
            "teacher": Timed(pl_module.teacher, "score", time.process_time),
        }
        self.stop_ids = list(pl_module.stop_ids)
        self.recorder.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One rollout batch more."""
        record = outputs["step"]
        self.recorder.batch(
            ids=record.rollout.prompts.ids,
            prompt_mask=record.rollout.prompts.mask,
            tokens=int(record.sampled_tokens),
            steps=trainer.global_step,
            weights=pl_module.student.causal_lm.state_dict,
        )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The recorder runs on after the last batch."""
        self.recorder.stop()


def count_data(recorder: Recorder) -> None:
    """Let the clock run while prompts are read: TRL tokenises in its loader, within its steps."""
    inner = PromptDataModule.setup

    def setup(data: PromptDataModule, stage: str | None = None) -> None:
        recorder.start()
        inner(data, stage)
        recorder.stop()

    PromptDataModule.setup = setup  # type: ignore[method-assign]


def main() -> None:
    """Run and print."""
    asked = json.loads(sys.argv[1])
    recorder = Recorder(Path(asked["folder"]), asked["every"])
    watch = Watch(recorder)
    count_data(recorder)
    run_cli(lambda: [watch], asked["words"])
    parts = {name: timed.spent for name, timed in watch.parts.items()}
    rest = recorder.cpu - sum(parts.values())
    result = recorder.result() | {"stop_ids": watch.stop_ids, "parts": parts | {"rest": rest}}
    print(RESULT + json.dumps(result))


if __name__ == "__main__":
    main()
