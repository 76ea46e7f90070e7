"""TRL's side of the comparison, run in an environment of its own (``make bench-peers`` installs it): prints one JSON line.

    python trl_side.py SETTING STUDENT TEACHER PROMPTS TRAINER

TRAINER is ``iw-opd`` (IWOPDTrainer) or ``distillation`` (DistillationTrainer, full-vocabulary reverse KL, tiled). The data has a
reply column of about T tokens: with prompts alone IWOPDTrainer divides by zero.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from settings import SETTINGS, Setting, peak_bytes, reset_peak, resident_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

CLOCK = time.process_time


class Watch(TrainerCallback):
    """CPU seconds of every step, and the loaded models' resident set."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.seconds: list[float] = []
        self.loaded = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Models are loaded. Nothing ends a response: the trainer has set the end symbol anew by now."""
        for holder in (self.trainer, self.trainer.model):
            if getattr(holder, "generation_config", None) is not None:
                holder.generation_config.eos_token_id = None
        self.loaded = resident_bytes()
        reset_peak()
        self.start = CLOCK()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """One optimizer step more."""
        self.seconds.append(CLOCK() - self.start)
        self.start = CLOCK()


def timed(model: Any) -> tuple[list[float], list[int]]:
    """CPU seconds of every ``generate`` call, and the tokens it added to each row."""
    inner, spent, added = model.generate, [], []

    def generate(*args: Any, **kwargs: Any) -> Any:
        """What the model's own returns; its seconds and tokens are kept."""
        start = CLOCK()
        out = inner(*args, **kwargs)
        spent.append(CLOCK() - start)
        prompt = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        added.append(getattr(out, "sequences", out).shape[1] - prompt.shape[1])
        return out

    model.generate = generate
    return spent, added


def build(
    name: str, setting: Setting, folder: str, *, student: Any, teacher: Any, tokenizer: Any, data: list[dict[str, Any]]
) -> Any:
    """IWOPDTrainer at its published objective, or DistillationTrainer, full-vocabulary reverse KL in tiles.

    No recomputation in the backward pass, which is faster.
    """
    if name == "iw-opd":
        from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

        kind = IWOPDTrainer
        settings = IWOPDConfig(
            **common(setting, folder), lmbda=1.0, max_length=setting.tokens + 64, max_prompt_length=64
        )
    else:
        from trl import DistillationConfig, DistillationTrainer

        kind, settings = DistillationTrainer, DistillationConfig(**common(setting, folder))
        data = [{"prompt": row["messages"][:1]} for row in data]
    return kind(
        model=student,
        teacher_model=teacher,
        args=settings,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(data),
    )


def common(setting: Setting, folder: str) -> dict[str, Any]:
    """What both trainers take."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": setting.batch,
        "max_steps": setting.steps + 1,
        "max_completion_length": setting.tokens,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "beta": 1.0,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1000,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def main() -> None:
    """Run and print."""
    name, student_path, teacher_path, prompts, trainer_name = sys.argv[1:6]
    setting = SETTINGS[name]
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(student_path)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (student_path, teacher_path)
    )
    rows = [json.loads(line) for line in open(prompts)]
    reply = "a " * (setting.tokens // 2) if setting.folder else "a" * setting.tokens
    data = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": reply}]}
        for row in rows
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(trainer_name, setting, folder, student=student, teacher=teacher, tokenizer=tokenizer, data=data)
        (spent, added), watch = timed(student), Watch(trainer)
        trainer.add_callback(watch)
        trainer.train()
    assert set(added) == {setting.tokens}, f"responses of {sorted(set(added))} tokens"
    result = {"seconds": watch.seconds[1:], "generate": spent[1:], "peak": peak_bytes() - watch.loaded}
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
