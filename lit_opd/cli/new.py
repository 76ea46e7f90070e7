"""``new``: a folder with a weighting of your own, its config and its test, which run as they are."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from lit_opd.errors import InputError
from lit_opd.files import replace_or_refuse
from lit_opd.shipped import config_file, program

WEIGHTING = '''"""A weighting of your own."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.masked import positions
from lit_opd.types import TokenSignal
from lit_opd.weighting import WeightingStrategy
from lit_opd.weighting.base import DependsOn


class MyWeighting(WeightingStrategy):
    """Full weight up to ``start`` tokens, then falling by half every ``half_life`` tokens.

    Args:
        start: tokens of full weight.
        half_life: tokens in which the weight halves.
    """

    def __init__(self, start: float = 10.0, half_life: float = 20.0) -> None:
        super().__init__()
        self.start, self.half_life = start, half_life

    @property
    def depends_on(self) -> DependsOn:
        """What the weight of token t reads: here its position, which is known before the token is drawn."""
        return "prefix"

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """[B, T], at least 0; what stands where ``signal.mask`` is False is ignored.

        ``signal`` has the log-probs of student and teacher (nats), ``signal.log_ratio`` their difference, and more:
        ``lit_opd.types.TokenSignal``. ``progress`` is the share of the training that is done, in [0, 1].
        """
        past = (positions(signal.mask).float() - self.start).clamp(min=0)
        return torch.exp2(-past / self.half_life)
'''

TEST = '''"""What every weighting must keep: python -m pytest test_my_weighting.py"""

from __future__ import annotations

from dataclasses import replace

import torch
from my_weighting import MyWeighting

from lit_opd.types import TokenSignal


def signal(rows: int = 4, columns: int = 30) -> TokenSignal:
    """Random log-probs of rows of different lengths."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (-torch.rand(rows, columns, generator=draw) for _ in range(2))
    mask = torch.arange(columns) < torch.tensor([columns, 12, 1, 0])[:rows].unsqueeze(-1)
    keys = torch.arange(rows)
    return TokenSignal(student_logprobs=student, teacher_logprobs=teacher, mask=mask, row_keys=keys, step=0)


def test_weights_are_finite_and_at_least_zero_and_zero_after_a_row():
    given = signal()
    weights = MyWeighting()(given, 0.5)
    assert weights.shape == given.mask.shape and bool(torch.isfinite(weights).all()) and bool((weights >= 0).all())
    assert float(weights[~given.mask].abs().sum()) == 0.0


def test_a_weight_reads_no_token_from_its_own_on():
    """As ``depends_on`` says; leave the test out where a weight may look ahead ("sequence")."""
    given, weighting = signal(), MyWeighting()
    for t in range(given.mask.shape[1]):
        later = torch.arange(given.mask.shape[1]) >= t
        changed = replace(given, student_logprobs=given.student_logprobs - 1.0 * later)
        assert torch.equal(weighting(changed, 0.5)[:, : t + 1], weighting(given, 0.5)[:, : t + 1])


def test_the_weight_falls_with_the_position():
    weights = MyWeighting(start=10, half_life=20)(signal(), 0.5)[0]
    assert weights[:10].eq(1).all() and bool((weights[10:].diff() < 0).all())
    assert abs(float(weights[29]) - 0.5) < 1e-6  # token 30: 20 after the start
'''

README = """# {name}

    {program} fit --config config.yaml                                        # about a minute on two cores
    {program} fit --config config.yaml --model.weighting Uniform --run_dir runs/uniform
    {program} compare runs --runs runs/my_weighting runs/uniform --baseline Uniform --out runs/compare
    {program} sweep --config config.yaml --weightings Uniform my_weighting.MyWeighting --seeds 1 2 3   # with intervals
    python -m pytest test_my_weighting.py

Run them in this folder. `my_weighting.py` is the weighting: change `weights`. `config.yaml` is the embedded task: change
`model.student.path`, `model.teacher.init_args.path` and `data.train` to your own.
"""


def run(words: Sequence[str]) -> None:
    """Write the folder.

    Raises:
        InputError: there is something of that name.
    """
    own = ArgumentParser(prog=f"{program()} new", description=(__doc__ or "").split(": ", 1)[1])
    own.add_argument("folder", type=Path, help="to make, such as my_study")
    folder: Path = own.parse_args(list(words)).folder
    if folder.exists():
        raise InputError(f"`new` must be given a folder that is not there yet, got {folder}; give another name")
    folder.mkdir(parents=True)
    texts = {
        "my_weighting.py": WEIGHTING,
        "test_my_weighting.py": TEST,
        "config.yaml": _config(),
        "README.md": README.format(name=folder.name, program=program()),
    }
    for name, text in texts.items():
        replace_or_refuse(folder / name, text.encode())
    print(f"wrote {folder}: {', '.join(texts)}\nnext: cd {folder} && {program()} fit --config config.yaml")


def _config() -> str:
    """The quickstart with the weighting of the folder."""
    path = config_file("quickstart")
    if path is None:
        raise InputError(
            "`new` must find configs/quickstart.yaml of the installation, got none; install the package again"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    start = lines.index("  weighting:")
    end = next(at for at in range(start + 1, len(lines)) if not lines[at].startswith("    "))
    own = ["  weighting:", "    class_path: my_weighting.MyWeighting", "    init_args:", "      half_life: 20.0"]
    head = ["# The embedded task with a weighting of your own, run in this folder", *lines[1:start]]
    return "\n".join([*head, *own, *lines[end:], "run_dir: runs/my_weighting"]) + "\n"
