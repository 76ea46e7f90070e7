"""Bad inputs from the table of ``bad_inputs``: each ends with one clear line before the first step and writes nothing."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from callbacks import default_callbacks
from lit_opd.cli.command import OPDCLI, main
from lit_opd.errors import InputError
from lit_opd.prompts.encoding import PromptEncoder
from lit_opd.prompts.sources import DataSource, read_prompts
from lit_opd.testbed import tokenizer as testbed
from tests.cli.test_cli import write_prompts
from tests.helpers import bad_inputs as bad
from tests.helpers import tiny
from tests.prompts.test_prompts import END, START, make_tokenizer, module_of, write_lines

ROOT = Path(__file__).resolve().parents[2]
LEAST_INPUTS, LEAST_SITES = 150, 40
LONGEST_SECONDS = 60.0  # of one input on a busy machine; none takes more than two on a quiet one


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, prompts and a config that names them."""
    folder = tmp_path_factory.mktemp("base")
    student, teacher = tiny.pair(folder)
    config = {
        "num_threads": 1,
        "wandb": {"mode": "disabled"},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 4, "num_sanity_val_steps": 0},
        "model": {
            "student": {"path": student},
            "teacher": {"class_path": "lit_opd.teacher.LocalTeacher", "init_args": {"path": teacher}},
            "sampler": {"class_path": "lit_opd.rollout.TransformersSampler", "init_args": {"max_new_tokens": 8}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
        "data": {"train": str(write_prompts(folder / "train.jsonl")), "prompt_batch": 8, "max_prompt_tokens": 24},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, in which nothing may appear."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


class Ledger:
    """What the inputs of a table led to."""

    def __init__(self, nowhere: Path) -> None:
        self.nowhere, self.wrong = nowhere, list[str]()
        self.count, self.sites = 0, set[str]()

    def folder(self) -> Path:
        """A new one for the coming input."""
        path = self.nowhere / f"case{self.count}"
        path.mkdir()
        return path

    def note(self, name: str, attempt: Callable[[], str], needles: list[str]) -> None:
        """Run one input; ``attempt`` returns its message or raises."""
        self.count += 1
        start = time.monotonic()
        try:
            complaint = complain(attempt(), needles)
        except Exception as error:
            complaint = "".join(traceback.format_exception(error)[-3:])
        if time.monotonic() - start > LONGEST_SECONDS:
            complaint = f"took {time.monotonic() - start:.0f} s"
        if left := sorted(path.name for path in (self.nowhere / "cwd").iterdir()):
            complaint = f"wrote {left}"
        if complaint:
            self.wrong.append(f"{name}: {complaint}")

    def refused(self, attempt: Callable[[], Any]) -> str:
        """The message of the InputError that ``attempt`` raises, its site noted."""
        try:
            attempt()
        except InputError as error:
            self.sites.add(site(error))
            return str(error)
        return "nothing was raised"


def complain(message: str, needles: list[str]) -> str | None:
    """What is wrong with a message."""
    missing = [needle for needle in needles if needle not in message]
    if missing:
        return f"{message!r} lacks {missing}"
    if len(message.splitlines()) != 1 or not message.strip() or "Traceback" in message:
        return f"{message!r} is not one line"
    return None


def site(error: BaseException) -> str:
    """file:line of the raise, or of the ``require``: the innermost frame in this project."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(ROOT)]
    frames = [frame for frame in frames if frame.name != "require"]
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}"


def spoken(attempt: Callable[[], Any], capsys: pytest.CaptureFixture[str], sites: set[str]) -> str:
    """The error line of a command that ends with status 2."""
    capsys.readouterr()
    try:
        attempt()
    except SystemExit as stopped:
        assert stopped.code == 2
        origin = stopped.__cause__ or stopped
        sites.add(site(origin))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return "\n".join(said) or "nothing was raised"


def test_every_bad_input_is_one_clear_line_that_names_field_value_and_remedy_and_writes_nothing(
    base: Path, nowhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(nowhere)
    for cases in (bad.data_files, bad.data_modules, bad.models, bad.constructors):
        for name, attempt, needles in cases():
            world = bad.World(ledger.folder(), base, base / "train.jsonl")
            ledger.note(name, lambda attempt=attempt, world=world: ledger.refused(lambda: attempt(world)), needles)
    settings = ["--config", str(base / "base.yaml")]
    cli = OPDCLI(args=settings, run=False)
    arguments = dict(bad.ARGUMENTS)
    for name, (content, needles) in bad.YAMLS.items():
        path = nowhere / f"{len(arguments)}.yaml"
        path.write_bytes(content)
        arguments[name] = (["--config", str(path)], needles)
    for name, (overrides, needles) in arguments.items():
        parse = lambda overrides=overrides: cli.parse_arguments(cli.parser, [*settings, *overrides])  # noqa: E731
        ledger.note(name, lambda parse=parse: spoken(parse, capsys, ledger.sites), needles)
    for name, (build, needles) in bad.COMMANDS.items():
        command = ["fit", *settings, "--run_dir", "run", *build(ledger.folder())]
        run = lambda command=command: main(default_callbacks, command)  # noqa: E731
        ledger.note(name, lambda run=run: spoken(run, capsys, ledger.sites), needles)
    assert not ledger.wrong, "\n" + "\n".join(ledger.wrong)
    assert ledger.count >= LEAST_INPUTS and len(ledger.sites) >= LEAST_SITES, (ledger.count, len(ledger.sites))


# -- what is tolerated, on purpose -------------------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the data room tells the user."""
    told: list[str] = []
    for name in (
        "prompts.sources.rank_zero_info",
        "prompts.sources.rank_zero_warn",
        "prompts.datamodule.rank_zero_info",
    ):
        monkeypatch.setattr(f"lit_opd.{name}", told.append)
    return told


def test_invisible_characters_are_kept_and_counted(tmp_path: Path, said: list[str]) -> None:
    prompts = ["plain\n\ttext\r", "bell \u0007", "left \u202e right", "\u05e9\u05dc\u05d5\u05dd", "zero\u200dwidth"]
    read = read_prompts(write_lines(tmp_path / "d.jsonl", [{"prompt": prompt} for prompt in prompts]))
    assert [row.prompt for row in read] == prompts
    warnings = [line for line in said if "control or bidirectional" in line]
    assert len(warnings) == 1 and "2 of 5 prompts" in warnings[0] and "d.jsonl:2, U+0007" in warnings[0]


def test_marks_blank_lines_and_windows_ends_are_no_data(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "extra": NaN}\r\n\r\n  \n{"prompt": "b"}')
    assert [(row.prompt, row.answer, row.where.rpartition(":")[2]) for row in read_prompts(str(path))] == [
        ("a", None, "1"),
        ("b", None, "4"),
    ]


def test_prompts_above_the_limit_are_left_out_and_counted(tmp_path: Path, said: list[str]) -> None:
    tokenizer = make_tokenizer()
    path = write_lines(tmp_path / "d.jsonl", [{"prompt": "a"}, {"prompt": "a" * 500}, {"prompt": "b"}])
    module = module_of(tokenizer, path, prompt_batch=2, max_prompt_tokens=100)
    assert {prompt.row_id for prompt in module.train_dataloader().prompts} == {"d-0", "d-2"}
    assert any("dropped 1 of 3 prompts" in line for line in said)


def test_an_empty_template_is_plain_text() -> None:
    assert not PromptEncoder(make_tokenizer(""), chat_template="auto").renders


def chatml(letters: str) -> Any:
    """One token a character, and ChatML's control tokens."""
    tokenizer = tiny.tokenizer(letters)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = bad.TEMPLATE
    return tokenizer


TOKENIZERS = {
    "the embedded one": (testbed.make_tokenizer, [testbed.EOS, testbed.USER, testbed.PAD]),
    "ChatML, a character a token": (lambda: chatml("<|>_/ \nabcdefghijklmnopqrstuvwxyz"), [START, END, tiny.EOS]),
    "ChatML, byte-level": (make_tokenizer, [START, END]),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("frame", ["{}", "say {} now", "{}{}", " {}\n", "<{}>"])
def test_a_special_tokens_string_in_a_prompt_never_becomes_the_token(name: str, frame: str) -> None:
    """Counted against the same prompt with an ordinary word in its place: the template's own tokens stay, no more come."""
    make, specials = TOKENIZERS[name]
    tokenizer = make()
    encoder = PromptEncoder(tokenizer)
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for special in specials:
        prompt, harmless = frame.replace("{}", special), frame.replace("{}", "word")
        for wrap in (
            lambda text: text,
            lambda text: [{"role": "system", "content": text}, {"role": "user", "content": text}],
        ):
            ids, wanted = encoder.encode(wrap(prompt)), encoder.encode(wrap(harmless))
            assert [token for token in ids if token in control] == [token for token in wanted if token in control]
            allowed = PromptEncoder(tokenizer, special_tokens_in_text="allow").encode(wrap(prompt))
            assert sum(token in control for token in allowed) > sum(token in control for token in ids)


def test_the_settings_of_the_page_are_accepted(base: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), flags=re.S)
    for number, block in enumerate(blocks):
        (tmp_path / f"{number}.yaml").write_text(block)
        cli = OPDCLI(
            args=["--config", str(base / "base.yaml"), "--config", str(tmp_path / f"{number}.yaml")], run=False
        )
        if "difficulty" in block:
            assert cli.config["data"]["too_long"] == "filter" and cli.datamodule.train.filter == "difficulty >= 6"
    assert sum("difficulty" in block for block in blocks) == 1


INJECTIONS = [
    "{{ cycler.__init__.__globals__.os.popen('touch pwned') }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{0.__class__.__init__.__globals__} {messages} %s %n $(touch pwned) `touch pwned` ${oc.env:HOME}",
    "!!python/object/apply:os.system ['touch pwned']",
    "__import__('os').system('touch pwned')",
]


@pytest.mark.parametrize("text", INJECTIONS)
def test_code_in_prompts_and_answers_goes_through_verbatim(text: str, tmp_path: Path, nowhere: Path) -> None:
    tokenizer = make_tokenizer()
    path = write_lines(tmp_path / "d.jsonl", [{"prompt": text, "answer": text, "id": text}] * 1)
    row = read_prompts(DataSource(path))[0]
    assert (row.prompt, row.answer, row.row_id) == (text, text, text)
    batch = module_of(tokenizer, path, prompt_batch=1, system_prompt=text).train_dataloader().batch(0)
    rendered = tokenizer.decode(batch.ids[0][batch.mask[0]])
    assert rendered == f"{START}system\n{text}{END}\n{START}user\n{text}{END}\n{START}assistant\n"
    assert batch.answers == (text,) and not list((nowhere / "cwd").iterdir())
    assert torch.equal(
        batch.ids, module_of(tokenizer, path, prompt_batch=1, system_prompt=text).train_dataloader().batch(0).ids
    )
