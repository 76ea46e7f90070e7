"""This project's side of the comparison: prints one JSON line.

python -m benchmarks.speed.peers.ours SETTING STUDENT TEACHER PROMPTS TRAINER
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import lightning as L
import torch

from benchmarks.speed.peers.settings import PROMPT_TOKENS, SETTINGS, Setting, peak_bytes, reset_peak, resident_bytes
from benchmarks.speed.sides import RESULT
from benchmarks.timed import Timed
from lit_opd.models.student import StudentSettings
from lit_opd.module import OPDModule
from lit_opd.objective import Divergence, PolicyLoss
from lit_opd.prompts.datamodule import PromptDataModule
from lit_opd.rollout import DecodeSampler
from lit_opd.teacher import LocalTeacher

CLOCK = time.process_time
TOKEN_BUDGET = 2048  # padded tokens a micro-batch: what a layer works on stays near the core


class Watch(L.Callback):
    """CPU seconds of every step and phase, and the loaded models' resident set."""

    def __init__(self, timed: dict[str, Timed]) -> None:
        self.timed = timed
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
        self.phases.append({name: timed.taken() for name, timed in self.timed.items()})
        self.tokens.append(int(outputs["step"].sampled_tokens))
        self.start = CLOCK()


def main() -> None:
    """Run and print."""
    name, student, teacher, prompts, objective = sys.argv[1:6]
    setting = SETTINGS[name] if name in SETTINGS else Setting(**json.loads(name))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    module = OPDModule(
        StudentSettings(student),
        LocalTeacher(teacher),
        sampler=DecodeSampler(max_new_tokens=setting.tokens),
        objective=PolicyLoss() if objective == "iw-opd" else Divergence("reverse_kl"),
        token_budget=max(TOKEN_BUDGET, PROMPT_TOKENS + 4 + setting.tokens),
        seed=0,
    )
    module.__dict__["stop_ids"] = ()  # nothing ends a response
    data = PromptDataModule(prompts, prompt_batch=setting.batch, max_prompt_tokens=PROMPT_TOKENS + 4)
    watch = Watch(
        {"generate": Timed(module.sampler, "sample", CLOCK), "teacher": Timed(module.teacher, "score", CLOCK)}
    )
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
    result = {
        "seconds": watch.seconds[1:],
        **{name: [phase[name] for phase in watch.phases[1:]] for name in watch.timed},
        "peak": peak_bytes() - watch.loaded,
    }
    print(RESULT + json.dumps(result))


if __name__ == "__main__":
    main()
