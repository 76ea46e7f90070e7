"""Every strategy and combinator through the command line's own parser: the overlays of configs/weighting, and a user's file.

Each overlay trains two steps on tiny real models, in micro-batches, in this process. What the step used is then compared
with the strategy called once on the whole batch. (Callbacks are left out, they draw pictures; test_cli has them.)
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from lit_opd.cli.command import main
from lit_opd.cli.parse_errors import USAGE_ERROR
from lit_opd.weighting import WeightingStrategy
from tests.helpers import tiny
from tests.helpers.signals import strategy_classes

REPO = Path(__file__).resolve().parents[2]
OVERLAYS = sorted((REPO / "configs" / "weighting").glob("*.yaml"))
STEPS, PROMPTS, SLOTS = 2, 8, 12
TOKEN_BUDGET = 60  # two or three rows a micro-batch
NO_VALIDATION = ["greedy", "false", "samples", "0", "divergence", "false"]
SAME = 1e-5  # float32, micro-batches of other widths


class Watch(Callback):
    """Keeps the module and the records."""

    def __init__(self) -> None:
        self.module: Any = None
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep them."""
        self.module = pl_module
        self.steps.append(outputs)


def sharp() -> torch.nn.Module:
    """A teacher whose entropies lie on both sides of the entropy gate's 0.8 nats."""
    model = tiny.qwen3(seed=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config like the quickstart's around two tiny models."""
    folder = tmp_path_factory.mktemp("every")
    student, teacher = tiny.save(tiny.qwen3(seed=1), folder / "student"), tiny.save(sharp(), folder / "teacher")
    rows = [{"id": f"p{i}", "prompt": f"{i} + {i * i} ="} for i in range(2 * PROMPTS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "seed_everything": 5,
        "num_threads": 1,
        "wandb": {"mode": "disabled"},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": STEPS, "enable_checkpointing": False},
        "model": {
            "student": {"path": student},
            "teacher": {"class_path": "lit_opd.teacher.LocalTeacher", "init_args": {"path": teacher}},
            "sampler": {"class_path": "lit_opd.rollout.TransformersSampler", "init_args": {"max_new_tokens": SLOTS}},
            "token_budget": TOKEN_BUDGET,
        },
        "data": {"train": str(folder / "train.jsonl"), "prompt_batch": PROMPTS, "max_prompt_tokens": 24},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(config))
    return folder / "base.yaml"


def train(base: Path, run_dir: Path, *overrides: str) -> Watch:
    """Train through ``main``; what was seen."""
    watch = Watch()
    validation = zip(NO_VALIDATION[::2], NO_VALIDATION[1::2], strict=True)
    flags = [part for name, value in validation for part in (f"--model.validation.{name}", value)]
    arguments = ["fit", "--config", str(base), *overrides, "--run_dir", str(run_dir), *flags]
    main(lambda: [watch], arguments)
    return watch


def refused(base: Path, run_dir: Path, capsys: Any, *overrides: str) -> str:
    """The one error that training ends with."""
    with pytest.raises(SystemExit) as stopped:
        train(base, run_dir, *overrides)
    assert stopped.value.code == USAGE_ERROR
    message = str(capsys.readouterr().err)
    assert "Traceback" not in message
    return message


# `make test` trains one a kind: drops tokens, reads entropies, the whole batch, lists, another strategy; `make test-slow` all
KINDS = {"last_fraction", "entropy_gate", "tip", "ta_opd", "product"}
TRAINED = [pytest.param(path, id=path.stem, marks=() if path.stem in KINDS else pytest.mark.slow) for path in OVERLAYS]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_every_overlay_names_a_strategy_with_settings_it_takes(overlay):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(WeightingStrategy, "weighting")
    given = yaml.safe_load(overlay.read_text())["model"]["weighting"]
    strategy = parser.instantiate_classes(parser.parse_object({"weighting": given})).weighting
    assert type(strategy).__name__ == given["class_path"].rpartition(".")[2]


@pytest.mark.parametrize("overlay", TRAINED)
def test_every_overlay_trains_and_weighs_as_its_strategy_does_on_the_whole_batch(base, tmp_path, overlay):
    watch = train(base, tmp_path / "run", "--config", str(overlay))
    strategy = watch.module.weighting
    named = yaml.safe_load(overlay.read_text())["model"]["weighting"]["class_path"].rpartition(".")[2]
    assert type(strategy).__name__ == named
    assert [output["step"].step for output in watch.steps] == list(range(1, STEPS + 1))
    for output in watch.steps:
        record = output["step"]
        assert len(set(record.rollout.lengths.tolist())) > 1  # ragged, or padding would go untested
        assert torch.equal(record.kept, strategy.kept(record.signal, record.progress))
        assert torch.allclose(record.weights, strategy(record.signal, record.progress), rtol=SAME, atol=SAME)
        assert record.weights.sum() > 0 and record.grad_norm > 0
        if record.signal.teacher_entropy is not None:
            low = (record.signal.teacher_entropy <= 0.8)[record.rollout.mask]
            assert low.any() and not low.all()
        assert float(output["loss"]) == pytest.approx(reported_loss(record), rel=1e-4)


def reported_loss(record: Any) -> float:
    """Mean over rows of the mean over kept tokens of -w A, one row at a time."""
    means = []
    for row in range(len(record.weights)):
        kept = [t for t, counts in enumerate(record.kept[row].tolist()) if counts]
        losses = [-float(record.weights[row, t] * record.signal.log_ratio[row, t]) for t in kept]
        means += [math.fsum(losses) / len(losses)] if losses else []
    return math.fsum(means) / len(means)


def test_every_strategy_has_an_overlay():
    assert {path.stem for path in OVERLAYS} >= KINDS
    named = {yaml.safe_load(path.read_text())["model"]["weighting"]["class_path"] for path in OVERLAYS}
    assert named == {f"lit_opd.weighting.{cls.__name__}" for cls in strategy_classes()}


# -- a class in the user's own file ------------------------------------------------------------------------------------

USER_FILE = """
import torch
from lit_opd.teacher import LocalTeacher
from lit_opd.weighting import WeightingStrategy

class Unfinished(WeightingStrategy):
    pass

class TooShort(WeightingStrategy):
    def weights(self, signal, progress):
        return torch.ones(len(signal))

class Negative(WeightingStrategy):
    def weights(self, signal, progress):
        return -torch.ones_like(signal.log_ratio)

class WithK(WeightingStrategy):
    def __init__(self, k: int = 1) -> None:
        super().__init__()
        self.k = k

    def weights(self, signal, progress):
        return self.k * torch.ones_like(signal.log_ratio)

class Mute(LocalTeacher):
    @property
    def provides(self):
        return frozenset()

    def score(self, rollout, **options):
        raise RuntimeError("a response was scored")
"""


@pytest.fixture
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``user_classes.py`` in the current folder."""
    (tmp_path / "user_classes.py").write_text(USER_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_an_abstract_class_is_named(base, user_file, capsys):
    message = refused(base, user_file / "run", capsys, "--model.weighting", "user_classes.Unfinished")
    assert "user_classes.Unfinished" in message and "is abstract" in message
    assert not (user_file / "run").exists()


def test_weights_of_a_wrong_shape_name_the_class_and_both_shapes(base, user_file, capsys):
    message = refused(base, user_file / "run", capsys, "--model.weighting", "user_classes.TooShort")
    assert "`TooShort.weights` must return a tensor [B, T] = (" in message
    rows, columns = message.split("[B, T] = (")[1].split(")")[0].split(", ")
    assert 1 <= int(rows) <= PROMPTS and 1 <= int(columns) <= SLOTS and f"got ({rows},)" in message


def test_negative_weights_name_the_class(base, user_file, capsys):
    message = refused(base, user_file / "run", capsys, "--model.weighting", "user_classes.Negative")
    assert "`Negative.weights` must be finite and >= 0" in message and "-1" in message


def test_an_unknown_parameter_of_a_users_class_is_named(base, user_file, capsys):
    overrides = ["--model.weighting", "user_classes.WithK", "--model.weighting.kk", "3"]
    message = refused(base, user_file / "run", capsys, *overrides)
    assert "kk" in message
    assert not (user_file / "run").exists()


@pytest.mark.parametrize("overlay", ["entropy_gate", "product"])
def test_a_teacher_without_entropies_is_refused_before_the_first_rollout(base, user_file, capsys, overlay):
    """``Mute.score`` would raise something else, and the run folder would be there."""
    path = str(REPO / "configs" / "weighting" / f"{overlay}.yaml")
    overrides = ["--config", path, "--model.teacher", "user_classes.Mute"]
    message = refused(base, user_file / "run", capsys, *overrides)
    assert "teacher_entropy" in message and "`Mute`" in message
    assert not (user_file / "run").exists()


def test_a_strategy_that_reads_the_students_entropy_takes_any_teacher(base, user_file):
    path = str(REPO / "configs" / "weighting" / "tip.yaml")
    with pytest.raises(RuntimeError, match="a response was scored"):
        train(base, user_file / "run", "--config", path, "--model.teacher", "user_classes.Mute")
