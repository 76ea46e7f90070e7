"""docs/strategies.md says what the code does: tables against classes, the user's strategy against a slow loop."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.pytorch import Callback

import lit_opd.advantage
import lit_opd.objective
from benchmarks.studies import weight_curves
from lit_opd.advantage import AdvantageTransform
from lit_opd.cli.command import main
from lit_opd.objective import Aggregation, Objective
from lit_opd.types import FinishReason
from tests.helpers.signals import (
    FLOAT_FIELDS,
    all_examples,
    changed_columns,
    holey_mask,
    random_signal,
    strategy_classes,
)

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs" / "strategies.md").read_text()
SMALL = ["--trainer.max_steps", "2", "--data.prompt_batch", "8", "--wandb.mode", "disabled"]
SMALL += ["--model.validation.greedy", "false", "--model.validation.samples", "0"]
SMALL += ["--model.validation.divergence", "false", "--data.train", "few.jsonl", "--data.val", "few.jsonl"]


def section(title: str) -> str:
    """From a heading of the second level to the next."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def tables(text: str, first: str) -> list[list[str]]:
    """Cells of every row of the tables whose first column is called ``first``."""
    rows, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if cells and cells[0].lstrip("| ") == first:
            inside = True
        elif not cells:
            inside = False
        elif inside and set(line) != {"|", "-"}:
            rows.append(cells)
    return rows


def signature(cls: type) -> str:
    """``Name(required, optional=default)`` as the page writes it."""
    parameters = [p for p in inspect.signature(cls).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    words = [p.name if p.default is p.empty else f"{p.name}={p.default!r}".replace("'", '"') for p in parameters]
    return f"{cls.__name__}({', '.join(words)})"


STRATEGIES = {re.search(r"`(\w+)\(", row[0])[1]: row for row in tables(section("The strategies"), "strategy")}  # type: ignore[index]


def test_every_strategy_has_exactly_one_row():
    named = [re.search(r"`(\w+)\(", row[0])[1] for row in tables(section("The strategies"), "strategy")]
    assert sorted(named) == [cls.__name__ for cls in strategy_classes()]
    assert all(len(row) == 7 for row in STRATEGIES.values())


@pytest.mark.parametrize("cls", strategy_classes(), ids=lambda cls: cls.__name__)
def test_a_row_says_what_the_class_says(cls):
    name, _, reads, _, _, depends_on, _ = STRATEGIES[cls.__name__]
    assert f"`{signature(cls)}`" in name
    overlay = re.search(r"\]\(\.\./(configs/weighting/\w+\.yaml)\)", name)[1]
    assert f"lit_opd.weighting.{cls.__name__}\n" in (REPO / overlay).read_text()
    examples = [example for _, example in all_examples() if type(example) is cls]
    said = {example.depends_on for example in examples}
    inherited = {"Product": "the widest of its factors", "PerTurn": "as the inner one"}
    assert depends_on == (inherited.get(cls.__name__) or said.pop())
    inner = "strategy" in inspect.signature(cls).parameters or cls.__name__ == "Product"
    assert inner or set(re.findall(r"`(\w+)`", reads)) == set().union(*(example.requires for example in examples))
    assert inner or ("whole batch" in reads) == (examples[0].scope == "batch")


def subclasses(module: Any, base: type) -> list[type]:
    found = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if issubclass(cls, base)]
    return [cls for cls in found if not inspect.isabstract(cls)]


def test_the_tables_around_the_weights_are_complete():
    around = section("Around the weights")
    transforms = {row[0] for row in tables(around, "transform")}
    assert transforms == {f"`{signature(cls)}`" for cls in subclasses(lit_opd.advantage, AdvantageTransform)}
    objectives = {row[0] for row in tables(around, "objective")}
    assert objectives == {f"`{signature(cls)}`" for cls in subclasses(lit_opd.objective, Objective)}
    assert {row[0] for row in tables(around, "aggregation")} == {f"`{name}`" for name in get_args(Aggregation)}


def test_every_link_of_the_page_exists():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", PAGE) if not target.startswith("http")]
    assert targets and not [target for target in targets if not (REPO / "docs" / target).exists()]


# -- not generated -----------------------------------------------------------------------------------------------------


