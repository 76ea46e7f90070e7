"""``chat --model FOLDER``: a look at what was trained. Prompts are rendered as in training, answers drawn as in training."""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_opd.cli.export import CONFIG, found_checkpoint, run_settings, trained_student
from lit_opd.cli.redaction import one_line
from lit_opd.errors import InputError, first_line
from lit_opd.models.loading import ADAPTER, load_causal_lm, load_tokenizer
from lit_opd.models.student import StudentSettings
from lit_opd.models.vocabulary import configured_stops, num_used, unused_ids
from lit_opd.prompts.datamodule import loaded_tokenizer
from lit_opd.prompts.encoding import PromptEncoder, row_key
from lit_opd.rollout.base import SamplingSettings, engine_options
from lit_opd.rollout.streaming import stream
from lit_opd.run.checkpoint_files import counters
from lit_opd.scoring.model import ScoringModel
from lit_opd.shipped import program, shipped_path

FIELD = "--model"
STUDENT = "student"  # what a run exports at its end
QUIT, RESET = "/quit", "/reset"
DEFAULT_TOKENS = 512
BROKEN = "\ufffd"  # what half a character decodes to


def parser() -> ArgumentParser:
    """The command's options."""
    own = ArgumentParser(
        prog=f"{program()} chat",
        description=f"Talk to a student. A line is a prompt; {RESET} begins a new conversation, {QUIT} ends.",
    )
    own.add_argument("--model", required=True, help="a run folder, an exported folder or an adapter's")
    own.add_argument("--base", help="base model of an adapter; default the one that it names")
    own.add_argument("--prompt", help="answer this one and end")
    own.add_argument("--temperature", type=float, help="0 for the likeliest tokens; default as in training, else 1")
    own.add_argument("--top_p", type=float, help="default as in training, else 1")
    own.add_argument("--max_new_tokens", type=int, help=f"default as in training, else {DEFAULT_TOKENS}")
    own.add_argument("--seed", type=int, default=0, help="the same seed and prompts give the same answers")
    own.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default bfloat16 on a GPU, else float32"
    )
    return own


def run(words: Sequence[str]) -> None:
    """Answer one prompt, or a line at a time until the input ends.

    Raises:
        InputError: wrong input.
    """
    given = parser().parse_args(list(words))
    chat = Chat(_loaded(given), _sampling(given), seed=given.seed)
    if given.prompt is not None:
        _print(chat.answer(given.prompt))
        return
    print(f"{chat.loaded.name}: a line is a prompt, {RESET} begins a new conversation, {QUIT} ends")
    _talk(chat)


def _sampling(given: Any) -> dict[str, Any]:
    """What the command line says of sampling.

    Raises:
        InputError: a value outside its range.
    """
    for name, ok, allowed in (
        ("temperature", given.temperature is None or 0 <= given.temperature < math.inf, ">= 0"),
        ("top_p", given.top_p is None or 0 < given.top_p <= 1, "in (0, 1]"),
        ("max_new_tokens", given.max_new_tokens is None or given.max_new_tokens >= 1, ">= 1"),
    ):
        if not ok:
            raise InputError(f"`--{name}` must be {allowed}, got {getattr(given, name)}")
    names = ("temperature", "top_p", "max_new_tokens")
    return {name: getattr(given, name) for name in names if getattr(given, name) is not None}


