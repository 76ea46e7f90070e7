"""The display: plain lines in a file, bars on a real (pseudo) terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import termios
import threading

import pytest

from callbacks import Progress
from lit_opd.rollout import TransformersSampler
from tests.helpers import fixed, tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


def run(folders: tuple[str, str], progress: Progress, *, steps: int = 4, **settings) -> None:
    rollout = fixed.rollout(lengths=[3, 6], prompt_lengths=[4, 2], truncated=set())
    sampler = TransformersSampler(max_new_tokens=4)
    trained = fixed.module(folders, rollout, dtype="float32", sampler=sampler, **settings)
    fixed.fit(trained, rollout.prompts, steps=steps, watch=progress, enable_progress_bar=True)


def test_a_log_file_gets_a_line_every_few_steps_with_the_numbers(folders):
    out = io.StringIO()
    run(folders, Progress(every=2, stream=out))
    lines = out.getvalue().splitlines()
    pattern = r"step (\d)/4 \| \d+ s left \| KL -?\d+\.\d{3} \| truncated \d+% \| [\d,]+ tokens/s"
    assert [re.fullmatch(pattern, line).group(1) for line in lines] == ["2", "4"]


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


def test_other_ranks_say_nothing(folders):
    out = io.StringIO()
    progress = Progress(every=1, stream=out)
    progress.disable()
    rollout = fixed.rollout(lengths=[3, 6], prompt_lengths=[4, 2], truncated=set())
    trained = fixed.module(folders, rollout, dtype="float32")
    progress.enable = lambda: None  # Lightning enables the bar of rank 0
    fixed.fit(trained, rollout.prompts, steps=2, watch=progress, enable_progress_bar=True)
    assert out.getvalue() == ""
