"""TRL's side, run in an environment of its own (``make time-to-accuracy`` installs it): prints one JSON line.

    python trl_side.py '{"student": ..., "teacher": ..., "prompts": ..., "folder": ..., "every": 2, ...}'

IWOPDTrainer at its published objective, with this project's optimizer, schedule and order of prompts. The data has a reply
column as long as a right answer: TRL divides its loss by the tokens of that column, and by zero without one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from recorder import Recorder
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

REPLY = "0" * 41  # 12 codes of 3 tokens, `\boxed{`, a code and `}`; the template adds the end symbol


class Watch(TrainerCallback):
    """Feeds the recorder."""

    def __init__(self, recorder: Recorder, trainer: Any) -> None:
        self.recorder, self.trainer = recorder, trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Models are loaded."""
        self.recorder.start()

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """One rollout batch, which is one optimizer step, more."""
        parts = self.trainer._buffered_inputs
        self.recorder.batch(
            ids=torch.cat([part["prompts"] for part in parts]),
            prompt_mask=torch.cat([part["prompt_attention_mask"] for part in parts]),
            tokens=sum(int((part["labels"] != -100).sum()) for part in parts),
            steps=state.global_step,
            weights=self.trainer.model.state_dict,
        )

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """The recorder runs on after the last batch."""
        self.recorder.stop()


def config(asked: dict[str, Any], folder: str) -> IWOPDConfig:
    """The published objective on this project's batch; no recomputation in the backward pass, which is faster."""
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": asked["rows"],
        "max_steps": asked["batches"],
        "max_completion_length": asked["max_new_tokens"],
        "max_prompt_length": asked["max_prompt_tokens"],
        "max_length": asked["max_prompt_tokens"] + asked["max_new_tokens"],
        "temperature": 1.0,
        "top_p": 1.0,
        "lmbda": 1.0,
        "iw_opd_gamma": asked["w_max"] - 1,
        "max_grad_norm": 1.0,
        "seed": asked["seed"],
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "logging_steps": 1000,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return IWOPDConfig(**(settings | asked["config"]))


def build(asked: dict[str, Any], folder: str) -> IWOPDTrainer:
    """The trainer with models, data in the file's order, optimizer and schedule."""
    tokenizer = AutoTokenizer.from_pretrained(asked["student"])
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(asked[role], dtype=torch.float32) for role in ("student", "teacher")
    )
    prompts = [json.loads(line)["prompt"] for line in Path(asked["prompts"]).read_text().splitlines()]
    data = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": REPLY}]}
        for prompt in prompts
    ]
    optimizer = torch.optim.AdamW(student.parameters(), **asked["optimizer"])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, **asked["lr_scheduler"])
    trainer = IWOPDTrainer(
        model=student,
        teacher_model=teacher,
        args=config(asked, folder),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(data),
        optimizers=(optimizer, schedule),
    )
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    return trainer


def main() -> None:
    """Run and print."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    recorder = Recorder(Path(asked["folder"]), asked["every"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(asked, folder)
        trainer.add_callback(Watch(recorder, trainer))
        trainer.train()
    stops = trainer.generation_config.eos_token_id
    stop_ids = stops if isinstance(stops, list) else [stops]
    print("RESULT " + json.dumps(recorder.result() | {"stop_ids": stop_ids}))


if __name__ == "__main__":
    main()
