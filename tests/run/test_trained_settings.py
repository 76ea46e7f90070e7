"""Which settings trained which steps: what counts as a change, what is refused, what summary and comparison say of it."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

from lit_opd.compare.differences import compare_runs
from lit_opd.compare.runs import read_run
from lit_opd.errors import InputError
from lit_opd.module import OPDModule
from lit_opd.rollout import TransformersSampler
from lit_opd.run.trained_settings import (
    GROUPS,
    RECORDED_LATER,
    TrainedSettings,
    differences,
    require_unchanged,
    settings_of,
    trained_settings,
)
from lit_opd.teacher import RemoteTeacher

LOADED = (RemoteTeacher, TransformersSampler)  # as in a run, whose classes are loaded
CONFIG: dict[str, Any] = {
    "seed_everything": 7,
    "trainer": {"max_steps": 4},
    "model": {
        "student": {"path": "s", "dtype": "float32", "gradient_checkpointing": False, "lora": None},
        "teacher": {"class_path": "lit_opd.teacher.RemoteTeacher", "init_args": {"path": "t", "urls": ["http://a"]}},
        "sampler": {"class_path": "lit_opd.rollout.TransformersSampler", "init_args": {"max_new_tokens": 8}},
        "weighting": {"class_path": "lit_opd.weighting.ImportanceWeighting", "init_args": {"w_max": 1.5}},
        "objective": {"class_path": "lit_opd.objective.PolicyLoss", "init_args": {"clip": None}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        "aggregation": "sequence-mean",
    },
    "data": {"train": "train.jsonl", "prompt_batch": 8, "seed": None, "template_options": {"thinking": True}},
}


def changed(**changes: Any) -> dict[str, Any]:
    """The config with values at dotted places."""
    config = copy.deepcopy(CONFIG)
    for name, value in changes.items():
        place = config
        *way, last = name.split("__")
        for part in way:
            place = place[part]
        place[last] = value
    return config


WEIGHTING = {"class_path": "lit_opd.weighting.Uniform", "init_args": {}}
RELOAD = {"class_path": "lit_opd.rollout.ReloadEndpoint", "init_args": {"folder": "a"}}
NO_WEIGHTS = {"token_budget", "validation", "max_skipped_steps"}  # memory, what is measured, when a run gives up
NO_WEIGHTS_OF_TRAINER = set(
    """accelerator strategy devices num_nodes logger callbacks fast_dev_run max_epochs min_epochs max_steps min_steps max_time
    limit_val_batches limit_test_batches limit_predict_batches val_check_interval check_val_every_n_epoch num_sanity_val_steps
    log_every_n_steps enable_checkpointing enable_progress_bar enable_model_summary deterministic benchmark inference_mode
    use_distributed_sampler profiler detect_anomaly barebones plugins sync_batchnorm reload_dataloaders_every_n_epochs
    default_root_dir enable_autolog_hparams model_registry""".split()
)
REFUSED_OF_TRAINER = {"accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"}  # by preflight


@pytest.mark.parametrize(
    ("group", "changes"),
    [
        ("weighting", {"model__weighting": WEIGHTING}),
        ("weighting", {"model__weighting__init_args__w_max": 4}),
        ("objective", {"model__objective__init_args__clip": 0.2}),
        ("objective", {"model__aggregation": "token-mean"}),
        ("models", {"model__student__path": "other"}),
        ("models", {"model__student__lora": {"rank": 4}}),
        ("models", {"model__teacher__init_args__path": "other"}),
        ("data", {"data__train": "other.jsonl"}),
        ("data", {"data__template_options": {"thinking": False}}),
        ("data", {"data__template_options": {}}),
        ("sampler", {"model__sampler__init_args__max_new_tokens": 9}),
        ("sampler", {"model__sampler__init_args__temperature": 0.7}),  # a setting that one side has only
        ("models", {"model__teacher__init_args__stop_mass": "sum"}),  # one side has it, not at its default
        ("seed", {"seed_everything": 8}),
        (
            "objective",
            {"model__reward": {"class_path": "lit_opd.evaluation.AnswerReward", "init_args": {"right": 2.0}}},
        ),
        ("models", {"trainer__precision": "bf16-true"}),
        ("data", {"trainer__overfit_batches": 1}),
        ("data", {"trainer__limit_train_batches": 1}),
        (
            "sampler",
            {"model__sampler__init_args__sync": RELOAD},
        ),  # from the weights the servers started with to the student's
    ],
)
def test_a_change_is_refused_until_its_group_is_named(group, changes):
    before, after = trained_settings(CONFIG), trained_settings(changed(**changes))
    given = {"checkpoint": Path("step-2.ckpt")}
    with pytest.raises(InputError, match=f"--allow_change {group}"):
        require_unchanged(before, after, allowed=[], **given)
    with pytest.raises(InputError, match=f"--allow_change {group}"):
        require_unchanged(before, after, allowed=[other for other in GROUPS if other != group], **given)
    assert require_unchanged(before, after, allowed=[group], **given) == [group]


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer__max_steps": 9},
        {"model__student__gradient_checkpointing": True},
        {"model__teacher__init_args__urls": ["http://b"]},  # a server that started anew elsewhere
        {"model__sampler__init_args__top_k": None},  # an option that came with a later version, off
        {"model__teacher__init_args__stop_mass": "own"},  # the same, at a default that is not nothing
        {"model__sampler__init_args__temperature": 1.0},
        {"model__sampler__init_args__sync": None},
        {"trainer__precision": "32-true"},  # what null is
        {"trainer__precision": 32},
        {"trainer__limit_train_batches": 1.0},
    ],
)
def test_what_changes_no_weight_is_no_change(changes):
    assert differences(trained_settings(CONFIG), trained_settings(changed(**changes))) == {}


def test_every_setting_is_in_a_group_or_without_effect():
    """Of the module and of the trainer: one that comes later must be put somewhere."""
    named = [name for names in GROUPS.values() for name in names]
    arguments = set(inspect.signature(OPDModule.__init__).parameters) - {"self"}
    ours = {name.removeprefix("model.") for name in named if name.startswith("model.")}
    assert ours | NO_WEIGHTS == arguments and not ours & NO_WEIGHTS
    known = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    theirs = {name.removeprefix("trainer.") for name in named if name.startswith("trainer.")}
    assert theirs <= known <= theirs | NO_WEIGHTS_OF_TRAINER | REFUSED_OF_TRAINER and not theirs & NO_WEIGHTS_OF_TRAINER


def test_how_weights_travel_and_who_grades_change_no_weight():
    def asked(sync: dict[str, Any], workers: int) -> dict[str, Any]:
        reward = {"class_path": "lit_opd.evaluation.AnswerReward", "init_args": {"num_workers": workers}}
        return trained_settings(changed(model__sampler__init_args__sync=sync, model__reward=reward))

    other = {"class_path": "lit_opd.rollout.RestartCommand", "init_args": {"command": "run"}}
    assert differences(asked(RELOAD, 2), asked(other, 4)) == {}


def test_what_an_older_checkpoint_does_not_name_is_unknown():
    """It goes on, whatever its reward was; what it does name is compared, and from then on all of it is."""
    older = trained_settings(CONFIG)
    for group, names in GROUPS.items():
        older[group] = {name: older[group][name] for name in names if name not in RECORDED_LATER}
    reward = {"class_path": "lit_opd.evaluation.AnswerReward", "init_args": {}}
    now = changed(model__reward=reward, trainer__precision="bf16-mixed")
    assert require_unchanged(older, trained_settings(now), allowed=[], checkpoint=Path("c")) == []
    assert list(differences(older, trained_settings(changed(model__epochs=2)))) == ["objective"]
    went_on = resumed([{"start": 0, "settings": older}], now, 2)
    assert len(went_on.summary(4)) == 1
    again = resumed(went_on.state(), changed(trainer__precision="bf16-mixed"), 4)
    assert [span["changed"] for span in again.summary(6)] == [[], ["objective"]]


def test_a_path_is_what_it_leads_to(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    ours, theirs = (trained_settings(changed(model__student__path=p)) for p in ("models", str(tmp_path / "models")))
    assert differences(ours, theirs) == {}


def test_the_optimizer_may_change_and_is_said():
    before, after = trained_settings(CONFIG), trained_settings(changed(model__optimizer__init_args__lr=1e-4))
    assert require_unchanged(before, after, allowed=[], checkpoint=Path("c")) == ["optimizer"]


def test_the_line_names_setting_both_values_and_remedies():
    before, after = trained_settings(CONFIG), trained_settings(changed(model__weighting=WEIGHTING))
    with pytest.raises(InputError) as caught:
        require_unchanged(before, after, allowed=[], checkpoint=Path("runs/x/step-2.ckpt"))
    said = str(caught.value)
    assert all(
        part in said for part in ("`model.weighting`", "ImportanceWeighting(w_max=1.5)", "Uniform()", "step-2.ckpt")
    )


# -- spans -------------------------------------------------------------------------------------------------------------


def resumed(state: list[dict[str, Any]], config: dict[str, Any], step: int) -> TrainedSettings:
    """A process that goes on from a checkpoint, whose state went through a file."""
    found = TrainedSettings(trained_settings(config))
    found.restore(json.loads(json.dumps(state)))
    found.begin(step)
    return found


def test_spans_follow_resumptions_and_a_return_to_an_earlier_checkpoint():
    first = TrainedSettings(trained_settings(CONFIG))
    first.begin(0)
    assert resumed(first.state(), CONFIG, 2).summary(4)[0]["steps"] == [1, 4]
    other = changed(model__weighting=WEIGHTING)
    second = resumed(first.state(), other, 2)
    spans = second.summary(6)
    assert [(span["steps"], span["strategy"], span["changed"]) for span in spans] == [
        ([1, 2], "ImportanceWeighting", []),
        ([3, 6], "Uniform", ["weighting"]),
    ]
    assert spans[1]["settings"] == {"weighting": {"model.weighting": WEIGHTING}}
    assert len(resumed(second.state(), other, 4).summary(6)) == 2  # goes on as it was
    assert len(resumed(second.state(), CONFIG, 2).summary(6)) == 1  # back before the change
    third = resumed(second.state(), changed(seed_everything=8), 5).summary(6)
    assert [span["changed"] for span in third] == [[], ["weighting"], ["weighting", "seed"]]


def test_a_run_without_a_command_line_says_nothing():
    trained = TrainedSettings()
    trained.begin(0)
    assert trained.summary(4) == trained.state() == []


def test_nothing_is_made_up_of_steps_that_nothing_is_known_of():
    assert [span["strategy"] for span in resumed([], CONFIG, 3).summary(5)] == ["unknown", "ImportanceWeighting"]


def test_an_older_checkpoint_was_trained_with_the_config_beside_it(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-2.ckpt"
    assert settings_of(checkpoint, {}) is None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    assert settings_of(checkpoint, {}) == trained_settings(CONFIG)
    spans = TrainedSettings(trained_settings(changed(seed_everything=9)))
    spans.begin(0)
    saved = {"trained_settings": spans.state()}
    assert settings_of(checkpoint, saved) == trained_settings(
        changed(seed_everything=9)
    )  # the checkpoint's own word first


# -- comparison --------------------------------------------------------------------------------------------------------


def run_folder(
    path: Path, *, strategy: str, trained: list[dict[str, Any]], config: dict[str, Any] | None = None
) -> Path:
    """A finished run of two evaluations."""
    path.mkdir()
    summary = {"steps": 2, "tokens": 20, "seconds": 1.0, "seed": 7, "strategy": strategy, "trained": trained}
    (path / "summary.json").write_text(json.dumps(summary))
    lines = ["step,train/tokens,val/greedy_accuracy", "0,,0.1", "1,10,", "2,10,0.5"]
    (path / "metrics.csv").write_text("\n".join(lines) + "\n")
    (path / "config.yaml").write_text(yaml.safe_dump(config or {}))
    return path


def test_a_run_of_two_settings_is_no_run_of_either(tmp_path):
    spans = resumed_spans()
    mixed = read_run(run_folder(tmp_path / "mixed", strategy="Uniform", trained=spans))
    pure = read_run(run_folder(tmp_path / "pure", strategy="Uniform", trained=spans[:1]))
    assert pure.variant == "Uniform" and mixed.variant.startswith(
        "Uniform [steps 1-1 ImportanceWeighting; steps 2-2 Uniform"
    )
    with pytest.raises(InputError, match="--baseline"):
        compare_runs([mixed], baseline="Uniform")
    named = read_run(tmp_path / "mixed", variant="named")
    notes = compare_runs([pure, named], baseline="Uniform").notes
    assert any(note.startswith("named, seed 7: not trained with one setting") for note in notes)
    assert not any("not trained with one setting" in note for note in compare_runs([pure], baseline="Uniform").notes)


def resumed_spans() -> list[dict[str, Any]]:
    first = TrainedSettings(trained_settings(CONFIG))
    first.begin(0)
    return resumed(first.state(), changed(model__weighting=WEIGHTING), 1).summary(2)


def test_an_older_run_that_went_on_from_another_is_marked(tmp_path):
    """Saved configs held the checkpoint once; the run's own folder is a plain resumption."""
    own, other = tmp_path / "own", tmp_path / "other"
    run_folder(own, strategy="Uniform", trained=[], config={"ckpt_path": str(own / "checkpoints" / "last.ckpt")})
    run_folder(other, strategy="Uniform", trained=[], config={"ckpt_path": str(own / "checkpoints" / "last.ckpt")})
    assert read_run(own).variant == "Uniform" and "went on from" in read_run(other).variant