# -- loading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A student with what its run says of prompts and sampling.

    Args:
        name: what the screen calls it.
        model: ready to score.
        tokenizer: its own.
        stops: ids that end a response.
        data: the run's ``data``, empty where there is no run.
        sampler: the run's settings of ``model.sampler``, likewise.
    """

    name: str
    model: ScoringModel
    tokenizer: Any
    stops: tuple[int, ...]
    data: dict[str, Any]
    sampler: dict[str, Any]


def _loaded(given: Any) -> Loaded:
    path = shipped_path(given.model)
    folder = Path(path).expanduser()
    is_run = (folder / CONFIG).is_file() and not (folder / "config.json").is_file()
    exported = folder / STUDENT if is_run else folder
    config = _run_config(folder if is_run else folder.resolve().parent)
    settings = replace(_settings(given, path), path=str(exported) if is_run else path)
    if is_run and not (exported / "config.json").is_file():
        model, settings = _from_checkpoint(folder, given)
    elif (exported / ADAPTER).is_file():
        model, settings = _from_adapter(exported, given)
    elif given.base is not None:
        raise InputError(f"`--base` goes with an adapter, got {given.base!r} for {path!r}, which holds a whole model")
    else:
        model = load_causal_lm(settings.path, FIELD, dtype=settings.dtype)
    return _ready(str(given.model), model, settings, config)


def _settings(given: Any, path: str) -> StudentSettings:
    return StudentSettings(path, dtype=given.dtype or ("bfloat16" if torch.cuda.is_available() else "float32"))


def _run_config(run_dir: Path) -> dict[str, Any]:
    """The config of the run that a folder belongs to, empty where there is none."""
    path = run_dir / CONFIG
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} must be a run's config: {first_line(error)}") from error
    return found if isinstance(found, dict) else {}


def _from_checkpoint(run_dir: Path, given: Any) -> tuple[Any, StudentSettings]:
    """The student of a run that has not exported one yet."""
    checkpoint, _ = found_checkpoint("last", str(run_dir))
    settings, _ = run_settings(run_dir / CONFIG)
    said = counters(checkpoint)
    model = trained_student(checkpoint, settings, base=said.get("student_base"))
    print(f"{checkpoint}, optimizer step {said['global_step']}", file=sys.stderr)
    return model if given.dtype is None else model.to(getattr(torch, given.dtype)), settings


def _from_adapter(folder: Path, given: Any) -> tuple[Any, StudentSettings]:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(f"`{FIELD}` {str(folder)!r} is an adapter and needs the package peft") from error
    try:
        named = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / ADAPTER} must name a base_model_name_or_path: {first_line(error)}") from error
    settings = _settings(given, shipped_path(str(given.base or named)))
    model = load_causal_lm(settings.path, "--base", dtype=settings.dtype)
    try:
        return PeftModel.from_pretrained(model, str(folder)), settings
    except Exception as error:  # shapes that do not fit, damaged files
        raise InputError(
            f"`{FIELD}` {str(folder)!r} must be an adapter of {settings.path!r}: {one_line(first_line(error))}; give its base "
            "with --base"
        ) from error


def _ready(name: str, model: Any, settings: StudentSettings, config: dict[str, Any]) -> Loaded:
    own, path = config.get("model") or {}, settings.path
    pad = (own.get("student") or {}).get("pad_token")
    tokenizer = load_tokenizer(path, FIELD, pad_token=pad, pads=False)
    vocabulary = num_used(tokenizer)
    holes = tuple(number for number in unused_ids(tokenizer) if number < vocabulary)
    sampler = engine_options(own)
    stops = tuple(sampler.get("stop_token_ids") or sorted(configured_stops(path, tokenizer)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scoring = ScoringModel(model.eval().to(device), vocabulary=vocabulary, unused=holes)
    return Loaded(name, scoring, tokenizer, stops, config.get("data") or {}, sampler)


# -- talking -----------------------------------------------------------------------------------------------------------


def _prompt_tokenizer(loaded: Loaded) -> Any:
    """What rendered the prompts of the run."""
    path = loaded.data.get("tokenizer")
    return loaded_tokenizer(shipped_path(str(path)), "tokenizer") if path else loaded.tokenizer


class Chat:
    """A conversation. Without a chat template every line is a prompt of its own.

    Args:
        loaded: who answers.
        sampling: temperature, top_p and max_new_tokens where they are not those of training.
        seed: of the answers.
    """

    def __init__(self, loaded: Loaded, sampling: dict[str, Any], *, seed: int) -> None:
        self.loaded, self.seed, self.turn = loaded, seed, 0
        self.sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": DEFAULT_TOKENS}
        self.sampling |= {name: loaded.sampler[name] for name in self.sampling if loaded.sampler.get(name) is not None}
        self.sampling |= sampling
        options = ("chat_template", "template_options", "system_prompt", "special_tokens_in_text")
        given = {name: loaded.data[name] for name in options if loaded.data.get(name) is not None}
        self.encoder = PromptEncoder(_prompt_tokenizer(loaded), **given)
        self.messages: list[Any] = []

    def reset(self) -> None:
        """Begin a new conversation."""
        self.messages = []

    def answer(self, line: str) -> Iterator[str]:
        """The answer to a line, piece by piece.

        Raises:
            InputError: nothing in the line, or no room left in the model's window.
        """
        if not line.strip():
            raise InputError("a prompt must have some text, got none")
        asked = [*self.messages, {"role": "user", "content": line}]
        prompt = self.encoder.encode(asked if self.encoder.renders and self.messages else line)
        settings = self._settings(len(prompt))
        self.turn += 1
        said = ""
        for piece in self._pieces(stream(self.loaded.model, prompt, settings, row_key=row_key("chat", self.turn))):
            said += piece
            yield piece
        if self.encoder.renders:
            self.messages = [*asked, {"role": "assistant", "content": said}]

    def _settings(self, length: int) -> SamplingSettings:
        """Those of the next answer, which ends with the model's window."""
        window = getattr(self.loaded.model.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        room = self.sampling["max_new_tokens"] if window is None else window - length
        if room < 1:
            raise InputError(
                f"the conversation has {length} tokens and the model's window {window}; begin a new one with {RESET}"
            )
        greedy = self.sampling["temperature"] == 0
        values = self.sampling | {"max_new_tokens": min(self.sampling["max_new_tokens"], room)}
        return SamplingSettings(
            **values | {"temperature": 1.0 if greedy else values["temperature"]},
            stop_ids=self.loaded.stops,
            pad_id=self.loaded.stops[0],
            vocabulary=self.loaded.model.vocabulary,
            greedy=greedy,
            seed=self.seed,
        )

    def _pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        """Text as soon as its last character is whole; the stop token is not shown."""
        ids: list[int] = []
        shown = ""
        for token in tokens:
            if token in self.loaded.stops:
                break
            ids.append(token)
            text = self.loaded.tokenizer.decode(ids)
            if not text.endswith(BROKEN):
                yield text[len(shown) :]
                shown = text
        rest = self.loaded.tokenizer.decode(ids)[len(shown) :]
        if rest:
            yield rest


def _talk(chat: Chat) -> None:
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == QUIT:
            return
        if line == RESET:
            chat.reset()
        elif line.startswith("/"):
            print(f"there are {RESET} and {QUIT}")
        elif line:
            _answer(chat, line)


def _answer(chat: Chat, line: str) -> None:
    """Show an answer; an interrupt ends it, and what cannot be answered is a line."""
    try:
        _print(chat.answer(line))
    except KeyboardInterrupt:
        print()
    except InputError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)


def _print(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(_plain(piece), end="", flush=True)
    print()


def _plain(text: str) -> str:
    """Without what would command the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
