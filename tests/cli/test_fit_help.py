"""The first screen of ``fit --help`` names options that exist, and the pages for newcomers do too: the real parser is asked."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_opd.__main__ import main
from lit_opd.cli.fit_help import HELP, WHAT, first_screen, without_all
from lit_opd.prompts import PromptDataModule

ROOT = Path(__file__).resolve().parents[2]
SCREEN_LINES, SCREEN_COLUMNS = 40, 80
CONFIG = "lit_opd/testbed/assets/student"
VALUES: dict[str, Any] = {  # option -> a value that is not its default
    "run_dir": "here",
    "ckpt_path": "last",
    "overwrite": True,
    "model.student.path": "some/student",
    "model.student.lora.rank": 3,
    "model.teacher": "lit_opd.teacher.LocalTeacher",
    "model.teacher.path": "some/teacher",
    "data.train": "some.jsonl",
    "data.val": "other.jsonl",
    "data.teacher_column": "who",
    "data.max_prompt_tokens": 17,
    "model.sampler": "lit_opd.rollout.DecodeSampler",
    "model.sampler.max_new_tokens": 18,
    "model.sampler.temperature": 0.5,
    "model.weighting": "lit_opd.weighting.ImportanceWeighting",
    "model.weighting.w_max": 2.5,
    "model.objective": "lit_opd.objective.Divergence",
    "model.objective.kind": "jsd",
    "model.objective.top_k": 7,
    "model.objective.beta": 0.25,
    "model.aggregation": "token-mean",
    "model.mini_batches": 2,
    "trainer.max_steps": 19,
    "data.prompt_batch": 20,
    "data.samples_per_prompt": 2,
    "model.optimizer": "torch.optim.SGD",
    "model.optimizer.lr": 0.125,
    "model.token_budget": 21,
    "trainer.val_check_interval": 22,
    "checkpoint_every": 23,
    "trainer.devices": "2",
    "trainer.strategy": "ddp",
    "trainer.precision": "bf16-mixed",
    "seed_everything": 24,
}


def options(text: str) -> set[str]:
    """Names of the options in a text, as far as they are ours."""
    return set(
        re.findall(r"(?<![\w-])--((?:model|data|trainer)\.[\w.]+|[a-z_]+(?= [A-Z][\w]*  | last  | true  ))", text)
    )


def at(config: Any, name: str) -> Any:
    """A setting of a config that was printed; the settings of a class stand in its ``init_args``."""
    for part in name.split("."):
        inner = config.get("init_args", config) if "class_path" in config else config
        config = inner[part]
    return config.get("class_path", config) if isinstance(config, dict) else config


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """What the parser makes of a command line."""
    with pytest.raises(SystemExit) as ended:
        main(["fit", *words, "--print_config"])
    assert not ended.value.code
    return yaml.safe_load(capsys.readouterr().out)


def test_every_option_of_the_first_screen_and_of_the_pages_for_newcomers_is_one_of_the_parser(capsys):
    words = [f"--{name}={str(value).lower() if value is True else value}" for name, value in VALUES.items()]
    config = printed(words, capsys)
    assert {name: at(config, name) for name in VALUES} == VALUES
    pages = (HELP, (ROOT / "docs" / "coming-from.md").read_text().replace("--model.weighting.help", ""))
    named = [options(page.replace("--model.weighting.help", "")) - {"config"} for page in pages]
    assert named[0] <= set(VALUES) and len(named[0]) >= 25
    assert named[1] - set(VALUES) <= {"model.teacher.urls"} and len(named[1]) >= 20


def test_the_defaults_that_the_first_screen_states_are_those_of_the_parser(capsys):
    config = printed([f"--model.student.path={CONFIG}", f"--model.teacher.path={CONFIG}", "--data.train=x"], capsys)
    stated = dict(re.findall(r"^  --(\S+) .*default ([\w-]+)", HELP, flags=re.M))
    del stated["run_dir"]
    assert len(stated) >= 8
    assert {name: yaml.safe_load(value) for name, value in stated.items()} == {
        name: at(config, name) for name in stated
    }


def test_the_first_screen_fits_and_says_how_to_see_the_rest():
    text = first_screen(["fit", "--help"])
    assert text is not None and len(text.splitlines()) <= SCREEN_LINES
    assert max(map(len, text.splitlines())) <= SCREEN_COLUMNS
    assert "fit --help all" in text and text == first_screen(["fit", "--config", "quickstart", "-h"])


@pytest.mark.parametrize("command", ["preflight", *WHAT])
def test_relatives_of_fit_have_a_first_screen_of_options_that_they_have(command, capsys):
    text = first_screen([command, "--config", "quickstart", "--help"])
    assert text is not None and max(map(len, text.splitlines())) <= SCREEN_COLUMNS and f"{command} --help all" in text
    named = set(re.findall(r"^  --(\S+) ", text, flags=re.M)) - {"config"}
    assert len(named) >= 2
    with pytest.raises(SystemExit) as ended:
        main([command, "--help", "all"])
    listed = capsys.readouterr().out
    assert ended.value.code == 0 and all(f"--{name} " in listed for name in named)


@pytest.mark.parametrize("words", [[], ["fit"], ["compare", "--help"], ["fit", "--help", "all"], ["--help"]], ids=str)
def test_other_words_are_not_answered_by_it(words):
    assert first_screen(words) is None


def test_the_whole_list_is_what_the_parser_prints(capsys):
    assert without_all(["fit", "--help", "all"]) == ["fit", "--help"]
    assert without_all(["fit", "--run_dir", "all"]) == ["fit", "--run_dir", "all"]
    with pytest.raises(SystemExit):
        main(["fit", "--help", "all"])
    listed = capsys.readouterr().out
    assert "--trainer.accumulate_grad_batches" in listed and len(listed.splitlines()) > 500


def test_the_list_of_commands_knows_no_test_split():
    """``test`` reads ``data.val`` as ``validate`` does; a config names no other prompts for it."""
    from lit_opd.__main__ import HELP as COMMANDS

    (line,) = (line for line in COMMANDS.splitlines() if line.startswith("  test "))
    assert "split" not in line and "test" not in inspect.signature(PromptDataModule).parameters
