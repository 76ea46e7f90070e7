"""The page's own configuration through the command line, and what a run refuses before it starts."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from callbacks import default_callbacks
from lit_opd.cli.command import main
from lit_opd.report.replay import load_record
from tests.helpers import aligned

PAGE = Path(__file__).resolve().parents[2] / "docs" / "another-tokenizer.md"
SIZE = 2 + len(aligned.LETTERS) + len(aligned.MERGES)
SMALL = (
    "--trainer.max_steps 1 --trainer.accelerator cpu --data.prompt_batch 4 --model.sampler.max_new_tokens 6 "
    "--wandb.mode disabled --data.max_prompt_tokens 24 --num_threads 1 --run_dir run "
    "--trainer.callbacks+ callbacks.RolloutSamples --trainer.callbacks.save_rollouts_every 1"
).split()


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    """The folders and files that the page names."""
    student, teacher = (
        aligned.tokenizer(aligned.MERGES),
        aligned.tokenizer(aligned.MERGES[:1], order=[*range(9, -1, -1)]),
    )
    aligned.save(aligned.model(1, SIZE), tmp_path / "student", student)
    aligned.save(aligned.model(2, SIZE - 2), tmp_path / "teacher", teacher)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{text}"}}\n' for text in ("ab", "a de", "f", "cab")))
    (tmp_path / "config.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.S)[1])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_configuration_of_the_page_trains(world):
    main(default_callbacks, ["fit", "--config", "config.yaml", *SMALL])
    with (world / "run" / "metrics.csv").open(newline="") as file:
        shares = [float(row["train/aligned_fraction"]) for row in csv.DictReader(file) if row["train/aligned_fraction"]]
    record = load_record(next((world / "run" / "rollouts").iterdir()))
    assert record.chunks is not None and record.chunks.longest >= 1
    assert shares == [pytest.approx(int(record.chunks.lengths.sum()) / int(record.rollout.mask.sum()))]
    assert torch.equal(record.signal.mask, record.chunks.lengths > 0)
    assert (
        yaml.safe_load((world / "run" / "config.yaml").read_text())["model"]["teacher"]["init_args"]["chunks"] == "sum"
    )


def test_a_prediction_says_which_tokens_have_no_score(world):
    """Its means are those of ``samples.jsonl``: over what the teacher scores."""
    words = SMALL[2 : SMALL.index("--trainer.callbacks+")]
    words += [
        "--model.teacher.chunks",
        "single",
        "--model.teacher.min_aligned",
        "0",
        "--model.sampler.max_new_tokens",
        "20",
    ]
    main(default_callbacks, ["predict", "--config", "config.yaml", *words, "--data.val", "prompts.jsonl"])
    rows = [json.loads(line) for line in (world / "run" / "predictions.jsonl").read_text().splitlines()]
    tokens = [token for row in rows for token in row["tokens"]]
    unscored = [token for token in tokens if token.get("scored") is False]
    assert len(rows) == 4 and 0 < len(unscored) < len(tokens)
    assert all(token["student_logprob"] == token["teacher_logprob"] == token["weight"] == 0 for token in unscored)
    assert all(token["weight"] > 0 for token in tokens if "scored" not in token)


def test_too_little_in_common_is_one_line_before_anything_is_written(world, capsys):
    (world / "prompts.jsonl").write_text('{"prompt": "abcde"}\n' * 4)
    with pytest.raises(SystemExit) as ended:
        main(default_callbacks, ["fit", "--config", "config.yaml", *SMALL, "--model.teacher.chunks", "single"])
    told = [line for line in capsys.readouterr().err.splitlines() if "min_aligned" in line]
    assert ended.value.code == 2 and not (world / "run").exists()
    assert (
        len(told) == 1
        and "must be at most the share of tokens that the teacher scores, 0.000 (0 of 8), got 0.9" in told[0]
    )
