"""The display: plain lines in a file, bars on a real (pseudo) terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import termios
import threading
from dataclasses import replace

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from callbacks import Progress, Summary
from lit_opd.evaluation import ValidationSettings
from lit_opd.rollout import TransformersSampler
from lit_opd.types import Replayed
from tests.helpers import fixed, tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


def run(folders: tuple[str, str], progress: Progress, *, steps: int = 4, epochs: int | None = None, **settings) -> None:
    rollout = fixed.rollout(lengths=[3, 6], prompt_lengths=[4, 2], truncated=set())
    sampler = TransformersSampler(max_new_tokens=4)
    trained = fixed.module(folders, rollout, dtype="float32", sampler=sampler, **settings)
    limits = {"steps": steps, "max_epochs": epochs, "limit_train_batches": 3}
    fixed.fit(trained, rollout.prompts, **limits, watch=progress, enable_progress_bar=True)


def test_a_log_file_gets_a_line_every_few_steps_with_the_numbers(folders):
    out = io.StringIO()
    run(folders, Progress(every=2, stream=out))
    lines = out.getvalue().splitlines()
    pattern = r"step (\d)/4 \| \d+ s left \| KL -?\d+\.\d{3} \| truncated \d+% \| [\d,]+ tokens/s"
    assert [re.fullmatch(pattern, line).group(1) for line in lines] == ["2", "4"]


def test_the_end_of_the_epochs_is_the_end_of_the_run(folders):
    """Three batches of two steps each, of a hundred steps that may be made."""
    out = io.StringIO()
    run(folders, Progress(every=4, stream=out), steps=100, epochs=1, mini_batches=2)
    lines = out.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["step 4/6", "step 6/6"] and "| 0 s left" in lines[-1]


def test_saved_responses_have_no_kl_of_the_students_own_samples(folders):
    """An average over none of them is left out, not shown as nan."""
    out, rollout = io.StringIO(), fixed.rollout(lengths=[3, 6], prompt_lengths=[4, 2], truncated=set())
    old = torch.ones(2, dtype=torch.bool)
    saved = replace(rollout, replayed=Replayed(old=old, known=old, weights_version=torch.zeros(2, dtype=torch.int64)))
    trained = fixed.module(folders, saved, dtype="float32")
    fixed.fit(trained, rollout.prompts, steps=1, watch=Progress(every=1, stream=out), enable_progress_bar=True)
    assert re.fullmatch(r"step 1/1 \| 0 s left \| truncated \d+% \| [\d,]+ tokens/s\n", out.getvalue())


def test_a_run_without_an_end_says_none(folders):
    out = io.StringIO()

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            trainer.should_stop = trainer.global_step == 2

    progress, rollout = Progress(every=2, stream=out), fixed.rollout(lengths=[3], prompt_lengths=[4], truncated=set())
    trained = fixed.module(folders, rollout, dtype="float32")
    trainer = {"steps": -1, "max_epochs": -1, "enable_progress_bar": True}
    fixed.fit(trained, rollout.prompts, watch=[progress, Stop()], **trainer)
    assert re.match(r"step 2 \| KL ", out.getvalue())


@pytest.mark.parametrize(("every", "told"), [(3, [4, 6, 10]), (4, [4, 8, 10]), (20, [10])])
def test_several_updates_a_batch_get_a_line_where_a_multiple_was_passed(folders, every, told):
    out = io.StringIO()
    run(folders, Progress(every=every, stream=out), steps=10, mini_batches=2)
    assert [int(line.split("/")[0].removeprefix("step ")) for line in out.getvalue().splitlines()] == told


def test_a_terminal_gets_a_bar_with_phases_and_is_left_clean(folders):
    """Written to the slave end of a narrow pseudo terminal and read back from the master."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 50))
    seen: list[bytes] = []

    def read() -> None:
        while True:
            try:
                seen.append(os.read(master, 4096))
            except OSError:
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with os.fdopen(slave, "w") as stream:
        progress = Progress(stream=stream)
        run(folders, progress)
        progress.print("a line of its own")
    reader.join(timeout=10)
    os.close(master)
    text = b"".join(seen).decode()
    assert "training" in text and "4/4" in text and "s left" in text and "/…" not in text  # the count is never cut
    assert any(phase in text for phase in ("sampling", "scoring", "updating"))
    assert "a line of its own" in text and progress._bars is None


class Phases(L.Callback):
    """Keeps how far each evaluation was said to be."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_phase(self, name: str, done: int, total: int) -> None:
        if name == "evaluating":
            self.seen.append((done, total))


@pytest.mark.parametrize(
    ("samples", "divergence", "answers", "told"),
    [
        (3, True, False, [(1, 1)]),  # without answers only the sample of the divergence is drawn
        (0, True, True, [(1, 1)]),
        (2, False, True, [(1, 2), (2, 2)]),
    ],
)
def test_a_validation_says_how_far_it_is_of_the_samples_it_draws(folders, samples, divergence, answers, told):
    """A count that never reaches its total would leave the bar of the evaluation standing."""
    prompts = fixed.rollout(lengths=[3, 6], prompt_lengths=[4, 2], truncated=set()).prompts
    prompts = replace(prompts, answers=("1", "2") if answers else (None, None))
    trained = fixed.module(
        folders,
        fixed.rollout(lengths=[3, 6], prompt_lengths=[4, 2], truncated=set()),
        dtype="float32",
        sampler=TransformersSampler(max_new_tokens=4),
        validation=ValidationSettings(greedy=False, samples=samples, divergence=divergence),
    )
    phases = Phases()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[phases]
    )
    trainer.validate(trained, DataLoader([prompts], batch_size=None), verbose=False)
    assert phases.seen == told


def test_the_sanity_check_is_no_validation(folders, tmp_path):
    """Lightning's check of a few batches, where a trainer makes one, is neither the start of ``summary.json`` nor said."""
    first, second = (
        fixed.rollout(lengths=[3, 6], prompt_lengths=[4, 2], truncated=set(), seed=seed).prompts for seed in (0, 1)
    )
    measured: list[float] = []

    class Measured(L.Callback):
        def on_validation_end(self, trainer, pl_module) -> None:
            measured.append(float(trainer.callback_metrics["val/reverse_kl"]))

    trained = fixed.module(
        folders,
        fixed.rollout(lengths=[3, 6], prompt_lengths=[4, 2], truncated=set()),
        dtype="float32",
        sampler=TransformersSampler(max_new_tokens=4),
        validation=ValidationSettings(greedy=False, samples=0),
    )
    summary, out = Summary(), io.StringIO()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, default_root_dir=tmp_path,
        num_sanity_val_steps=1, callbacks=[summary, Measured(), Progress(stream=out)],
    )  # fmt: skip
    loaders = ([first], [first, second])
    trainer.fit(trained, *(DataLoader(batches, batch_size=None) for batches in loaders))
    check, start, end = measured
    assert check != start != end
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found["reverse_kl_start"], found["reverse_kl_end"]) == (start, end)
    assert out.getvalue().count("validation at step 0") == 1


def test_other_ranks_say_nothing(folders):
    out = io.StringIO()
    progress = Progress(every=1, stream=out)
    progress.disable()
    rollout = fixed.rollout(lengths=[3, 6], prompt_lengths=[4, 2], truncated=set())
    trained = fixed.module(folders, rollout, dtype="float32")
    progress.enable = lambda: None  # Lightning enables the bar of rank 0
    fixed.fit(trained, rollout.prompts, steps=2, watch=progress, enable_progress_bar=True)
    assert out.getvalue() == ""
