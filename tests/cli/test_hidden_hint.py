"""What only the teacher reads appears in nothing that a run leaves behind or says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from callbacks import default_callbacks
from lit_opd.cli.command import main
from lit_opd.evaluation import Reward
from tests.helpers import tiny

CANARY = "quartzvow9"


class All(Reward):
    """Every response is a good demonstration."""

    def score(self, responses, rollout):
        """1 each."""
        return [1.0] * len(responses)


PEER = {
    "class_path": "lit_opd.prompts.PeerDemonstration",
    "init_args": {"template": "{prompt} {solution} {demonstration}", "max_prompt_tokens": 48},
}
SAMPLED = {"teacher_prompt": PEER, "samples_per_prompt": 2}  # made after sampling
WAYS = {
    "columns": ({}, {"teacher_prompt": "{prompt} {solution}"}),
    "hindsight": ({"reward": f"{__name__}.All"}, SAMPLED),
}


def config(folder: Path, way: str) -> Path:
    """Self-distillation with a hint; a worked solution that holds it stands where answers are looked for."""
    model, data = WAYS[way]
    student, _ = tiny.pair(folder)
    rows = [{"id": str(n), "prompt": f"{n} + {n} =", "solution": f"{CANARY} {2 * n}"} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "seed_everything": 7,
        "num_threads": 1,
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 2, "val_check_interval": 1},
        "model": {
            "student": {"path": student},
            "teacher": {"class_path": "lit_opd.teacher.SelfTeacher", "init_args": {"update": "ema", "decay": 0.5}},
            "sampler": {"class_path": "lit_opd.rollout.TransformersSampler", "init_args": {"max_new_tokens": 5}},
            **model,
        },
        "data": {
            "train": str(folder / "rows.jsonl"),
            "val_fraction": 0.4,
            "prompt_batch": 2,
            "max_prompt_tokens": 24,
            **data,
        },
        "wandb": {"mode": "offline"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("way", ["columns", pytest.param("hindsight", marks=pytest.mark.slow)])
def test_the_hint_is_in_no_file_and_no_line_of_a_fit_and_a_prediction(tmp_path, capfd, recwarn, way):
    path, run = config(tmp_path, way), tmp_path / "run"
    words = ["--config", str(path), "--run_dir", str(run)]
    main(default_callbacks, ["fit", *words])
    main(default_callbacks, ["predict", *words, "--ckpt_path", "last"])
    files = [file for file in run.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {"samples.jsonl", "metrics.csv", "report.html", "predictions.jsonl", "summary.json"} <= names
    assert {"config.json", "last.ckpt"} <= names
    for found in files:
        assert CANARY.encode() not in found.read_bytes(), found
    spoken = capfd.readouterr()
    said = spoken.out + spoken.err + "".join(str(warning.message) for warning in recwarn)
    assert "step 2/2" in said and CANARY not in said
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples and all(sample["answer"] is None for sample in samples)
    assert {sample["disagreement"] > 0 for sample in samples} == {True}  # the teacher did read it
