"""``chat``: prompts are rendered and answers drawn as in training, from each kind of folder."""

from __future__ import annotations

import importlib
import inspect
import io
import pkgutil
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import lit_opd.rollout
import lit_opd.turns
from lit_opd.cli.chat import Chat, Loaded
from lit_opd.cli.command import main
from lit_opd.errors import InputError
from lit_opd.prompts.encoding import row_key
from lit_opd.rollout import SamplingSettings, TransformersSampler
from lit_opd.rollout.base import Sampler
from lit_opd.rollout.streaming import stream
from lit_opd.scoring.model import ScoringModel
from lit_opd.types import PromptBatch
from tests.helpers import cases, fixed, tiny

ROOT = Path(__file__).resolve().parents[2]
TEACHER = "lit_opd/testbed/assets/teacher"
PROMPT, ANSWER = "uuczskofwcqnphkuucqsnwemacngbuofwfqq=421", "594"  # of the embedded task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.qwen3(seed=3).double(), tmp_path_factory.mktemp("model"))


def scoring(folder: str, **options: Any) -> ScoringModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return ScoringModel(model, vocabulary=64, **options)


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7, "top_p": 0.8}, {"greedy": True}, {"seed": 5}])
def test_streamed_tokens_are_those_of_the_reference_engine(folder, changes):
    """In float64; the streams are long enough for one to meet a stop id."""
    model, ids = scoring(folder, unused=(7,)), torch.tensor([[5, 9, 30, 12]])
    settings = SamplingSettings(max_new_tokens=12, stop_ids=(1, *range(20, 30)), pad_id=0, vocabulary=64, **changes)
    lengths = set()
    for key in range(4):
        prompts = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([key]), ("a",))
        rollout = TransformersSampler(max_new_tokens=12).sample(model, prompts, settings)
        streamed = list(stream(model, ids[0].tolist(), settings, row_key=key))
        assert streamed == rollout.response_ids[0][rollout.mask[0]].tolist()
        lengths.add(len(streamed))
    assert settings.greedy or len(lengths) > 1


def chat(folder: str, **given: Any) -> Chat:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Chat(
        Loaded("it", scoring(folder), tokenizer, (1,), given.pop("data", {}), given.pop("sampler", {})), given, seed=0
    )


