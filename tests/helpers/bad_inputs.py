"""The table of ``test_inputs``: bad inputs, how each reaches the program, and what its message must name."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import callbacks as cb
from lit_opd import advantage, objective, weighting
from lit_opd.evaluation import ValidationSettings
from lit_opd.models.loading import load_causal_lm, load_config, load_tokenizer
from lit_opd.models.student import LoraSettings, StudentSettings
from lit_opd.models.vocabulary import agree_vocabularies, configured_stops
from lit_opd.module import OPDModule
from lit_opd.prompts.datamodule import PromptDataModule
from lit_opd.prompts.encoding import PromptEncoder, pad_token_id
from lit_opd.prompts.sources import DataSource, read_prompts
from lit_opd.rollout import LengthBudget, RatioStop, TransformersSampler, VLLMEngine, VLLMSampler
from lit_opd.teacher import LocalTeacher, MixedTeacher, RemoteTeacher, RoutedTeacher
from tests.helpers import tiny
from tests.helpers.encoded import encode_prompts
from tests.prompts.test_prompts import TEMPLATE, make_tokenizer

URLS = ["http://localhost:1"]


@dataclass(frozen=True)
class World:
    """What a case may use.

    Args:
        folder: of this case alone.
        models: two tiny models, ``student`` and ``teacher``.
        prompts: good training data.
    """

    folder: Path
    models: Path
    prompts: Path


Attempt = Callable[[World], Any]
Cases = Iterator[tuple[str, Attempt, list[str]]]


# -- files of prompts --------------------------------------------------------------------------------------------------


def read(content: bytes, **options: Any) -> Attempt:
    def attempt(world: World) -> None:
        path = world.folder / "bad.jsonl"
        path.write_bytes(content)
        columns = options.pop("columns", None)
        read_prompts(DataSource(str(path), **options), columns)

    return attempt


def read_path(path: str) -> Attempt:
    return lambda world: read_prompts(path.replace("HERE", str(world.folder)))


ROWS: dict[str, tuple[bytes, list[str]]] = {
    "empty file": (b"", ["bad.jsonl", "empty", "at least one row"]),
    "blank lines only": (b"\n \n\t\n", ["bad.jsonl", "empty"]),
    "empty prompt": (b'{"prompt": "a"}\n{"prompt": ""}\n', ["bad.jsonl:2", "'prompt' is empty"]),
    "white space prompt": (b'{"prompt": " \\n\\t"}\n', ["bad.jsonl:1", "'prompt' is empty"]),
    "broken JSON": (b'{"prompt": "a"}\n{"prompt": \n', ["bad.jsonl:2", "broken JSON"]),
    "half a line": (b'{"prompt": "a"}\n{"pro', ["bad.jsonl:2", "broken JSON"]),
    "two objects a line": (b'{"prompt": "a"} {"prompt": "b"}\n', ["bad.jsonl:1", "broken JSON"]),
    "a JSON array": (b'[{"prompt": "a"},\n{"prompt": "b"}]', ["bad.jsonl:1", "one object a line"]),
    "a list as row": (b'["a"]\n', ["bad.jsonl:1", "JSON object", "list"]),
    "a number as row": (b"7\n", ["bad.jsonl:1", "JSON object", "int 7"]),
    "null as row": (b"null\n", ["bad.jsonl:1", "JSON object"]),
    "deep nesting": (b'{"prompt": ' + b"[" * 100_000 + b"\n", ["bad.jsonl:1", "broken JSON"]),
    "a number of many digits": (b'{"prompt": ' + b"9" * 5000 + b"}\n", ["bad.jsonl:1", "broken JSON"]),
    "Latin-1": (b'{"prompt": "caf\xe9"}\n', ["bad.jsonl:1", "not UTF-8"]),
    "UTF-16": ('{"prompt": "a"}\n'.encode("utf-16"), ["bad.jsonl:1", "not UTF-8"]),
    "overlong UTF-8": (b'{"prompt": "\xc0\xaf"}\n', ["bad.jsonl:1", "not UTF-8"]),
    "raw NUL": (b'{"prompt": "a\0b"}\n', ["bad.jsonl:1", "broken JSON"]),
    "escaped NUL": (b'{"prompt": "a\\u0000b"}\n', ["bad.jsonl:1", "NUL", "remove"]),
    "NUL in the answer": (b'{"prompt": "a", "answer": "\\u0000"}\n', ["bad.jsonl:1", "NUL", "'answer'"]),
    "lone surrogate": (b'{"prompt": "a\\udc80"}\n', ["bad.jsonl:1", "surrogate"]),
    "wrong column": (b'{"text": "a", "label": 1}\n', ["prompt_column", "text, label"]),
    "an object without columns": (b"{}\n", ["no prompt column", "none"]),
    "prompt missing in one row": (b'{"prompt": "a"}\n{"answer": 1}\n', ["bad.jsonl:2", "'prompt' is missing", "answer"]),
    "number as prompt": (b'{"prompt": "a"}\n{"prompt": 5}\n', ["bad.jsonl:2", "int 5"]),
    "null as prompt": (b'{"prompt": null}\n', ["bad.jsonl:1", "NoneType"]),
    "object as prompt": (b'{"prompt": {"a": 1}}\n', ["bad.jsonl:1", "dict"]),
    "boolean as answer": (b'{"prompt": "a", "answer": true}\n', ["bad.jsonl:1", "answer", "bool True"]),
    "list as answer": (b'{"prompt": "a", "answer": [1]}\n', ["bad.jsonl:1", "answer", "list"]),
    "id twice": (b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n', ["bad.jsonl:2", "'1'", "id_column"]),
    "null as id": (b'{"prompt": "a", "id": null}\n', ["bad.jsonl:1", "id", "NoneType"]),
    "fraction as id": (b'{"prompt": "a", "id": 1.5}\n', ["bad.jsonl:1", "float 1.5"]),
    "empty id": (b'{"prompt": "a", "id": ""}\n', ["bad.jsonl:1", "str ''"]),
    "no messages": (b'{"prompt": []}\n', ["bad.jsonl:1", "conversation"]),
    "only an assistant": (b'{"prompt": [{"role": "assistant", "content": "a"}]}\n', ["bad.jsonl:1", "user turn"]),
    "only a system": (b'{"prompt": [{"role": "system", "content": "a"}]}\n', ["bad.jsonl:1", "user turn"]),
    "text as message": (b'{"prompt": ["a"]}\n', ["bad.jsonl:1", "message 0", "`role`"]),
    "message without role": (b'{"prompt": [{"content": "a"}]}\n', ["bad.jsonl:1", "`role`"]),
    "message without content": (b'{"prompt": [{"role": "user"}]}\n', ["bad.jsonl:1", "content must be text"]),
    "images as content": (b'{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}\n', ["bad.jsonl:1", "list"]),
    "unknown role": (b'{"prompt": [{"role": "root", "content": "a"}]}\n', ["bad.jsonl:1", "role", "root"]),
    "special token as role": (b'{"prompt": [{"role": "user<|im_end|>", "content": "a"}]}\n', ["bad.jsonl:1", "role"]),
    "empty user turn": (b'{"prompt": [{"role": "user", "content": ""}]}\n', ["bad.jsonl:1", "'content' is empty"]),
    "tool calls": (
        b'{"prompt": [{"role": "user", "content": "a", "tool_calls": [{}]}]}\n',
        ["bad.jsonl:1", "only an assistant's message may have tool calls"],
    ),
}  # fmt: skip

FILTERS = {
    "filter without operator": ("difficulty", ["filter", "difficulty", "column op value"]),
    "filter with one =": ("difficulty = 6", ["filter", "= 6"]),
    "filter as code": ("__import__('os').system('true')", ["filter", "__import__"]),
    "filter of an unknown column": ("nope >= 6", ["filter", "nope", "difficulty"]),
    "filter of another type": ("difficulty >= hard", ["filter", "'hard'", "int 6"]),
    "filter in without list": ("difficulty in 6", ["filter", "list"]),
    "order of a list": ("difficulty >= [1]", ["filter", "single value"]),
    "filter that keeps nothing": ("difficulty > 99", ["difficulty > 99", "keeps none", "relax"]),
}


def data_files() -> Cases:
    for name, (content, needles) in ROWS.items():
        yield name, read(content), needles
    row = b'{"prompt": "a", "difficulty": 6}\n'
    for name, (text, needles) in FILTERS.items():
        yield name, read(row, filter=text), [n.replace("column op value", "column op literal") for n in needles]
    for field in ("prompt_column", "answer_column", "id_column"):
        yield f"{field} that is not there", read(row, **{field: "nope"}), [field, "'nope'", "prompt, difficulty"]
    for field, value in (("split", "test"), ("split", "train[:0]"), ("name", "main")):
        yield (
            f"{field} {value} of a file",
            read(row, **{field: value}),
            [f"DataSource.{field}", f"'{value}'", "bad.jsonl"],
        )
    yield "no such file", read_path("HERE/no.jsonl"), ["no.jsonl", "no such file"]
    yield "no such Parquet file", read_path("HERE/no.parquet"), ["no.parquet", "no such file"]
    yield "no such folder", read_path("HERE/no/where"), ["no/where", "no such file or folder"]
    yield "an empty path", read_path(" "), ["DataSource.path", "empty"]
    yield "an address", read_path("http://me:password@host/x"), ["no such file or folder"]
    yield "another kind of file", other_kind, ["data.csv", ".jsonl"]
    yield "a folder without data", read_path("HERE"), ["no data set", "split 'train'"]
    yield "text named Parquet", no_parquet, ["data.parquet", "not a readable Parquet"]
    yield "a file that may not be read", unreadable, ["can't be read"]


def other_kind(world: World) -> None:
    (world.folder / "data.csv").write_text("prompt\na\n")
    read_prompts(str(world.folder / "data.csv"))


def no_parquet(world: World) -> None:
    (world.folder / "data.parquet").write_text("prompt")
    read_prompts(str(world.folder / "data.parquet"))


def unreadable(world: World) -> None:
    """A file that not even root can read."""
    path = world.folder / "memory.jsonl"
    path.symlink_to("/proc/self/mem")
    read_prompts(str(path))


# -- the data module and its templates ---------------------------------------------------------------------------------


def data(**settings: Any) -> Attempt:
    def attempt(world: World) -> None:
        options = {"train": str(world.prompts), "prompt_batch": 2} | settings
        tokenizer = options.pop("use", None) or make_tokenizer()
        PromptDataModule(**options).use_tokenizer(tokenizer).setup(options.pop("stage", "fit"))

    return attempt


def encode(prompt: Any, template: str | None = TEMPLATE, **settings: Any) -> Attempt:
    return lambda world: PromptEncoder(make_tokenizer(template), **settings).encode(prompt, "F:7")


def data_modules() -> Cases:
    for name, value in {
        "prompt_batch": 0, "samples_per_prompt": -1, "max_prompt_tokens": 0, "val_batch": 0, "val_limit": 0,
        "val_fraction": 1.0, "too_long": "cut", "train": [], "special_tokens_in_text": "drop", "chat_template": "maybe",
    }.items():  # fmt: skip
        yield f"data.{name}", data(**{name: value}), [name, str(value)]
    yield "two kinds of validation", data(val="x.jsonl", val_fraction=0.5), ["val_fraction", "0.5"]
    yield "a validation share without rows", data(val_fraction=1e-9), ["val_fraction", "1e-09"]
    yield "prompts above the limit, as an error", data(max_prompt_tokens=3, too_long="error"), [
        ":1", "max_prompt_tokens", "too_long: filter",
    ]  # fmt: skip
    yield "no prompt within the limit", data(max_prompt_tokens=3), ["max_prompt_tokens", "got 3", "raise it"]
    weighted = [DataSource("a.jsonl", weight=1.0), DataSource("a.jsonl", weight=-1.0, id_prefix="b")]
    yield "a negative share", sources(weighted), ["DataSource.weight", "-1.0"]
    yield (
        "shares of some sources",
        sources([weighted[0], DataSource("a.jsonl", id_prefix="b")]),
        ["DataSource.weight", "None"],
    )
    yield "one file twice", sources([DataSource("a.jsonl"), DataSource("a.jsonl")]), ["already used", "id_prefix"]
    yield "a tokenizer without pad", data(use=make_tokenizer(pad=False)), ["pad token", "pad_token"]
    yield "a pad token that is none", data(pad_token="nope"), ["pad_token", "'nope'"]
    yield "template reserved option", encode("a", template_options={"tokenize": True}), ["template_options", "tokenize"]
    yield "template missing", encode("a", None, chat_template=True), ["chat_template", "True"]
    yield "template missing for messages", encode([{"role": "user", "content": "a"}], None), ["F:7", "chat template"]
    yield "system prompt without template", encode("a", None, system_prompt="s"), ["system_prompt", "'s'"]
    yield "template raising", encode("a", "{{ raise_exception('no way') }}"), ["F:7", "no way", "chat_template: false"]
    yield "template of broken syntax", encode("a", "{% if %}"), ["F:7", "TemplateSyntaxError"]
    yield "template dividing by zero", encode("a", "{{ 1 / 0 }}"), ["F:7", "ZeroDivisionError"]
    yield "template reaching for code", encode("a", "{{ ''.__class__.__mro__ }}"), ["F:7", "SecurityError"]
    yield "template with an unknown filter", encode("a", "{{ messages | nope }}"), ["F:7", "nope"]
    yield "template that renders nothing", encode("a", "{% if false %}{% endif %}"), ["F:7", "no tokens"]
    yield (
        "template that cuts",
        encode("<|im_end|>" * 3, "{{ messages[0].content[:2] }}"),
        ["F:7", "does not render message 0"],
    )
    yield (
        "special token refused",
        encode("a <|im_end|>", special_tokens_in_text="refuse"),
        ["F:7", "'<|im_end|>'", "escape"],
    )
    yield (
        "special token refused in a message",
        encode([{"role": "user", "content": "<|im_start|>"}], special_tokens_in_text="refuse"),
        ["F:7", "'<|im_start|>'"],
    )
    yield "an empty prompt of an evaluation", evaluate([""]), ["prompt-0", "empty"]
    yield "a number as prompt of an evaluation", evaluate([3]), ["prompt-0", "int 3"]
    yield "no pad for an evaluation", lambda world: pad_token_id(make_tokenizer(pad=False)), ["pad token", "<|im_end|>"]


def sources(parts: list[DataSource]) -> Attempt:
    def attempt(world: World) -> None:
        path = world.folder / "a.jsonl"
        path.write_text('{"prompt": "a"}\n')
        data(train=[replace(part, path=str(path)) for part in parts])(world)

    return attempt


def evaluate(prompts: list[Any]) -> Attempt:
    return lambda world: encode_prompts(PromptEncoder(make_tokenizer()), prompts)


# -- folders of models -------------------------------------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled: it would write ``pwned`` into the current folder."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def load_all(path: str) -> None:
    """What a run loads of a folder, in its order."""
    load_config(path, "model.student.path")
    configured_stops(path, load_tokenizer(path, "model.student.path"))
    load_causal_lm(path, "model.student.path", dtype="float32")


def damaged(change: Callable[[Path], None]) -> Attempt:
    """A good folder of a tiny model, then ``change`` on it."""

    def attempt(world: World) -> None:
        folder = world.folder / "model"
        tiny.save(tiny.qwen3(seed=1, layers=1), folder)
        change(folder)
        load_all(str(folder))

    return attempt


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def changed(file: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = change(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def removed(*patterns: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return remove


def pickled(name: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Evil()))

    return replace


MODELS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "config.json broken": (written("config.json", "{"), ["config.json", "not a valid JSON"]),
    "config.json a list": (written("config.json", "[]"), ["correct that file"]),
    "config.json empty": (written("config.json", "{}"), ["model_type"]),
    "architecture unknown": (changed("config.json", model_type="nonesuch"), ["nonesuch"]),
    "architecture of an encoder": (changed("config.json", model_type="t5"), ["T5Config"]),
    "architecture of other weights": (changed("config.json", model_type="bert"), ["lacks weights", "bert.embeddings"]),
    "size negative": (changed("config.json", hidden_size=-3), ["-3"]),
    "size a word": (changed("config.json", hidden_size="big"), ["hidden_size", "big"]),
    "size of other weights": (changed("config.json", hidden_size=32), ["other shapes", "lm_head.weight"]),
    "layers that disagree": (changed("config.json", num_hidden_layers=3), ["num_hidden_layers"]),
    "own code": (
        changed("config.json", model_type="mine", auto_map={"AutoConfig": "mine.C"}), ["custom code"]
    ),
    "tokenizer missing": (removed("token*"), ["tokenizer", "without a vocabulary"]),
    "tokenizer.json broken": (written("tokenizer.json", "{"), ["could not be loaded"]),
    "tokenizer.json of nothing": (written("tokenizer.json", "{}"), ["could not be loaded"]),
    "tokenizer_config.json broken": (written("tokenizer_config.json", "{"), ["could not be loaded"]),
    "tokenizer_config.json a list": (written("tokenizer_config.json", "[]"), ["could not be loaded"]),
    "tokenizer without pad": (changed("tokenizer_config.json", pad_token=None), ["pad token", "model.student.pad_token"]),
    "generation config broken": (written("generation_config.json", "{"), ["generation_config.json", "delete"]),
    "generation config a list": (written("generation_config.json", "[]"), ["generation_config.json", "delete"]),
    "stop id a word": (written("generation_config.json", '{"eos_token_id": "x"}'), ["eos_token_id", "'x'"]),
    "weights missing": (removed("model.safetensors"), ["model.safetensors"]),
    "weights empty": (written("model.safetensors", ""), ["deserializing header"]),
    "weights of noise": (written("model.safetensors", b"\xff" * 100), ["deserializing header"]),
    "weights cut short": (truncated, ["deserializing header"]),
    "weights renamed": (weights(lambda t: {f"x.{n}": v for n, v in t.items()}), ["lacks weights", "lm_head.weight"]),
    "one weight missing": (weights(lambda t: {n: v for n, v in t.items() if "norm.weight" not in n}), ["lacks weights"]),
    "a pickle as pytorch_model.bin": (pickled("pytorch_model.bin"), ["model.safetensors"]),
    "a pickle as model.pt": (pickled("model.pt"), ["model.safetensors"]),
    "a pickle as model.safetensors": (pickled("model.safetensors"), ["could not be loaded"]),
}  # fmt: skip


def other_vocabulary(world: World) -> None:
    agree_vocabularies(tiny.tokenizer(), tiny.tokenizer("0123456789 =+"), student_rows=64, teacher_rows=64)


def too_few_rows(world: World) -> None:
    agree_vocabularies(tiny.tokenizer(), tiny.tokenizer(), student_rows=10, teacher_rows=64)


def models() -> Cases:
    for name, (change, needles) in MODELS.items():
        yield name, damaged(change), needles
    for name, path in {
        "no folder": "./nowhere",
        "an empty path": "",
        "a file": "/etc/passwd",
        "a deep id": "a/b/c",
    }.items():
        yield f"student is {name}", lambda world, path=path: load_all(path), ["model.student.path", repr(path)]
    yield "another vocabulary", other_vocabulary, ["model.teacher.path", "tokens differ", "same tokenizer family"]
    yield "too few embedding rows", too_few_rows, ["43 ids", "10"]


# -- constructors ------------------------------------------------------------------------------------------------------

RANGES: list[tuple[Any, dict[str, list[Any]], dict[str, Any]]] = [
    (weighting.ImportanceWeighting, {"w_max": [0.5, float("nan"), float("inf")], "denominator": ["some"]}, {}),
    (weighting.Constant, {"value": [-1.0, float("nan")]}, {}),
    (weighting.PrefixRatioTilt, {"alpha": [0.0, 1.5], "low": [6.0], "high": [float("inf")]}, {}),
    (weighting.FirstFraction, {"fraction": [0.0, 1.1]}, {}),
    (weighting.RandomFraction, {"seed": [0.5]}, {"fraction": 0.5}),
    (weighting.FirstTokens, {"count": [0, 1.5, True]}, {}),
    (weighting.LinearDecay, {"gamma": [-0.1]}, {}),
    (weighting.Geometric, {"gamma": [1.1]}, {}),
    (weighting.AnnealedPrefixWeight, {"start": [0.0], "end": [2.0], "schedule": ["square"]}, {}),
    (weighting.AnnealedPrefixWeight, {"min_tokens": [0], "weight": [-1.0]}, {}),
    (weighting.AnnealedPrefixMask, {"start": [-0.3]}, {}),
    (weighting.LateRising, {"w_min": [2.0], "tau": [float("inf")], "scale": [0.0]}, {}),
    (weighting.TeacherConfidence, {"window": [0], "quantile": [1.5], "alpha": [-1.0], "floor": [2.0]}, {}),
    (weighting.WindowedPrefixRatio, {"window": [0, 2.5], "floor": [-0.1, float("nan")]}, {}),
    (weighting.TrustRegion, {"seed": ["x"]}, {}),
    (weighting.DASH, {"kappa": [-5.0]}, {}),
    (weighting.FiRe, {"alpha": [-1.0], "beta": [-1.0]}, {}),
    (weighting.TIP, {"keep_fraction": [0.0]}, {}),
    (weighting.EntropyGate, {"threshold": [-0.8], "beta": [-1.0]}, {}),
    (weighting.Product, {"strategies": [[], [3]]}, {}),
    (weighting.SequenceMeanOne, {"strategy": [torch.nn.Identity()]}, {}),
    (weighting.Shuffled, {"seed": [1.5]}, {"strategy": weighting.Uniform()}),
    (advantage.Clip, {"c": [0.0]}, {}),
    (advantage.Power, {"alpha": [-1.0]}, {}),
    (advantage.RewardExtrapolation, {"strength": [float("nan")]}, {}),
    (advantage.DiscountedReturn, {"discount": [1.5]}, {}),
    (objective.PolicyLoss, {"clip": [0.0, 1.0], "dual_clip": [1.0], "importance_cap": [0.0]}, {}),
    (objective.Divergence, {"kind": ["chi2"]}, {}),
    (objective.Divergence, {"top_k": [0], "beta": [0.0, 0.3]}, {"kind": "reverse_kl"}),
    (TransformersSampler, {"max_new_tokens": [0], "temperature": [0.0, -1.0, float("inf")]}, {}),
    (TransformersSampler, {"top_p": [0.0, 1.5], "top_k": [-1]}, {}),
    (VLLMEngine, {"max_logprob_gap": [0.0], "memory_fraction": [1.0]}, {}),
    (VLLMSampler, {"max_logprob_gap": [-1.0]}, {"urls": URLS}),
    (VLLMSampler, {"logprobs_mode": ["raw_logprobs"]}, {"urls": URLS, "temperature": 0.5}),
    (LengthBudget, {"start": [0]}, {}),
    (LengthBudget, {"end": [0], "schedule": ["square"]}, {"start": 1}),
    (RatioStop, {"threshold": [0.0, 1.0, float("nan")], "chunk": [0]}, {}),
    (RemoteTeacher, {"rows_per_request": [0]}, {"urls": URLS, "tokenizer_path": "x"}),
    (RoutedTeacher, {"teachers": [{}]}, {}),
    (MixedTeacher, {"weights": [[0.5], [0.5, 0.6], [1.5, -0.5], [float("nan")] * 2], "how": ["mean"]},
     {"teachers": [LocalTeacher("x"), LocalTeacher("y")]}),
    (LocalTeacher, {"offload": [True]}, {"path": "x", "quantization": {"load_in_4bit": True}}),
    (ValidationSettings, {"samples": [-1], "max_new_tokens": [0], "batch_limit": [0]}, {}),
    (LoraSettings, {"rank": [0], "alpha": [0.0], "dropout": [1.0], "target_modules": [""]}, {}),
    (OPDModule, {"mini_batches": [0], "epochs": [-1], "token_budget": [0], "gradient_clip_norm": [0.0]},
     {"student": StudentSettings("x"), "teacher": LocalTeacher("x")}),
    (OPDModule, {"length_budget": [LengthBudget(600)]}, {"student": StudentSettings("x"), "teacher": LocalTeacher("x")}),
    (cb.EarlyAIMEEvaluation, {"steps": [[-1]], "every": [0], "samples": [0], "temperature": [0.0, float("inf")], "top_p": [2.0],
                              "top_k": [-1], "max_new_tokens": [0], "batch": [0], "token_budget": [0], "minutes": [0],
                              "target": [2.0]}, {"sets": "x.jsonl"}),
    (cb.EarlyAIMEEvaluation, {"sets": [[]]}, {}),
    (cb.PositionProfile, {"every": [0], "bins": [0], "relative_bins": [-1], "scale": ["square"], "length": [0]}, {}),
    (cb.RolloutSamples, {"every": [0], "count": [0], "save_rollouts_every": [0]}, {}),
    (cb.Throughput, {"every": [0]}, {}),
    (cb.Progress, {"every": [0]}, {}),
    (cb.ExportStudent, {"every": [0]}, {}),
    (cb.PredictionFiles, {"page_rows": [-1]}, {}),
]  # fmt: skip

SERVERS = {
    "timeout": 0.0, "max_concurrency": 0, "max_response_bytes": 0, "retry_seconds": -1.0, "start_seconds": float("inf"),
}  # fmt: skip
ADDRESSES = [
    "host:8000",
    "ftp://host",
    "http://",
    "http://me:password@host",
    "http://host?key=password",
    "http://host:99999",
]


def constructors() -> Cases:
    for cls, fields, others in RANGES:
        for field, values in fields.items():
            for value in values:
                needles = [field if field != "length_budget" else "max_new_tokens"]
                yield f"{cls.__name__}.{field}={value!r:.20}", built(cls, others | {field: value}), needles
    for field, value in SERVERS.items():
        settings = {"urls": URLS, "tokenizer_path": "x", field: value}
        yield f"RemoteTeacher.{field}", built(RemoteTeacher, settings), [field, str(value)]
    for address in [*ADDRESSES, ""]:
        settings = {"urls": [address] if address else [], "tokenizer_path": "x"}
        yield f"RemoteTeacher.urls={address}", built(RemoteTeacher, settings), ["urls"]


def built(cls: Any, settings: dict[str, Any]) -> Attempt:
    return lambda world: cls(**settings)


# -- the command line: arguments that the parser refuses ---------------------------------------------------------------

ARGUMENTS: dict[str, tuple[list[str], list[str]]] = {
    "unknown argument": (["--model.bogus", "3"], ["`--model.bogus`", "3", "nearest"]),
    "misspelt group": (["--trainr.max_steps", "3"], ["--trainr.max_steps", "--trainer.max_steps"]),
    "misspelt key of a class": (["--model.weighting", "LinearDecay", "--model.weighting.gama", "3"], ["gama", "gamma"]),
    "misspelt class": (["--model.weighting", "LinearDcay"], ["LinearDcay", "LinearDecay"]),
    "another class": (["--model.weighting", "torch.optim.AdamW"], ["model.weighting", "WeightingStrategy", "AdamW"]),
    "a class that cannot be imported": (["--model.weighting", "nowhere.Mine"], ["nowhere.Mine", "No module named"]),
    "a class without its argument": (["--model.weighting", "LinearDecay"], ["model.weighting.gamma", "must be given"]),
    "a word for a number": (["--trainer.max_steps", "many"], ["trainer.max_steps", "whole number", "many"]),
    "a fraction for a count": (["--data.prompt_batch", "8.5"], ["data.prompt_batch", "8.5"]),
    "a word for a rate": (["--model.optimizer.lr", "fast"], ["model.optimizer.lr", "a number", "fast"]),
    "no choice": (["--model.aggregation", "sum"], ["model.aggregation", "token-mean", "sum"]),
    "no dtype": (["--model.student.dtype", "int8"], ["model.student.dtype", "bfloat16", "int8"]),
    "no argument": (["--data.train"], ["--data.train", "expected one argument"]),
    "a stray word": (["extra"], ["`extra`", "--key value"]),
    "a number as list": (["--model.advantage", "[3]"], ["model.advantage", "AdvantageTransform", "3"]),
    "no callback": (["--trainer.callbacks", "[Nope]"], ["trainer.callbacks", "Callback", "Nope"]),
    "no scheduler": (["--model.lr_scheduler", "3"], ["model.lr_scheduler", "3"]),
    "an interpolation of nothing": (["--model.optimizer.lr", "${nowhere.lr}"], ["`nowhere.lr`", "interpolation"]),
    "an interpolation of itself": (["--vars", '{"a": "${vars.a}"}'], ["interpolation", "`vars.a`"]),
    "an unset environment variable": (["--model.student.path", "${oc.env:NO_SUCH_VARIABLE}"], ["NO_SUCH_VARIABLE"]),
    "half an interpolation": (["--model.student.path", "${"], ["interpolation"]),
    "no file": (["--config", "no.yaml"], ["no.yaml", "does not exist"]),
}  # fmt: skip

YAMLS: dict[str, tuple[bytes, list[str]]] = {
    "YAML unknown key": (b"model: {studnt: {path: x}}", ["model.studnt", "model.student.path"]),
    "YAML unknown group": (b"modl: {seed: 1}", ["modl"]),
    "YAML wrong type": (b"data: {prompt_batch: [1]}", ["data.prompt_batch", "whole number"]),
    "YAML null for a path": (b"model: {student: {path: null}}", ["model.student.path"]),
    "YAML number for a strategy": (b"model: {weighting: 3}", ["model.weighting", "WeightingStrategy", "3"]),
    "YAML unknown key of a source": (b"data: {train: {pth: x}}", ["data.train.pth", "DataSource", "path"]),
    "YAML broken": (b"model: [1,2", ["YAML", "line 2"]),
    "YAML two colons": (b"a: b: c", ["YAML", "line 1"]),
    "YAML tab": (b"\tx: 1", ["YAML", "line 1"]),
    "YAML list": (b"- a\n- b", ["mapping"]),
    "YAML text": (b"just text", ["mapping", "just text"]),
    "YAML empty": (b"", ["mapping", "empty"]),
    "YAML NUL": (b"a: \x00", ["YAML", "control characters"]),
    "YAML not UTF-8": (b"a: \xff\xfe", ["UTF-8", "byte 4"]),
    "YAML that holds itself": (b"x: &a [*a]", ["RecursionError"]),
    "YAML with a config of another shape": (b"config: {a: 1}", ["AttributeError"]),
    "YAML number of many digits": (b"data: {seed: " + b"9" * 5000 + b"}", ["4300 digits"]),
    "YAML with a Python object": (b"a: !!python/object/apply:os.system ['touch pwned']", ["os.system", "tag"]),
    "YAML with a Python module": (b"a: !!python/module:antigravity", ["python/module", "tag"]),
}  # fmt: skip


# -- the command line: whole commands ----------------------------------------------------------------------------------


def student(change: Callable[[Path], None]) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        tiny.save(tiny.qwen3(seed=1, layers=1), folder / "model")
        change(folder / "model")
        return ["--model.student.path", str(folder / "model")]

    return build


def checkpoint(content: Any) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        path = folder / "bad.ckpt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        return ["--ckpt_path", str(path)]

    return build


def given(*overrides: str) -> Callable[[Path], list[str]]:
    return lambda folder: list(overrides)


def file_in_the_way(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return ["--run_dir", str(folder / "file" / "run")]


OTHER_STUDENT = {
    "global_step": 2, "epoch": 0, "state_dict": {"x": torch.zeros(2)}, "loops": {}, "callbacks": {}, "optimizer_states": [],
    "lr_schedulers": [], "pytorch-lightning_version": "2.6.0",
}  # fmt: skip
COMMANDS: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "negative learning rate": (given("--model.optimizer.lr", "-1"), ["model.optimizer", "-1.0"]),
    "infinite learning rate": (
        given("--model.optimizer", '{"class_path": "torch.optim.SGD", "init_args": {"lr": 1e400}}'), ["inf"]
    ),
    "schedule that divides by zero": (
        given("--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", "0"), ["model.lr_scheduler", "Zero"]
    ),
    "zero steps": (given("--trainer.max_steps", "0"), ["trainer.max_steps", "got 0"]),
    "negative steps": (given("--trainer.max_steps", "-5"), ["trainer", "max_steps", "-5"]),
    "no devices": (given("--trainer.devices", "0"), ["trainer", "devices", "0"]),
    "no such accelerator": (given("--trainer.accelerator", "quantum"), ["trainer", "quantum"]),
    "no such strategy": (given("--trainer.strategy", "warp"), ["trainer", "warp"]),
    "no such time": (given("--trainer.max_time", "soon"), ["trainer", "soon"]),
    "float16": (given("--trainer.precision", "16-mixed"), ["trainer.precision", "16-mixed"]),
    "no checkpoints": (given("--checkpoint_every", "0"), ["checkpoint_every", "got 0"]),
    "no batches between validations": (
        given("--trainer.val_check_interval", "0"), ["trainer.val_check_interval", "got 0", "limit_val_batches"]
    ),
    "an unknown group of settings": (
        given("--allow_change", "colour"), ["`allow_change` must be one of weighting, objective,", "got colour"]
    ),
    "no threads": (given("--num_threads", "-3"), ["num_threads", "-3"]),
    "negative memory": (given("--memory_gb", "-1"), ["memory_gb", "-1"]),
    "negative seed": (given("--seed_everything", "-1"), ["seed_everything", "-1"]),
    "pickles allowed": (given("--weights_only", "false"), ["weights_only", "alse"]),
    "token budget below the longest row": (given("--model.token_budget", "10"), ["model.token_budget", "10"]),
    "token budget below the teacher's longest row": (
        given("--model.token_budget", "40", "--data.teacher_system_prompt", "x" * 30), ["model.token_budget", "40"]
    ),
    "no room in the teacher's window": (
        given("--data.teacher_system_prompt", "x" * 50), ["max_new_tokens", "window of `model.teacher`, 64 tokens"]
    ),
    "no room for a response": (given("--model.sampler.max_new_tokens", "60"), ["max_new_tokens", "64", "60"]),
    "stop ids outside the vocabulary": (given("--model.sampler.stop_token_ids", "[999]"), ["stop_token_ids", "999"]),
    "no stop ids": (given("--model.sampler.stop_token_ids", "[]"), ["stop_token_ids", "[]"]),
    "steps that do not divide": (given("--model.mini_batches", "3"), ["max_steps", "3"]),
    "more mini-batches than rows": (
        given("--model.mini_batches", "16", "--trainer.max_steps", "16"), ["mini_batches", "8 rows", "16"]
    ),
    "LoRA on modules that are not there": (given("--model.student.lora.target_modules", "[nope]"), ["lora", "nope"]),
    "weights of another model": (student(changed("config.json", hidden_size=32)), ["model.student.path", "other shapes"]),
    "weights lost": (student(removed("model.safetensors")), ["model.student.path", "model.safetensors"]),
    "a template that raises": (student(written("chat_template.jinja", "{{ 1 / 0 }}")), ["train.jsonl:1", "ZeroDivision"]),
    "nothing to resume": (given("--ckpt_path", "last"), ["--ckpt_path", "last.ckpt"]),
    "an empty checkpoint": (checkpoint(b""), ["--ckpt_path", "bad.ckpt"]),
    "a pickle as checkpoint": (checkpoint(pickle.dumps(Evil())), ["--ckpt_path", "bad.ckpt"]),
    "a pickle in a checkpoint": (checkpoint({"global_step": Evil()}), ["--ckpt_path", "bad.ckpt"]),
    "a checkpoint of another student": (checkpoint(OTHER_STUDENT), ["--ckpt_path", "26 weights"]),
    "a file in the way": (file_in_the_way, ["--run_dir", "is not writable"]),
}  # fmt: skip
