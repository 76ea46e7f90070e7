"""The teaching script is the engine: it leaves the weights that ``OPDModule.training_step`` leaves. And it runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_opd.models.student import StudentSettings, build_student
from lit_opd.objective import PolicyLoss
from lit_opd.rollout import Sampler, SamplingSettings, TransformersSampler
from lit_opd.scoring.model import ScoringModel
from lit_opd.step.scalars import scalars
from lit_opd.types import Rollout, StepRecord
from lit_opd.weighting import WeightingStrategy
from lit_opd.weighting.fractions import RandomFraction
from lit_opd.weighting.importance import ImportanceWeighting
from tests.helpers import fixed, tiny

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "one_step.py"
STEPS, SLOTS, VOCABULARY, EOS, SEED = 2, 9, 64, 1, 7
# prompt and response together run from long to short, the order in which the engine scores: sums then round alike
PROMPTS = [8, 7, 6, 5, 4, 3, 2]
LENGTHS = [9, 9, 7, 5, 3, 2, 1]
SCRIPT_STEPS = 8
TIME_LIMIT = 300


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The script as a module; ``examples`` is a folder of scripts and no package."""
    spec = importlib.util.spec_from_file_location("one_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    """Unequal rows of a sampler that disagrees with the student, so that some importance weights reach their cap."""
    sampled = fixed.rollout(lengths=LENGTHS, prompt_lengths=PROMPTS, truncated={2})
    noise = torch.randn(sampled.mask.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return replace(sampled, sampler_logprobs=3.0 * noise - 5.0)


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    """With steps so large that the second sees another student than the first."""
    return torch.optim.AdamW(parameters, lr=1e-2)


def by_the_engine(
    example: ModuleType,
    folders: tuple[str, str],
    rollout: Rollout,
    *,
    sampler: Sampler,
    weighting: WeightingStrategy,
) -> tuple[fixed.Collect, dict[str, Tensor]]:
    """Losses and records of ``STEPS`` training steps of a real Trainer on the rollout's prompts, and the weights behind them."""
    trained = fixed.module(
        folders,
        rollout,
        sampler=sampler,
        weighting=weighting,
        objective=PolicyLoss(),
        aggregation="sequence-mean",
        optimizer=optimizer,
        gradient_clip_norm=example.CLIP_NORM,
        seed=SEED,
    )
    return fixed.fit(trained, rollout.prompts, steps=STEPS), fixed.weights(trained)


def by_the_script(
    example: ModuleType,
    folders: tuple[str, str],
    rollout: Rollout,
    *,
    sampler: Sampler,
    weighting: WeightingStrategy,
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Rows of the table for as many steps, and the weights behind them."""
    student, teacher = (
        ScoringModel(build_student(StudentSettings(folder, dtype="float64")), vocabulary=VOCABULARY)
        for folder in folders
    )
    trainer = optimizer(student.parameters())
    start = SamplingSettings(
        max_new_tokens=SLOTS,
        stop_ids=tuple(sampler.stop_token_ids or [EOS]),
        pad_id=0,
        vocabulary=VOCABULARY,
        temperature=sampler.temperature,
        seed=SEED,
    )
    rows = [
        example.one_step(student, teacher, trainer, rollout.prompts, sampler, replace(start, step=step), weighting)
        for step in range(STEPS)
    ]
    return rows, {name: value.detach() for name, value in student.model.named_parameters()}


def table_row(loss: float, record: StepRecord) -> dict[str, float]:
    """What the engine logs under the names of the table."""
    logged = scalars(record)
    return {"loss": loss} | {
        name: float(logged[f"train/{name}"]) for name in ("disagreement", "weight_mean", "reverse_kl_k1")
    }


@pytest.mark.parametrize("weighting", [ImportanceWeighting(), RandomFraction(0.5)], ids=["weighs", "drops"])
def test_the_script_leaves_the_engines_weights_bit_for_bit(example, folders, rollout, weighting):
    """Two steps on rows of unequal length; the cap and the clip act, and the second strategy drops tokens at random."""
    parts = {"sampler": fixed.FixedSampler(rollout, max_new_tokens=SLOTS), "weighting": weighting}
    collect, theirs = by_the_engine(example, folders, rollout, **parts)
    rows, ours = by_the_script(example, folders, rollout, **parts)
    for loss, record, row in zip(collect.losses, collect.records, rows, strict=True):
        importance = (record.signal.student_logprobs - rollout.sampler_logprobs).exp()[rollout.mask]
        assert 0 < int((importance > example.IMPORTANCE_CAP).sum()) < len(importance)
        assert float(record.grad_norm) > example.CLIP_NORM
        assert row["loss"] == loss
        assert row == pytest.approx(table_row(loss, record), rel=1e-12)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_the_script_samples_what_the_engine_samples(example, folders, rollout):
    """Both draw from their own student as it stands; the engine then scores the rows in another order than the script."""
    sampler = TransformersSampler(max_new_tokens=SLOTS, temperature=0.7, stop_token_ids=list(range(1, 16)))
    parts = {"sampler": sampler, "weighting": ImportanceWeighting()}
    collect, theirs = by_the_engine(example, folders, rollout, **parts)
    rows, ours = by_the_script(example, folders, rollout, **parts)
    for loss, record, row in zip(collect.losses, collect.records, rows, strict=True):
        assert len(record.rollout.lengths.unique()) > 1
        assert row == pytest.approx(table_row(loss, record), rel=1e-12)
    for name, value in theirs.items():
        assert float((ours[name] - value).abs().max() / value.abs().max()) < 1e-12, name


@pytest.mark.slow
def test_the_script_runs_and_its_loss_falls():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(SCRIPT_STEPS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr
    header, *lines = [line.split() for line in done.stdout.splitlines()]
    assert header == ["step", "loss", "disagreement", "weight_mean", "reverse_kl_k1"]
    steps, loss, disagreement, weight_mean, reverse_kl = zip(*(map(float, line) for line in lines), strict=True)
    assert list(steps) == list(range(SCRIPT_STEPS))
    for column in (loss, disagreement, reverse_kl):  # the loss from 1.98 to 1.45
        assert sum(column[-2:]) < 0.85 * sum(column[:2])
    assert all(1.0 < mean < 1.5 for mean in weight_mean)  # between 1 and w_max