def asked(one: Chat, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts as text, without spaces, that the model is given from now on; it answers "xy"."""
    seen: list[str] = []

    def listen(model: Any, prompt: Any, settings: Any, *, row_key: int) -> Any:
        seen.append(one.loaded.tokenizer.decode(prompt).replace(" ", ""))
        return iter([*one.loaded.tokenizer("xy")["input_ids"], 1])

    monkeypatch.setattr("lit_opd.cli.chat.stream", listen)
    return seen


def test_a_conversation_is_rendered_by_the_template_and_begins_anew(folder, monkeypatch):
    one = chat(folder, max_new_tokens=4)
    seen = asked(one, monkeypatch)
    assert "".join(one.answer("ab")).replace(" ", "") == "xy"
    "".join(one.answer("c"))
    one.reset()
    "".join(one.answer("d"))
    assert seen == ["<user>ab<assistant>", "<user>abxy<user>c<assistant>", "<user>d<assistant>"]


def test_the_runs_own_way_of_writing_prompts_and_sampling_counts(folder, monkeypatch):
    """Without a template a line is a prompt of its own."""
    one = chat(folder, data={"chat_template": False}, sampler={"temperature": 0.5, "max_new_tokens": 3, "top_k": 2})
    seen = asked(one, monkeypatch)
    for line in ("ab", "c"):
        "".join(one.answer(line))
    assert seen == ["ab", "c"]
    settings = one._settings(5)
    assert (settings.temperature, settings.top_k, settings.max_new_tokens, settings.greedy) == (0.5, 2, 3, False)
    assert chat(folder, temperature=0)._settings(5).greedy
    assert chat(folder)._settings(60).max_new_tokens == 4  # what the window of 64 leaves
    with pytest.raises(InputError, match="/reset"):
        chat(folder)._settings(64)


def test_the_tokenizer_that_rendered_the_runs_prompts_counts(folder, tmp_path, monkeypatch):
    other = AutoTokenizer.from_pretrained(folder)
    other.chat_template = "{% for m in messages %}{{ m.content }}=<assistant>{% endfor %}"
    other.save_pretrained(tmp_path)
    one = chat(folder, data={"tokenizer": str(tmp_path)})
    seen = asked(one, monkeypatch)
    "".join(one.answer("ab"))
    assert seen == ["ab=<assistant>"]


class Bytes:
    """A tokenizer of bytes."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_half_a_character_waits_for_its_other_half_and_the_end_is_not_shown(folder):
    one = chat(folder)
    object.__setattr__(one.loaded, "tokenizer", Bytes())
    pieces = list(one._pieces(iter([65, 0xC3, 0xA9, 66, 1, 67])))
    assert pieces == ["A", "é", "B"]
    assert "".join(one._pieces(iter([65, 0xC3]))) == "A\ufffd"


def test_the_embedded_tasks_own_prompt_is_answered_once_and_line_by_line(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    main(args=["chat", "--model", TEACHER, "--prompt", PROMPT, "--temperature", "0"])
    once = capsys.readouterr().out
    assert once.strip().endswith(f"\\boxed{{{ANSWER}}}")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\n/reset\n/help\n\n{PROMPT}\n/quit\nnever\n"))
    main(args=["chat", "--model", TEACHER, "--temperature", "0"])
    out = capsys.readouterr().out
    assert out.count(once.strip()) == 2 and "there are /reset and /quit" in out and out.count("> ") == 6


def run_folder(folder: str, to: Path) -> Path:
    """A run folder with a config, and nothing else."""
    to.mkdir()
    model = {"student": {"path": folder, "lora": {"rank": 2}}, "sampler": {"init_args": {"max_new_tokens": 5}}}
    (to / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": {}}))
    return to


def test_an_adapter_and_a_run_without_an_export_answer_as_the_trained_student(folder, tmp_path, capsys):
    """A rank-2 student after two large steps; the three ways give its greedy answer, which is not the base's."""
    trained = cases.adapted((folder, folder))
    fixed.fit(trained, cases.rollout().prompts, steps=2, save=tmp_path / "two.ckpt")
    with torch.no_grad():
        for name, value in trained.student.named_parameters():
            value.add_(0.3 if "lora_B" in name else 0.0)
    settings = SamplingSettings(max_new_tokens=5, stop_ids=(1,), pad_id=0, vocabulary=64, greedy=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("<user>ab<assistant>")["input_ids"]
    ids = list(stream(trained.student, prompt, settings, row_key=row_key("chat", 1)))
    expected = tokenizer.decode([token for token in ids if token != 1])
    assert ids != list(stream(scoring(folder), prompt, settings, row_key=row_key("chat", 1)))
    trained.student.model.save_pretrained(tmp_path / "adapter")
    run = run_folder(folder, tmp_path / "run")
    checkpoint = torch.load(tmp_path / "two.ckpt", weights_only=True)
    weights = trained.student.state_dict()
    checkpoint["state_dict"] = {name: weights[name.removeprefix("student.")] for name in checkpoint["state_dict"]}
    (run / "checkpoints").mkdir()
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
    for words in (["--model", str(tmp_path / "adapter"), "--max_new_tokens", "5"], ["--model", str(run)]):
        main(args=["chat", *words, "--prompt", "ab", "--temperature", "0"])
        assert capsys.readouterr().out.strip("\n") == expected, words


def wrapping() -> list[tuple[str, str]]:
    """(class path, argument) of all samplers that stand around another one, found in their constructors."""
    for package in (lit_opd.rollout, lit_opd.turns):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    classes, found = [Sampler], []
    for one in classes:
        classes += one.__subclasses__()
        hints = {} if inspect.isabstract(one) else get_type_hints(one.__init__)
        found += [
            (f"{one.__module__}.{one.__name__}", name)
            for name, hint in hints.items()
            if Sampler in (hint, *get_args(hint)) and one.__module__.startswith("lit_opd.")
        ]
    return sorted({*found})


ENGINE = {
    "class_path": "lit_opd.rollout.DecodeSampler",
    "init_args": {"stop_token_ids": [7], "temperature": 0.5, "max_new_tokens": 3},
}


def test_all_samplers_around_others_are_known():
    found = [(path.rsplit(".", 1)[-1], argument) for path, argument in wrapping()]
    assert found == [("PartialSampler", "sampler"), ("ReplaySampler", "fresh"), ("TurnsSampler", "sampler")]


@pytest.mark.parametrize(("path", "argument"), [("", ""), *wrapping()])
def test_a_run_is_exported_and_spoken_to_as_its_engine_sampled(folder, tmp_path, monkeypatch, path, argument):
    """Whichever sampler stands around the engine: its end tokens, temperature and length."""
    sampler = ENGINE if not path else {"class_path": path, "init_args": {"paths": "x", argument: ENGINE}}
    run = tmp_path / "run"
    run.mkdir()
    model = {"student": {"path": folder, "dtype": "float64"}, "sampler": sampler}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": {}}))
    fixed.fit(
        fixed.module((folder, folder), cases.rollout()), cases.rollout().prompts, save=run / "checkpoints" / "last.ckpt"
    )
    main(args=["export", "--run_dir", str(run), "--out", str(run / "student")])
    assert GenerationConfig.from_pretrained(run / "student").eos_token_id == 7
    seen: list[Chat] = []
    monkeypatch.setattr(Chat, "answer", lambda one, line: seen.append(one) or iter(()))
    main(args=["chat", "--model", str(run), "--prompt", "ab"])
    settings = seen[0]._settings(5)
    assert (settings.stop_ids, settings.temperature, settings.max_new_tokens) == ((7,), 0.5, 3)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model", "./nothing"], "--model"),
        (["--model", TEACHER, "--temperature", "-1"], "--temperature"),
        (["--model", TEACHER, "--temperature", "nan"], "--temperature"),
        (["--model", TEACHER, "--top_p", "0"], "--top_p"),
        (["--model", TEACHER, "--max_new_tokens", "0"], "--max_new_tokens"),
        (["--model", TEACHER, "--prompt", " "], "prompt"),
        (["--model", TEACHER, "--base", TEACHER, "--prompt", "a"], "--base"),
    ],
)
def test_wrong_input_is_one_line(words, named, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main(args=["chat", *words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and named in said and said.count("\n") == 1