def test_the_command_that_stops_responses_does(workplace):
    """With rows of both kinds, and every name it logs in the docs."""
    (command,) = commands(section("The strategies"))
    watch = Watch()
    main(lambda: [watch], [*command, *SMALL, "--data.prompt_batch", "32"])
    for record in watch.records:
        lengths, stopped = record.rollout.lengths, record.finish_reason == FinishReason.DRIFT
        assert 0 < int(stopped.sum()) < len(lengths)
        assert lengths[stopped].max() < lengths[~stopped].max()
    (log,) = workplace.glob("runs/*/metrics.csv")
    names = set(log.read_text().splitlines()[0].split(",")) - {"step", "epoch"}
    pages = "".join(path.read_text() for path in (REPO / "docs").glob("*.md"))
    assert "train/stopped_fraction" in names
    assert not [name for name in names if f"`{name}`" not in pages and "/band_" not in name]


# -- write your own ----------------------------------------------------------------------------------------------------


class Watch(Callback):
    """Keeps the strategy and the records."""

    def __init__(self) -> None:
        self.strategy: Any = None
        self.records: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep them."""
        self.strategy = pl_module.weighting
        self.records.append(outputs["step"])


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository as seen from the command line, with the page's code in ``my_strategies.py``."""
    for name in ("configs", "lit_opd"):
        (tmp_path / name).symlink_to(REPO / name)
    (code,) = re.findall(r"```python\n(.*?)```", section("Write your own in twenty lines"), flags=re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    (tmp_path / "my_strategies.py").write_text(code)
    rows = (REPO / "lit_opd" / "testbed" / "assets" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(rows[:64]))  # of thousands, all of which a run would read
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def commands(text: str) -> list[list[str]]:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, flags=re.S) for line in block.splitlines()]
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("python train.py")]


def test_the_users_strategy_trains_by_its_command_and_weighs_by_its_sentence(workplace):
    (command,) = commands(section("Write your own in twenty lines"))
    watch = Watch()
    main(lambda: [watch], [*command, *SMALL, "--data.prompt_batch", "32"])
    assert (watch.strategy.threshold, watch.strategy.after) == (2.0, 0.2)
    assert len(watch.records) == 2
    for record in watch.records:
        for row in range(len(record.weights)):
            drifted = False
            for place in record.rollout.mask[row].nonzero().flatten().tolist():
                assert float(record.weights[row, place]) == pytest.approx(0.2 if drifted else 1.0)
                drifted = drifted or abs(float(record.signal.log_ratio[row, place])) > 2.0
        assert {0.2, 1.0} <= {round(value, 6) for value in record.weights.flatten().tolist()}  # both cases occur
    assert_reads_the_prefix_only(watch.strategy)


def assert_reads_the_prefix_only(strategy: Any) -> None:
    """Other tokens from column t on leave the weights up to column t alone."""
    signal = random_signal(holey_mask(8, 23))
    for first in range(23):
        later = torch.arange(23) >= first
        names = tuple(name for name in FLOAT_FIELDS if getattr(signal, name) is not None)
        other = changed_columns(signal, names, later, seed=first)
        assert torch.equal(strategy(other)[:, : first + 1], strategy(signal)[:, : first + 1])


def test_the_commands_at_the_top_of_the_page_train(workplace):
    top = commands(PAGE.split("\n## ")[0])
    assert len(top) == 3
    for number, command in enumerate(top):
        main(list, [*command, *SMALL, "--run_dir", str(workplace / f"run-{number}")])


# -- the picture -------------------------------------------------------------------------------------------------------


def test_the_picture_has_a_panel_of_every_strategy():
    drawn = [name for _, names in weight_curves.FAMILIES.values() for name in names]
    assert sorted(drawn) == [cls.__name__ for cls in strategy_classes()]


@pytest.mark.parametrize("families", [1, pytest.param(None, marks=pytest.mark.slow)], ids=["one", "all"])
def test_the_picture_is_drawn(tmp_path, monkeypatch, families):
    """Every strategy weighs; a panel each of the last families, or of all."""
    drawn = dict(list(weight_curves.FAMILIES.items())[-families if families else 0 :])
    monkeypatch.setattr(weight_curves, "FAMILIES", drawn)
    weight_curves.main(["--out", str(tmp_path / "curves.png"), "--rows", "8"])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_pictures_command_stands_in_the_page():
    default = weight_curves.__doc__.split("\n\n")[1].strip()
    assert (
        f"`{default}`" in PAGE
        and f"all {weight_curves.ROWS} responses" in PAGE
        and f"seed {weight_curves.SEED}" in PAGE
    )
