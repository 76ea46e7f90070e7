"""This project's side of the comparison: prints one JSON line.

python -m benchmarks.peers.ours SETTING STUDENT TEACHER PROMPTS TRAINER
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import lightning as L
import torch

from benchmarks.peers.settings import PROMPT_TOKENS, SETTINGS, peak_bytes, reset_peak, resident_bytes
from lit_opd.models import StudentSettings
from lit_opd.module import OPDModule
from lit_opd.objective import Divergence, PolicyLoss
from lit_opd.prompts import PromptDataModule
from lit_opd.rollout import DecodeSampler
from lit_opd.teacher import LocalTeacher

CLOCK = time.process_time


class Watch(L.Callback):
    """CPU seconds of every step and phase, and the loaded models' resident set."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.phases: list[dict[str, float]] = []
        self.tokens: list[int] = []
        self.loaded = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Models are loaded."""
        self.loaded = resident_bytes()
        reset_peak()
        self.start = CLOCK()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One optimizer step more."""
        self.seconds.append(CLOCK() - self.start)
        self.phases.append(dict(outputs["step"].seconds))
        self.tokens.append(int(outputs["step"].sampled_tokens))
        self.start = CLOCK()


def main() -> None:
    """Run and print."""
    name, student, teacher, prompts, objective = sys.argv[1:6]
    setting = SETTINGS[name]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    module = OPDModule(
        StudentSettings(student),
        LocalTeacher(teacher),
        sampler=DecodeSampler(max_new_tokens=setting.tokens),
        objective=PolicyLoss() if objective == "iw-opd" else Divergence("reverse_kl"),
        seed=0,
    )
    module.__dict__["stop_ids"] = ()  # nothing ends a response
    data = PromptDataModule(prompts, prompt_batch=setting.batch, max_prompt_tokens=PROMPT_TOKENS + 4)
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=setting.steps + 1,
        logger=False,
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    assert set(watch.tokens) == {setting.batch * setting.tokens}, watch.tokens
    result = {"seconds": watch.seconds[1:], "phases": watch.phases[1:], "peak": peak_bytes() - watch.loaded}
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
