"""The model card says what the run did, in numbers worked out here, and nothing of the machine it ran on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_opd.errors import InputError
from lit_opd.report.model_card import is_hub_id, model_card, write_card

CONFIG: dict[str, Any] = {
    "seed_everything": 3,
    "trainer": {"max_steps": 40, "precision": None, "default_root_dir": "/scratch/ann/runs/iw"},
    "wandb": {"entity": "anns-team"},
    "model": {
        "student": {"path": "/scratch/ann/models/small|one", "lora": {"rank": 8, "alpha": 16.0}},
        "teacher": {"class_path": "lit_opd.teacher.LocalTeacher", "init_args": {"path": "/scratch/ann/models/large"}},
        "weighting": {"class_path": "lit_opd.weighting.ImportanceWeighting", "init_args": {"w_max": 1.5, "cap": None}},
        "objective": {"class_path": "lit_opd.objective.PolicyLoss", "init_args": {}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "betas": [0.9, 0.999]}},
        "sampler": {"class_path": "lit_opd.rollout.VLLMSampler", "init_args": {"urls": ["http://10.0.0.7:8000"]}},
    },
    "data": {"train": [{"path": "/scratch/ann/data/train.jsonl", "weight": None}], "val": None},
}
SUMMARY = {"greedy_start": 0.25, "greedy_end": 0.5, "avg_at_4_end": None, "steps": 40, "tokens": 12345}
ROW = {
    "set": "AIME <24>", "sample": 0, "reference": "1", "answer": "1", "category": "correct", "length": 3,
    "finish_reason": "stop", "text": "", "problems": 2, "samples": 1, "tokens": 9, "settings": "s",
}  # fmt: skip


def run_folder(
    folder: Path,
    config: Any = CONFIG,
    *,
    evaluated: dict[int, list[bool]] | None = None,
    settings: dict[int, str] | None = None,
) -> Path:
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    rows = [
        ROW | {"step": step, "problem_id": str(number), "correct": right, "settings": (settings or {}).get(step, "s")}
        for step, rights in (evaluated or {}).items()
        for number, right in enumerate(rights)
    ]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def parts(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_card_names_models_settings_and_measurements(tmp_path):
    front, text = parts(model_card(run_folder(tmp_path), title="iw", adapter=True))
    assert front == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["on-policy-distillation", "lit-opd", "lora"],
    }
    for line in (
        "# iw",
        r"| Base model | small\|one |",
        "| Teacher | large |",
        "| Weighting | ImportanceWeighting(w_max=1.5) |",
        "| Adapters | LoRA, rank 8, alpha 16.0 |",
        "| Training data | train.jsonl |",
        "| Optimizer | AdamW(betas=[0.9, 0.999], lr=0.001) |",
        "| Optimizer steps | 40 |",
        "| Sampled tokens | 12,345 |",
        "| Seed | 3 |",
        "| greedy accuracy | 0.250 | 0.500 |",
        "lit-opd fit --config config.yaml",
    ):
        assert line in text.splitlines(), line
    assert "avg@4" not in text and "have no\ninterval" in text


def test_a_card_holds_a_config_that_parses_and_no_folder_address_or_account(tmp_path):
    card = model_card(run_folder(tmp_path), title="iw")
    for private in ("/home", "ann", "10.0.0.7", str(tmp_path), "anns-team"):
        assert private not in card, private
    (config,) = [block.split("```")[0] for block in card.split("```yaml\n")[1:]]
    shown = yaml.safe_load(config)
    assert shown["model"]["weighting"]["init_args"] == {"w_max": 1.5} and shown["trainer"] == {"max_steps": 40}


def made(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


def test_a_card_shows_no_local_folder_under_any_name_at_any_depth(tmp_path, monkeypatch):
    """Paths of the package's own arguments and of somebody's own class, as a text, in a list, in a mapping and inside a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret" / "deep").mkdir(parents=True)
    mine, local = "/home/me/secret", "secret/deep"
    teacher = made(
        "lit_opd.teacher.CachedTeacher",
        teacher=made(
            "lit_opd.teacher.RemoteTeacher", urls=["http://h"], tokenizer_path=f"{mine}/tok", model=f"{mine}/big"
        ),
        folder=f"{mine}/scores",
    )
    tools = [made("lit_opd.turns.LookUp", entries=f"{mine}/table.json"), made("my.Tool", words=local)]
    command = ["sh", "-c", f"ssh me@secret-host python {mine}/serve.py"]
    engine = made(
        "lit_opd.rollout.VLLMSampler",
        sync=made("lit_opd.rollout.RestartCommand", command=command, folder=f"{mine}/w"),
        engine_options={"download_dir": f"file://{mine}/cache", "log": "~/secret/log", f"{mine}/key": "~me/secret/x"},
    )
    model = {
        "student": {"path": f"{mine}/student"},
        "teacher": teacher,
        "sampler": made(
            "lit_opd.rollout.ReplaySampler", paths=[f"{mine}/a.jsonl", local, "runs/secret/b.jsonl"], fresh=engine
        ),
        "reference": made("lit_opd.rollout.VLLMSampler", sync=made("lit_opd.rollout.NCCLTransfer", host="secret-host")),
        "reward": made(
            "my.Reward", environment=made("my.Env", tools=tools), note=f"a={mine}/x:{mine}/y, {mine}/my words"
        ),
    }
    data = {"train": made("my.Source", address=f"{mine}/train.jsonl"), "tokenizer": "secret/../secret/deep"}
    card = model_card(run_folder(tmp_path, {"model": model, "data": data}), title="iw")
    for private in ("/home", "me/", "~", "secret", "file:", str(tmp_path)):
        assert private not in card, private
    for name in ("tok", "big", "table.json", "a.jsonl", "b.jsonl", "cache", "log", "a=x:y, my words", "train.jsonl"):
        assert name in card, name


