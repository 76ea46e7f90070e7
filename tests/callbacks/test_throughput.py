"""The throughput callback counts what was sampled and trained, leaves evaluations out, and its shares are of one whole."""

from __future__ import annotations

import time

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from callbacks import EarlyAIMEEvaluation, Throughput
from lit_opd.rollout import TransformersSampler
from lit_opd.weighting.fractions import FirstFraction
from tests.helpers import fixed, tiny

STEPS, PAUSE = 4, 0.5
WHOLE = {"lengths": [5, 9, 1, 7], "prompt_lengths": [4, 2, 6, 1], "truncated": {1}}


class Pause(L.Callback):
    """Sleeps in every validation."""

    def on_validation_batch_start(self, *args) -> None:
        time.sleep(PAUSE)


class Kept(L.pytorch.loggers.logger.DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.rows.append({**metrics, "at": step})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Rows of two windows of two steps, one validation inside each, and the wall time of the fit."""
    rollout = fixed.rollout(**WHOLE)
    folders = tiny.pair(tmp_path_factory.mktemp("models"))
    trained = fixed.module(
        folders, rollout, weighting=FirstFraction(0.5), optimizer=lambda p: torch.optim.SGD(p, lr=1e-3)
    )
    trained.validation.greedy, trained.validation.samples = False, 0
    logger = Kept()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=STEPS, logger=logger, callbacks=[Throughput(every=2), Pause()], val_check_interval=2,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    loaders = (DataLoader([rollout.prompts] * n, batch_size=None) for n in (STEPS, 1))
    start = time.perf_counter()
    trainer.fit(trained, *loaders)
    seconds = time.perf_counter() - start
    return [row for row in logger.rows if "throughput/share_other" in row], seconds


def test_a_row_at_the_end_of_each_window(run):
    assert [row["at"] for row in run[0]] == [2, 4]


def test_rates_count_sampled_and_kept_tokens(run):
    sampled = sum(WHOLE["lengths"])
    kept = sum(-(-length // 2) for length in WHOLE["lengths"])
    for row in run[0]:
        rates = [row[f"throughput/{name}_tokens_per_second"] for name in ("sampled", "trained")]
        assert rates[1] / rates[0] == pytest.approx(kept / sampled)


def test_evaluations_are_no_part_of_a_window(run):
    rows, seconds = run
    windows = [2 * sum(WHOLE["lengths"]) / row["throughput/sampled_tokens_per_second"] for row in rows]
    validations = 3 * PAUSE  # at the start and twice inside
    assert sum(windows) < seconds - validations


class Hours(L.Callback):
    """A clock of its own, so that a busy machine changes nothing: an hour a step, a hundred a batch of answers of a set."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def on_train_batch_start(self, *args) -> None:
        self.now += 3600.0

    def on_phase(self, name: str, done: int, total: int) -> None:
        if name.startswith("evaluating "):
            self.now += 360_000.0


@pytest.mark.parametrize("first", [True, False])
def test_evaluation_sets_are_no_part_of_a_window(tmp_path, monkeypatch, first):
    """Whichever of the two callbacks comes first."""
    hours = Hours()
    monkeypatch.setattr("callbacks.throughput.time", hours)
    (tmp_path / "aime.jsonl").write_text('{"problem": "ab", "answer": "1"}\n')
    rollout = fixed.rollout(lengths=[3, 6], prompt_lengths=[4, 2], truncated=set())
    trained = fixed.module(tiny.pair(tmp_path), rollout, dtype="float32", sampler=TransformersSampler(max_new_tokens=4))
    evaluation = EarlyAIMEEvaluation(
        str(tmp_path / "aime.jsonl"), steps=[0, 1, 2], samples=2, prompt_suffix=None, chat_template=False
    )
    watch = [evaluation, Throughput(every=1)] if first else [Throughput(every=1), evaluation]
    logger = Kept()
    settings = {"logger": logger, "default_root_dir": tmp_path, "limit_val_batches": 0}
    records = fixed.fit(trained, rollout.prompts, steps=3, watch=[*watch, hours], **settings).records
    rows = [row for row in logger.rows if "throughput/share_other" in row]
    assert [row["at"] for row in rows] == [1, 2, 3]
    windows = [  # seconds
        float(record.sampled_tokens) / row["throughput/sampled_tokens_per_second"]
        for record, row in zip(records, rows, strict=True)
    ]
    assert windows == pytest.approx([3600.0] * 3)


def test_shares_are_of_one_whole_and_memory_is_that_of_a_process(run):
    for row in run[0]:
        shares = [value for name, value in row.items() if "share_" in name]
        assert len(shares) == 4
        assert sum(shares) == pytest.approx(1.0)
        assert min(shares) >= 0.0
        assert 100 < row["throughput/peak_memory_mib"] < 100_000


def test_a_window_without_steps_is_refused():
    with pytest.raises(ValueError, match=r"Throughput\.every"):
        Throughput(every=0)
