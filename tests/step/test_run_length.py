"""How long a run is: what schedules, the sampler and the progress line take for its end is where Lightning ends it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from callbacks import PositionProfile
from lit_opd.rollout import LengthBudget, TransformersSampler
from tests.helpers import fixed, tiny

ROLLOUT = fixed.rollout(lengths=[3, 6], prompt_lengths=[4, 2], truncated=set())
BATCHES = 3  # of an epoch


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


def fit(folders, *, steps: int, epochs: int | None, updates: int = 1, **settings):
    trained = fixed.module(folders, ROLLOUT, dtype="float32", mini_batches=updates, **settings)
    trainer = {"max_epochs": epochs, "limit_train_batches": BATCHES}
    return trained, fixed.fit(trained, ROLLOUT.prompts, steps=steps, **trainer).records


@pytest.mark.parametrize(
    ("steps", "epochs", "updates", "total"),
    [
        (100, 1, 1, 3),
        (100, 2, 1, 6),
        (100, 1, 2, 6),
        (2, 1, 1, 2),
        (4, 1, 2, 4),  # more than the batches of the epoch, less than its steps
        (4, -1, 1, 4),
        (4, None, 2, 4),
        (-1, 2, 2, 12),
    ],
)
def test_progress_runs_to_the_first_bound_of_the_run(folders, steps, epochs, updates, total):
    """p of the batch that begins at step k is k / (steps of the run - 1)."""
    trained, records = fit(folders, steps=steps, epochs=epochs, updates=updates)
    begins = range(0, total, updates)
    assert [record.progress for record in records] == pytest.approx([step / (total - 1) for step in begins])
    assert trained.total_steps == trained.global_step == total


def test_a_schedule_ends_with_the_epochs(folders):
    sampler = TransformersSampler(max_new_tokens=8, stop_token_ids=[0])
    _, records = fit(folders, steps=100, epochs=1, sampler=sampler, length_budget=LengthBudget(2, 8))
    assert [int(record.rollout.lengths.max()) for record in records] == [2, 5, 8]


@pytest.mark.parametrize(("steps", "epochs"), [(BATCHES, -1), (100, 1)])
def test_the_end_is_drawn_once_and_its_validation_is_due(folders, tmp_path, steps, epochs):
    """Whichever bound ends the run: pictures of the last step come at the end alone, and its checkpoint, saved before the last
    validation, says that this is still to be made."""
    trained, shown = fixed.module(folders, ROLLOUT, dtype="float32"), []
    profile = PositionProfile(pictures_every=1, pictures_share=None)
    profile._show = lambda trainer: shown.append(trainer.global_step)  # type: ignore[method-assign]
    bounds = {"steps": steps, "max_epochs": epochs, "limit_train_batches": BATCHES, "default_root_dir": tmp_path}
    fixed.fit(trained, ROLLOUT.prompts, watch=profile, save=tmp_path / "end.ckpt", **bounds)
    assert shown == [2, 3]
    assert torch.load(tmp_path / "end.ckpt", weights_only=True)["validation_due"]


class Endless(IterableDataset):
    """The same prompts again and again."""

    def __iter__(self):
        while True:
            yield ROLLOUT.prompts


def test_data_without_a_length_leave_the_steps(folders, monkeypatch):
    monkeypatch.setattr(fixed, "DataLoader", lambda batches, batch_size: DataLoader(Endless(), batch_size=batch_size))
    trained = fixed.module(folders, ROLLOUT, dtype="float32")
    records = fixed.fit(trained, ROLLOUT.prompts, steps=3, max_epochs=1).records
    assert trained.total_steps == 3 and [record.progress for record in records] == [0.0, 0.5, 1.0]