def test_what_is_no_local_path_stays_as_it_is(tmp_path, monkeypatch):
    """Hub ids, prompts, expressions, numbers that hold a stroke."""
    monkeypatch.chdir(tmp_path)
    told = {
        "system_prompt": "/no_think Say yes and/or no, 1/2 or 3 / 4; end with </answer>, see https://example.org/a/b",
        "train": "org/questions",
        "teacher_tokenizer": "org/tok",
        "filter": "level in 1/5,2/5",
        "id_column": "meta/id",
    }
    config = {"model": {"student": {"path": "org/small"}}, "data": told}
    (block,) = model_card(run_folder(tmp_path, config), title="iw").split("```yaml\n")[1:]
    assert yaml.safe_load(block.split("```")[0])["data"] == told


def test_evaluations_have_intervals_and_the_difference_is_paired(tmp_path):
    """Problem 0 is right before and after, problem 1 becomes right: 1/2 to 1, one problem of two gained."""
    run = run_folder(tmp_path, evaluated={0: [True, False], 40: [True, True]})
    text = parts(model_card(run, title="iw"))[1]
    assert (
        "| AIME &lt;24> | 2 | 40 | 1.000 [1.000, 1.000] | +0.500 [+0.000, +1.000] since step 0 |" in text.splitlines()
    )
    before = parts(model_card(run, title="iw", steps=0))[1]
    (row,) = [line for line in before.splitlines() if "AIME" in line]
    assert row == "| AIME &lt;24> | 2 | 0 | 0.500 [0.000, 1.000] | - |"


@pytest.mark.parametrize(
    ("asked", "change"),
    [
        ({0: "short", 20: "long", 40: "long"}, "+0.500 [+0.000, +1.000] since step 20"),
        ({0: "long", 20: "short", 40: "long"}, "+1.000 [+1.000, +1.000] since step 0"),
        ({0: "short", 20: "short", 40: "long"}, "-"),
    ],
)
def test_a_difference_is_of_evaluations_that_asked_in_the_same_way(tmp_path, asked, change):
    """A run that went on with longer answers: what it gained by them is no change of the model."""
    run = run_folder(tmp_path, evaluated={0: [False, False], 20: [True, False], 40: [True, True]}, settings=asked)
    (row,) = [line for line in model_card(run, title="iw").splitlines() if "AIME" in line]
    assert row == f"| AIME &lt;24> | 2 | 40 | 1.000 [1.000, 1.000] | {change} |"


def test_a_model_of_another_step_gets_no_number_of_the_runs_end(tmp_path):
    text = parts(model_card(run_folder(tmp_path), title="iw", steps=20))[1]
    assert "| Optimizer steps | 20 |" in text and "0.500" not in text and "12,345" not in text
    assert "Nothing was measured" in text


def test_a_hub_id_is_the_base_model_only_where_it_came_from_the_hub(tmp_path, monkeypatch):
    """A relative folder that is gone looks the same."""
    config = CONFIG | {"model": CONFIG["model"] | {"student": {"path": "ann/small"}}}
    run = run_folder(tmp_path, config)
    assert "base_model" not in parts(model_card(run, title="iw"))[0]
    cache = tmp_path / "cache"
    snapshot = cache / "models--ann--small" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "models--ann--small" / "refs").mkdir()
    (cache / "models--ann--small" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    front, text = parts(model_card(run, title="iw"))
    assert front["base_model"] == "ann/small" and "| Base model | ann/small |" in text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ann" / "small").mkdir(parents=True)
    assert not is_hub_id("ann/small") and "base_model" not in parts(model_card(run, title="iw"))[0]


def test_a_folder_without_a_runs_config_is_one_line(tmp_path):
    for content in (None, "model: 3", "[", "model: {student: {path: null}}"):
        if content is not None:
            (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(InputError, match="needs the config of the run") as refused:
            write_card(tmp_path, tmp_path, title="x")
        assert "\n" not in str(refused.value)
