"""The data room: files -> rows -> ids -> batches, its errors, its order, and its exact position after a restart."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_opd import distributed
from lit_opd.errors import InputError
from lit_opd.prompts import datamodule as prompts
from lit_opd.prompts.datamodule import PromptDataModule
from lit_opd.prompts.encoding import PromptEncoder, row_key
from lit_opd.prompts.filters import RowFilter
from lit_opd.prompts.loading import EvaluationLoader, PromptLoader, PromptOrder
from lit_opd.prompts.sources import DataSource, read_prompts
from lit_opd.types import PromptBatch
from tests.helpers.encoded import encode_prompts

START, END, PAD = "<|im_start|>", "<|im_end|>", "<pad>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if think is defined and not think %}no thought\n{% endif %}{% endif %}"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def make_tokenizer(
    chat_template: str | None = TEMPLATE, pad: bool = True, **options: object
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, a chat template and real special tokens; vocabulary made in place."""
    merges = [("h", "e"), ("he", "l"), ("hel", "l"), ("hell", "o"), ("<", "|"), ("i", "m"), ("Ġ", "hello")]
    words = BYTES + ["".join(pair) for pair in merges]
    core = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in (PAD, START, END)])
    core.add_tokens([AddedToken("<think>", special=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD if pad else None,
        additional_special_tokens=[START],
        **options,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def write_lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def problems(path: Path, count: int, name: str = "train.jsonl") -> str:
    rows = [{"problem": f"hello {n}" * (n % 3 + 1), "answer": n, "difficulty": n % 10} for n in range(count)]
    return write_lines(path / name, rows)


def module_of(tokenizer: object, train: object, **settings: object) -> PromptDataModule:
    return PromptDataModule(train, **settings).use_tokenizer(tokenizer)


def ids_of(batch: PromptBatch, row: int = 0) -> list[int]:
    return batch.ids[row][batch.mask[row]].tolist()


# ---------------------------------------------------------------------------------------------------------- reading


def test_rows_have_prompt_answer_and_stable_ids(tmp_path: Path) -> None:
    rows = [
        {"question": "2 + 2?", "answer": "two and two\n#### 4"},
        {"question": "half?", "answer": 0.5},
        {"question": "ten?", "answer": 10.0},
        {"question": "open", "answer": None},
    ]
    read = read_prompts(write_lines(tmp_path / "math.jsonl", rows))
    assert [row.answer for row in read] == ["4", "0.5", "10", None]
    assert [row.row_id for row in read] == ["math-0", "math-1", "math-2", "math-3"]
    assert read[1].where == f"{tmp_path / 'math.jsonl'}:2" and read[1].prompt == "half?"


def test_bom_blank_lines_and_crlf_are_tolerated_and_lines_still_count(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "b\xc3\xa9\\u202e\\u0007"}')
    read = read_prompts(str(path))
    assert [row.prompt for row in read] == ["a", "bé\u202e\u0007"]  # bidirectional and control characters stay
    assert read[1].where.endswith(":4") and read[1].row_id == "windows-1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', r"bad.jsonl:2: broken JSON"),
        (b'{"prompt": "a"}\n[1, 2]\n', r"bad.jsonl:2: must be a JSON object, got list"),
        (b'[{"prompt": "a"},\n{"prompt": "b"}]', r"bad.jsonl:1: broken JSON .*one object a line"),
        (b'{"prompt": "a"}\n\n{"prompt": "\xff"}\n', r"bad.jsonl:3: not UTF-8 \(byte 13"),
        (b'{"prompt": "a\\u0000b"}\n', r"bad.jsonl:1: NUL character in 'prompt'"),
        (b'{"prompt": "a\0b"}\n', r"bad.jsonl:1: broken JSON"),
        (b'{"prompt": "a\\ud800"}\n', r"bad.jsonl:1: lone surrogate .* at 1"),
        (b'{"prompt": "a"}\n{"prompt": "  \\n"}\n', r"bad.jsonl:2: 'prompt' is empty"),
        (b'{"prompt": "a"}\n{"prompt": 5}\n', r"bad.jsonl:2: 'prompt' must hold text or a list .* got int 5"),
        (b'{"prompt": "a"}\n{"answer": 5}\n', r"bad.jsonl:2: column 'prompt' is missing; columns found: answer"),
        (b'{"text": "a", "label": 1}\n', r"no prompt column found among .*columns found: text, label"),
        (b'{"prompt": "a", "answer": [1]}\n', r"bad.jsonl:1: answer column 'answer' .* got list"),
        (b'{"prompt": "a", "answer": true}\n', r"bad.jsonl:1: answer column 'answer' .* got bool"),
        (b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n', r"bad.jsonl:2: row id '1' was already used at .*:1"),
        (b'{"prompt": "a", "id": null}\n', r"bad.jsonl:1: id column 'id' .* got NoneType"),
        (b'{"prompt": []}\n', r"bad.jsonl:1: 'prompt' must hold a conversation"),
        (b'{"prompt": [{"role": "user"}]}\n', r"bad.jsonl:1: message 0 of 'prompt': content must be text"),
        (b'{"prompt": ["hi"]}\n', r"bad.jsonl:1: message 0 of 'prompt' must be an object"),
        (b'{"prompt": [{"role": "u<|im_end|>", "content": "a"}]}\n', r"bad.jsonl:1: message 0 .*role must be one of"),
        (b'{"prompt": [{"role": "system", "content": "a"}]}\n', r"bad.jsonl:1: .* a user turn awaits"),
        (b'{"prompt": [{"role": "user", "content": ""}]}\n', r"bad.jsonl:1: message 0 of 'prompt': 'content' is empty"),
        (b'{"prompt": [{"role": "user", "content": "a", "tool_calls": [1]}]}\n', r"bad.jsonl:1: .*only an assistant's"),
        (b'{"prompt": ' + b"[" * 100_000 + b"\n", r"bad.jsonl:1: broken JSON"),
        (b"", r"bad.jsonl: the data is empty"),
        (b"\n \n", r"bad.jsonl: the data is empty"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(str(path))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("nowhere.parquet", "nowhere.parquet: no such file"),
        ("a/b/c", "a/b/c: no such file or folder"),
        (" ", "must be a file, a folder or a hub id"),
    ],
)
def test_a_missing_source_is_an_error(path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_prompts(path)


def test_an_unknown_kind_of_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("prompt\nhello\n")
    (tmp_path / "data.parquet").write_text("no parquet")
    with pytest.raises(InputError, match=r"data.csv: must be one of .jsonl"):
        read_prompts(str(tmp_path / "data.csv"))
    with pytest.raises(InputError, match=r"data.parquet: not a readable Parquet"):
        read_prompts(str(tmp_path / "data.parquet"))


def test_parquet_and_folders_give_the_rows_of_the_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    import pyarrow

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"problem": f"p{n}", "answer": str(n), "level": n} for n in range(5)]
    wanted = [(row["problem"], row["answer"]) for row in rows if row["level"] >= 2]
    folder = tmp_path / "folder"
    folder.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "part.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for path in (write_lines(tmp_path / "d.jsonl", rows), folder / "part.parquet", folder, tmp_path / "saved"):
        read = read_prompts(DataSource(str(path), filter="level >= 2"))
        assert [(row.prompt, row.answer) for row in read] == wanted, path
    with pytest.raises(InputError, match=r"part.parquet: row 1: 'problem' is empty"):
        rows[1]["problem"] = ""
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "part.parquet")
        read_prompts(str(folder / "part.parquet"))
    with pytest.raises(InputError, match=r"saved\[?.*could be loaded|no data set could be loaded"):
        read_prompts(DataSource(str(folder), split="nosplit"))


SPLITS = (
    "train", "train[:80%]", "train[80%:]", "train[2:5]", "train[-3:]", "train[:-25%]", "train[33%:67%]", "train[5:1_000]",
    "train[:2]+train[-2:]", "train[10:50%]", "train[:]",
)  # fmt: skip


def of_every_reader(folder: Path, rows: list[dict]) -> dict[str, Path]:
    """The rows as JSON lines, Parquet, a saved data set, a saved dictionary of splits and a folder."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(rows)
    paths = {name: folder / name for name in ("d.jsonl", "d.json", "d.parquet", "one", "splits", "folder")}
    write_lines(paths["d.jsonl"], rows)
    write_lines(paths["d.json"], rows)
    data.to_parquet(paths["d.parquet"])
    data.save_to_disk(paths["one"])
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(paths["splits"])
    paths["folder"].mkdir()
    write_lines(paths["folder"] / "train.jsonl", rows)
    return paths


def test_every_reader_takes_the_part_of_a_split_that_datasets_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"problem": f"p{n}", "answer": str(n)} for n in range(13)]
    paths = of_every_reader(tmp_path, rows)
    taken = {}
    for split in SPLITS:
        read = {name: read_prompts(DataSource(str(path), split=split)) for name, path in paths.items()}
        wanted = [row.prompt for row in read["folder"]]  # read by `datasets` itself
        assert {name: [row.prompt for row in found] for name, found in read.items()} == dict.fromkeys(paths, wanted)
        taken[split] = read["d.jsonl"]
    assert len(taken["train[:80%]"]) == 10 and [row.answer for row in taken["train[80%:]"]] == ["10", "11", "12"]
    last = taken["train[80%:]"][-1]
    assert last.row_id == "d-12" and last.where.endswith("d.jsonl:13")


def test_a_split_or_name_that_data_does_not_have_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    paths = of_every_reader(tmp_path, [{"problem": f"p{n}"} for n in range(4)])
    assert len(read_prompts(DataSource(str(paths["splits"]), split="test"))) == 1
    for name in ("d.jsonl", "d.json", "d.parquet", "one"):
        for split in ("test", "test[:50%]", "train+test", "train[:101%]", "train[50%]", "train[:3", ""):
            with pytest.raises(
                InputError, match=rf"{name}: `DataSource.split` must be 'train'.*, got '{re.escape(split)}';"
            ):
                read_prompts(DataSource(str(paths[name]), split=split))
    with pytest.raises(InputError, match=r"splits: `DataSource.split` must be 'train' or 'test', .* got 'val\[:1\]';"):
        read_prompts(DataSource(str(paths["splits"]), split="val[:1]"))
    with pytest.raises(
        InputError, match=r"d.jsonl: `DataSource.split` must take at least one of 4 rows, got 'train\[9:\]'"
    ):
        read_prompts(DataSource(str(paths["d.jsonl"]), split="train[9:]"))
    for name in ("d.jsonl", "d.json", "d.parquet", "one", "splits"):
        with pytest.raises(InputError, match=rf"{name}: `DataSource.name` must be null .*, got 'main'; leave it out"):
            read_prompts(DataSource(str(paths[name]), name="main"))
    datasets.Dataset.from_list([{"problem": "a"}], split="test").save_to_disk(tmp_path / "named")
    for split in ("test", "train", "test[:1]"):  # a data set saved alone goes by the name it had, too
        assert len(read_prompts(DataSource(str(tmp_path / "named"), split=split))) == 1


EMPTY_ANSWERS = (
    None,
    "",
    " \n",
    float("nan"),
    "\\boxed{}",
    "so \\boxed{ }",
    "\\boxed{3} or \\boxed{}",
    "x ####",
    "x #### \n",
    "\\boxed{3",
)


def test_an_answer_that_no_response_could_equal_is_none_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_opd.prompts.sources.rank_zero_info", said.append)
    given = [*EMPTY_ANSWERS, "7", "\\boxed{8}", "x #### 9", float("inf")]
    lines = write_lines(tmp_path / "d.jsonl", [{"prompt": f"p{n}", "answer": answer} for n, answer in enumerate(given)])
    wanted = [None] * len(EMPTY_ANSWERS) + ["7", "8", "9", "inf"]
    assert [row.answer for row in read_prompts(lines)] == wanted
    assert said[0].endswith("answer column 'answer' (10 rows without an answer, not graded)")
    numbers = [{"prompt": f"p{n}", "answer": float("nan"), "solution": f"\\boxed{{{n}}}"} for n in range(2)]
    assert [row.answer for row in read_prompts(write_lines(tmp_path / "n.jsonl", numbers))] == ["0", "1"]
    assert said[1].endswith("answer column 'solution'")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = __import__("pyarrow").table({"prompt": ["a", "b"], "answer": [float("nan"), 2.0]})
    parquet.write_table(table, tmp_path / "d.parquet")
    assert [row.answer for row in read_prompts(str(tmp_path / "d.parquet"))] == [None, "2"]


def test_an_unreachable_hub_names_the_local_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"someone/data: neither .*Couldn't reach.* local .jsonl, .parquet or folder"):
        read_prompts("someone/data")


def test_missing_packages_are_named_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.parquet").write_text("")
    for package in ("datasets", "pyarrow"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    for path in ("someone/data", str(tmp_path), str(tmp_path / "data.parquet")):
        with pytest.raises(InputError, match=r"pip install 'lit-opd\[data\]'"):
            read_prompts(path)


def test_chat_messages_lose_only_their_trailing_assistant_turn(tmp_path: Path) -> None:
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "more"), ("assistant", "well")]
    messages = [{"role": role, "content": content, "weight": None} for role, content in turns]
    read = read_prompts(write_lines(tmp_path / "chat.jsonl", [{"messages": messages}]))
    assert read[0].prompt == [{"role": role, "content": content} for role, content in turns[:4]]


def test_configured_columns_come_first_and_are_checked(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "d.jsonl", [{"prompt": "no", "text": "yes", "key": "k", "label": 7, "expert": "math"}]
    )
    columns = prompts.ColumnNames(prompt="text", answer="label", id="key", teacher="expert")
    row = read_prompts(path, columns)[0]
    assert (row.prompt, row.answer, row.row_id, row.teacher) == ("yes", "7", "k", "math")
    assert read_prompts(DataSource(path, prompt_column="prompt", id_prefix="a"), columns)[0].prompt == "no"
    assert read_prompts(DataSource(path, id_prefix="a"), columns)[0].row_id == "a/k"
    assert read_prompts(DataSource(path, id_column="#"), columns)[0].row_id == "d-0"
    for field in ("prompt", "answer", "id", "teacher"):
        with pytest.raises(InputError, match=f"`PromptDataModule.{field}_column` .* got 'nope'; columns found: prompt"):
            read_prompts(path, prompts.ColumnNames(**{"prompt": "text", field: "nope"}))


def test_real_evaluation_files_load() -> None:
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared evaluation files are not here")
    for name, count, first in (("aime24", 30, "204"), ("aime25", 30, "70"), ("gsm8k_test", 1319, "18")):
        read = read_prompts(str(folder / f"{name}.jsonl"))
        assert len(read) == count and read[0].answer == first


# ---------------------------------------------------------------------------------------------------------- filters

ROW = {
    "difficulty": 6,
    "level": "hard one",
    "Problem Type": "algebra",
    "ok": True,
    "note": None,
    "x.y-z": 1.5,
    "topic": 'Counting, "Probability"',
}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("difficulty >= 6", True),
        ("difficulty>6", False),
        ("difficulty < 6.5", True),
        ("difficulty <= 5", False),
        ("difficulty == 6.0", True),
        ("difficulty != 6", False),
        ("difficulty in [5, 6]", True),
        ("difficulty not  in [5, 6]", False),
        ("level == hard one", True),
        ('level == "hard one"', True),
        ("level in [hard one, easy]", True),
        ('level not in ["easy"]', True),
        ("level > hard", True),
        ('"Problem Type" == algebra', True),
        ('topic in [algebra, "Counting, \\"Probability\\""]', True),
        ('topic in ["Counting, \\"Probability\\"" , algebra]', True),
        ('topic in [Counting, Probability, null, "]["]', False),
        ("level in [hard one, Bachelor's]", True),
        ("note in [null, algebra]", True),
        ("ok == true", True),
        ("ok == false", False),
        ("note == null", True),
        ("note != null", False),
        ("note == 5", False),
        ("difficulty != null", True),
        ("x.y-z >= 1.5", True),
        ("  difficulty   >=   6  ", True),
    ],
)
def test_filter_grammar(text: str, kept: bool) -> None:
    assert RowFilter.parse(text).keeps(ROW, "here", list(ROW)) is kept


@pytest.mark.parametrize(
    "text",
    [
        "",
        "difficulty",
        "difficulty = 6",
        "difficulty >=",
        ">= 6",
        "difficulty >= [1]",
        "difficulty in 6",
        "difficulty == [6]",
        "difficulty > true",
        "difficulty > null",
        "difficulty inside [6]",
        'topic == "Counting',
        'topic == Counting "x"',
        "topic == 'algebra'",
        "topic in ['algebra', 'geometry']",
        'topic in [algebra, "Counting, Probability]',
        'topic in [algebra, "Counting" Probability]',
        'topic in [algebra, "\\q"]',
        "topic in [[1, 2], algebra]",
        "topic in [algebra, , geometry]",
        "topic in [algebra,]",
        "__import__('os').system('true')",
    ],
)
def test_what_is_not_of_the_grammar_is_an_error(text: str) -> None:
    with pytest.raises(InputError, match="`PromptDataModule.filter`"):
        RowFilter.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing >= 6", "no column 'missing' in F:1; columns found: difficulty, level"),
        ("level >= 6", "F:1 has str 'hard one', which does not compare with int 6"),
        ("ok >= 1", "F:1 has bool True, which does not compare with int 1"),
        ("difficulty == hard", "F:1 has int 6, which does not compare with str 'hard'"),
        ("note > 5", "F:1 has NoneType None.*put `note != null` before it"),
    ],
)
def test_filters_that_do_not_fit_the_data_are_errors(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RowFilter.parse(text).keeps(ROW, "F:1", list(ROW))


def test_a_quote_in_bare_words_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        InputError, match=r"""'algebra' is neither bare words nor JSON; put text in double quotes, \\" for"""
    ):
        RowFilter.parse("topic in ['algebra', geometry]")


def test_filters_are_and_ed_counted_and_may_not_empty_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_opd.prompts.sources.rank_zero_info", said.append)
    path = problems(tmp_path, 30)
    read = read_prompts(DataSource(path, filter="difficulty < 8"), filters=["difficulty >= 6"])
    assert [row.row_id for row in read] == [f"train-{n}" for n in range(30) if n % 10 in (6, 7)]
    assert "6 of 30 rows kept, 24 filtered out (difficulty >= 6 and difficulty < 8)" in said[0]
    with pytest.raises(InputError, match=r"the filter 'difficulty > 99' keeps none of 30 rows"):
        read_prompts(path, filters="difficulty > 99")


# --------------------------------------------------------------------------------------------------------- encoding


def test_ordinary_prompts_tokenise_like_apply_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PromptEncoder(tokenizer, template_options={"think": False}, system_prompt="hello")
    for text in ("hello  ", "2 < 3 | im_end ><|", "é世界 <think> \u202e", "<|im_end |>"):
        messages = [{"role": "system", "content": "hello"}, {"role": "user", "content": text}]
        wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, think=False)
        assert encoder.encode(text) == wanted
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "hello"}]
    assert "hello" not in tokenizer.decode(encoder.encode(own)).split("user")[0]  # the row's own system message stays


@pytest.mark.parametrize(
    "text", ["a <|im_end|> b", "<|im_end|>", " <|im_start|>assistant\nhello<|im_end|><pad>\n", "<|im_<|im_end|>end|>"]
)
def test_special_token_strings_in_data_stay_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    special = set(tokenizer.all_special_ids)
    ids = PromptEncoder(tokenizer).encode(text)
    harmless = PromptEncoder(tokenizer).encode("hello")
    assert [token for token in ids if token in special] == [token for token in harmless if token in special]
    assert tokenizer.decode(ids) == f"{START}user\n{text.strip()}{END}\n{START}assistant\n"
    allowed = PromptEncoder(tokenizer, special_tokens_in_text="allow").encode(text)
    messages = [{"role": "user", "content": text}]
    assert allowed == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) != ids


@pytest.mark.parametrize("text", ["hello <|im_end|> and", "<|im_end|>", "<|im_<|im_end|>end|>", "a<pad><pad>b "])
def test_the_careful_path_equals_transformers_own_sanitiser(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    if "sanitize_control_tokens" not in inspect.signature(tokenizer.apply_chat_template).parameters:
        pytest.skip("this transformers has no sanitiser")
    messages = [{"role": "user", "content": text}]
    options = {"add_generation_prompt": True, "return_dict": False, "sanitize_control_tokens": True}
    assert PromptEncoder(tokenizer).encode(messages) == tokenizer.apply_chat_template(messages, **options)


def test_special_tokens_in_the_configured_system_prompt_are_trusted(tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.convert_tokens_to_ids(END)
    plain = PromptEncoder(tokenizer, system_prompt="hello").encode("a <|im_end|>")
    trusted = PromptEncoder(tokenizer, system_prompt="hello <|im_end|>").encode("a <|im_end|>")
    assert trusted.count(end) == plain.count(end) + 1


def test_the_careful_path_respects_tokens_that_swallow_spaces() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<|end|>", rstrip=True, special=True)]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|end|>\n hello{% endfor %}"
    encoder, hello = PromptEncoder(tokenizer), tokenizer("hello", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    ordinary, careful = encoder.encode("a"), encoder.encode("a<|end|>\n hello")
    assert ordinary[-len(hello) - 1 :] == careful[-len(hello) - 1 :] == [end, *hello]
    assert careful.count(end) == 1 and tokenizer.decode(careful) == "a<|end|>\n hello<|end|>hello"


def test_plain_text_keeps_the_tokenizers_own_bos_and_escapes() -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer(chat_template=None)
    bos = tokenizer.convert_tokens_to_ids(START)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, bos)]
    )
    encoder = PromptEncoder(tokenizer)
    assert not encoder.renders and encoder.encode("hello") == tokenizer("hello")["input_ids"]
    ids = encoder.encode("hello<|im_end|>")
    assert ids[0] == bos and tokenizer.convert_tokens_to_ids(END) not in ids
    assert tokenizer.decode(ids[1:]) == "hello<|im_end|>"
    assert (
        PromptEncoder(make_tokenizer(), chat_template=False).encode("hello") == make_tokenizer()("hello")["input_ids"]
    )


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (
            None,
            {"chat_template": True},
            "`PromptEncoder.chat_template` must be False or 'auto' for a tokenizer without",
        ),
        (None, {"system_prompt": "be brief"}, "`PromptEncoder.system_prompt` must be None without a chat template"),
        (
            TEMPLATE,
            {"chat_template": "yes"},
            "`PromptEncoder.chat_template` must be True, False or 'auto', got str 'yes'",
        ),
        (TEMPLATE, {"special_tokens_in_text": "drop"}, "`PromptEncoder.special_tokens_in_text` must be 'escape', 'ref"),
        (TEMPLATE, {"template_options": {"tokenize": True}}, "`PromptEncoder.template_options` must be variables"),
    ],
)
def test_bad_template_settings_are_errors(template: str | None, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PromptEncoder(make_tokenizer(template), **settings)


@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        ("{{ raise_exception('no way') }}", "hello", r"F:7: the chat template failed \(TemplateError: no way\)"),
        ("{% if %}", "hello", r"F:7: the chat template failed \(TemplateSyntaxError"),
        ("{{ messages[0].content[:2] }}", "<|im_end|>" * 3, r"F:7: the chat template of .* does not render message 0"),
        ("", "", r"F:7: the prompt has no tokens"),
        (
            TEMPLATE.replace("trim", "truncate(20)"),
            "hello <|im_end|> hello hello",
            r"F:7: the chat .* drops 10 characters",
        ),
        (None, [{"role": "user", "content": "a"}], r"F:7: chat messages need a chat template"),
    ],
)
def test_a_prompt_that_can_not_be_rendered_names_its_row(template: str | None, prompt: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PromptEncoder(make_tokenizer(template)).encode(prompt, "F:7")


def test_template_options_without_effect_warn(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_opd.prompts.encoding.rank_zero_warn", said.append)
    PromptEncoder(tokenizer, template_options={"think": False})
    assert not said
    PromptEncoder(tokenizer, template_options={"thimk": False})
    PromptEncoder(make_tokenizer(None), template_options={"think": False})
    assert "never reads thimk" in said[0] and "no effect" in said[1]


def test_batches_are_left_padded_and_keyed_by_row_and_sample(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = encode_prompts(
        PromptEncoder(tokenizer), ["hello", "hello hello 1"], row_ids=["a", "b"], answers=["1", None], num_samples=2
    )
    assert batch.row_ids == ("a", "a", "b", "b") and batch.answers == ("1", "1", None, None)
    assert batch.row_keys.tolist() == [row_key("a", 0), row_key("a", 1), row_key("b", 0), row_key("b", 1)]
    assert batch.mask[:, -1].all() and batch.mask[2:].all() and not batch.mask[:2, 0].any()
    assert (batch.mask.int().diff(dim=1) >= 0).all()  # padding only before the prompt
    assert (batch.ids[~batch.mask] == tokenizer.pad_token_id).all()
    assert ids_of(batch, 0) == PromptEncoder(tokenizer).encode("hello")
    assert ids_of(batch, 3) == PromptEncoder(tokenizer).encode("hello hello 1")


def test_row_keys_are_fixed_for_ever() -> None:
    assert row_key("aime-0", 1) == 0x4971F7DE1DAAA2B3  # printf 'aime-0\\0001' | b2sum -l 64, first bit cleared
    assert row_key("a", 11) != row_key("a1", 1)
    assert len({row_key(f"r{n}", k) for n in range(1000) for k in range(8)}) == 8000


def test_no_pad_token_is_an_error_and_end_is_never_taken_silently(tmp_path: Path) -> None:
    unpadded = make_tokenizer(pad=False)
    path = problems(tmp_path, 4)
    with pytest.raises(
        InputError, match=r"student tokenizer has no pad token; set one .* pass `PromptDataModule.pad_token`"
    ):
        module_of(unpadded, path, prompt_batch=2).setup("fit")
    with pytest.raises(
        InputError, match=r"`PromptDataModule.pad_token` must be in the student's vocabulary, got '<nope>'"
    ):
        module_of(unpadded, path, prompt_batch=2, pad_token="<nope>").setup("fit")
    batch = module_of(unpadded, path, prompt_batch=4, pad_token=END).train_dataloader().batch(0)
    assert (batch.ids[~batch.mask] == unpadded.eos_token_id).all() and not batch.mask.all()


def test_the_teachers_own_template_gives_teacher_ids(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = problems(tmp_path, 4)
    other = make_tokenizer("{% for m in messages %}Q: {{ m.content }}{% endfor %}{{ '\nA:' }}")
    module = PromptDataModule(path, prompt_batch=4).use_tokenizer(tokenizer, other)
    batch = module.train_dataloader().batch(0)
    texts = {f"train-{n}": f"hello {n}" * (n % 3 + 1) for n in range(4)}
    for row, row_id in enumerate(batch.row_ids):
        assert batch.teacher_ids[row][batch.teacher_mask[row]].tolist() == other(f"Q: {texts[row_id]}\nA:")["input_ids"]
        assert ids_of(batch, row) == PromptEncoder(tokenizer).encode(texts[row_id])
    assert batch.teacher_mask[:, -1].all()
    options = module_of(tokenizer, path, prompt_batch=4, teacher_template_options={"think": False})
    longer = options.train_dataloader().batch(0)
    assert longer.teacher_mask.sum() > longer.mask.sum()
    same = PromptDataModule(path, prompt_batch=4).use_tokenizer(tokenizer, make_tokenizer())
    assert same.train_dataloader().batch(0).teacher_ids is None
    assert module_of(tokenizer, path, prompt_batch=4).teacher_encoder is None
    other.save_pretrained(tmp_path / "teacher")  # a configured folder holds also when the student's object is given
    configured = module_of(tokenizer, path, prompt_batch=4, teacher_tokenizer=str(tmp_path / "teacher"))
    assert torch.equal(configured.train_dataloader().batch(0).teacher_ids, batch.teacher_ids)
    loader = configured.train_dataloader()
    assert configured.use_tokenizer(tokenizer).train_dataloader() is loader  # the same tokenizer again forgets nothing


def test_a_template_given_for_the_student_is_not_that_of_a_teacher_with_its_own_tokenizer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path, base = problems(tmp_path, 2), make_tokenizer(None)
    other = make_tokenizer("{% for m in messages %}Q: {{ m.content }}{% endfor %} A:{% if not think %} no{% endif %}")
    settings = {"prompt_batch": 2, "template_options": {"chat_template": TEMPLATE, "think": False}}
    batch = PromptDataModule(path, **settings).use_tokenizer(base, other).train_dataloader().batch(0)
    texts = {"train-0": "hello 0", "train-1": "hello 1" * 2}
    for row, row_id in enumerate(batch.row_ids):
        read = batch.teacher_ids[row][batch.teacher_mask[row]].tolist()
        assert read == other(f"Q: {texts[row_id]} A: no")["input_ids"]  # its template, and the student's variable
        assert ids_of(batch, row) == PromptEncoder(tokenizer, template_options={"think": False}).encode(texts[row_id])
    other.save_pretrained(tmp_path / "teacher")
    named = module_of(base, path, **settings, teacher_tokenizer=str(tmp_path / "teacher"))
    assert torch.equal(named.train_dataloader().batch(0).teacher_ids, batch.teacher_ids)
    alone = module_of(base, path, **settings, teacher_system_prompt="Be brief.")  # no tokenizer of its own
    assert f"{START}system\nBe brief." in base.decode(alone.train_dataloader().batch(0).teacher_ids[0])


# ------------------------------------------------------------------------------------------------- order and mixing


def test_an_epoch_without_weights_is_every_row_once_in_a_new_order() -> None:
    order = PromptOrder([7, 5], seed=1)
    epochs = [order.rows(epoch * 12, 12) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert PromptOrder([7, 5], seed=1).rows(3, 30) == order.rows(3, 30)  # no hidden state
    assert PromptOrder([7, 5], seed=2).rows(0, 12) != epochs[0]


def test_sources_are_mixed_in_proportion_everywhere() -> None:
    order = PromptOrder([10, 1000, 40], [2.0, 1.0, 1.0], seed=3)  # 1050 rows: 525, 262, 262 draws
    assert order.quotas == (525, 262, 262) and len(order) == 1049
    rows = order.rows(0, 4 * len(order))
    for start in range(0, len(rows) - 100, 37):
        small = sum(row < 10 for row in rows[start : start + 100])
        assert abs(small - 50) <= 2
    counts = Counter(row for row in rows if 10 <= row < 1010)
    assert set(counts.values()) == {1, 2} and len(counts) == 1000  # 1048 draws: every row before any twice


def test_weights_are_for_all_sources_or_none(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [problems(tmp_path, 6, "a.jsonl"), problems(tmp_path, 18, "b.jsonl")]
    module = module_of(tokenizer, [DataSource(parts[0], weight=3), DataSource(parts[1], weight=1)], prompt_batch=12)
    for index in range(4):
        names = Counter(row_id[0] for row_id in module.train_dataloader().batch(index).row_ids)
        assert names == {"a": 9, "b": 3}
    with pytest.raises(InputError, match=r"`DataSource.weight` must be given for all sources or for none"):
        module_of(tokenizer, [DataSource(parts[0], weight=3), parts[1]], prompt_batch=4).setup("fit")
    with pytest.raises(InputError, match=r"`DataSource.weight` must be above 0"):
        module_of(tokenizer, [DataSource(part, weight=0) for part in parts], prompt_batch=4).setup("fit")
    with pytest.raises(InputError, match=r"a.jsonl:1: row id 'a-0' was already used at .*`id_prefix`"):
        module_of(tokenizer, [parts[0], parts[0]], prompt_batch=4).setup("fit")


# ---------------------------------------------------------------------------------------------------------- loaders


def test_batches_are_full_and_cross_epochs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    loader = module_of(tokenizer, problems(tmp_path, 10), prompt_batch=4).train_dataloader()
    assert len(loader) == 3 and [len(batch) for batch in loader] == [4, 4, 4]
    drawn = [row_id for index in range(5) for row_id in loader.batch(index).row_ids]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == sorted(f"train-{n}" for n in range(10))
    assert next(iter(loader)).row_ids == loader.batch(3).row_ids  # iter goes on


@pytest.mark.parametrize("count", [10, 3])
def test_the_union_of_the_ranks_is_the_single_process_batch(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, count: int
) -> None:
    module = module_of(tokenizer, problems(tmp_path, count), prompt_batch=6, samples_per_prompt=2)
    whole = module.train_dataloader()
    options = {"prompt_batch": 6, "samples_per_prompt": 2, "pad_id": whole.pad_id}
    ranks = [PromptLoader(whole.prompts, whole.order, **options, rank=rank, world=3) for rank in range(3)]
    for index in range(7):
        batch, parts = whole.batch(index), [rank.batch(index) for rank in ranks]
        keys = [part.row_keys.reshape(-1, 2) for part in parts]  # [prompts, samples] of each rank
        assert torch.equal(torch.stack(keys, 1).reshape(-1), batch.row_keys)
        assert len(set(batch.row_keys.tolist())) == 12  # also where a batch holds a prompt twice
        for part in parts:
            assert part.row_ids[0::2] == part.row_ids[1::2]


def test_a_batch_that_does_not_fit_the_ranks_names_both(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    for size in (4, 12):
        with pytest.raises(InputError, match=rf"`PromptDataModule.prompt_batch` .* ranks \(8\), got {size}"):
            module_of(tokenizer, problems(tmp_path, 40), prompt_batch=size).setup("fit")


@pytest.mark.parametrize(("count", "world"), [(10, 3), (7, 2), (1, 4), (8, 1)])
def test_evaluation_covers_every_prompt_once_on_equally_many_batches(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, count: int, world: int
) -> None:
    module = module_of(tokenizer, problems(tmp_path, 4), val=problems(tmp_path, count, "val.jsonl"), val_batch=4)
    encoded = module.val_dataloader().prompts
    ranks = [list(EvaluationLoader(encoded, batch=4, rank=rank, world=world)) for rank in range(world)]
    assert len({tuple(len(batch) for batch in batches) for batches in ranks}) == 1
    assert all(len(batches) == len(module.val_dataloader()) for batches in ranks)
    counted = [r for batches in ranks for b in batches for r, keep in zip(b.row_ids, b.counted, strict=True) if keep]
    assert sorted(counted) == sorted(f"val-{n}" for n in range(count))
    assert [len(batch) for batch in module.test_dataloader()] == [len(batch) for batch in module.predict_dataloader()]


def test_a_held_out_fraction_is_disjoint_seeded_and_independent_of_order(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def split(seed: int, path: str) -> tuple[set[str], set[str]]:
        module = module_of(tokenizer, path, prompt_batch=4, val_fraction=0.25, seed=seed)
        train = {prompt.row_id for prompt in module.train_dataloader().prompts}
        return train, {prompt.row_id for prompt in module.val_dataloader().prompts}

    rows = [{"id": f"r{n}", "prompt": f"hello {n}"} for n in range(200)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    train, val = split(1, path)
    assert not train & val and len(train | val) == 200 and 30 <= len(val) <= 70
    assert split(1, write_lines(tmp_path / "b.jsonl", rows[::-1])) == (train, val)
    assert split(2, path)[1] != val
    with pytest.raises(InputError, match="`PromptDataModule.val_fraction` must be such that"):
        module_of(tokenizer, path, val_fraction=1e-9).setup("fit")


def test_validation_prompts_that_are_trained_on_are_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"id": f"r{n}", "prompt": f"hello {n % 20}"} for n in range(400)]
    repeated = module_of(tokenizer, write_lines(tmp_path / "a.jsonl", rows), prompt_batch=4, val_fraction=0.1)
    with pytest.warns(UserWarning, match=r"`PromptDataModule.val_fraction`: \d+ of \d+ val") as given:
        repeated.setup("fit")
    (said,) = [str(one.message) for one in given if "trained on too" in str(one.message)]
    counts = [int(number) for number in re.findall(r"\d+", said)[:2]]
    assert counts == [repeated.num_prompts[1]] * 2 and "; leave repeated prompts out of `train`" in said
    val = write_lines(tmp_path / "val.jsonl", [{"prompt": f"hello {n}"} for n in (3, 21, 4, 22)])
    for stages in (("fit",), ("validate", "fit")):
        named = module_of(tokenizer, write_lines(tmp_path / "b.jsonl", rows[:20]), prompt_batch=4, val=val)
        with pytest.warns(UserWarning, match=r"`PromptDataModule.val`: 2 of 4 .* row 'val-0'\)") as given:
            for stage in stages:
                named.setup(stage)
        assert sum("trained on too" in str(one.message) for one in given) == 1
    apart = module_of(tokenizer, write_lines(tmp_path / "c.jsonl", rows[:20]), prompt_batch=4, val_fraction=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apart.setup("fit")


def test_the_length_filter_counts_and_may_be_an_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_opd.prompts.datamodule.rank_zero_info", said.append)
    path = write_lines(tmp_path / "d.jsonl", [{"prompt": "a" * size} for size in (1, 50, 60, 2)])
    frame = len(PromptEncoder(tokenizer).encode("a")) - 1
    module = module_of(tokenizer, path, prompt_batch=2, max_prompt_tokens=frame + 2)
    assert {prompt.row_id for prompt in module.train_dataloader().prompts} == {"d-0", "d-3"}
    assert said == [f"train: dropped 2 of 4 prompts longer than {frame + 2} tokens (longest {frame + 60})"]
    with pytest.raises(InputError, match=rf"d.jsonl:2: the prompt has {frame + 50} tokens.*`too_long: filter`"):
        module_of(tokenizer, path, prompt_batch=2, max_prompt_tokens=frame + 2, too_long="error").setup("fit")
    with pytest.raises(InputError, match=rf"all 4 train prompts are longer, the longest has {frame + 60} tokens"):
        module_of(tokenizer, path, prompt_batch=2, max_prompt_tokens=frame).setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_batch": 0}, "`PromptDataModule.prompt_batch` must be at least 1, got 0"),
        ({"samples_per_prompt": 0}, "`PromptDataModule.samples_per_prompt` must be at least 1"),
        ({"max_prompt_tokens": -1}, "`PromptDataModule.max_prompt_tokens` must be at least 1"),
        ({"val_batch": 0}, "`PromptDataModule.val_batch` must be at least 1"),
        ({"val_limit": 0}, "`PromptDataModule.val_limit` must be at least 1 or None"),
        ({"val_fraction": 1.5}, "`PromptDataModule.val_fraction` must be between 0 and 1"),
        ({"val_fraction": 0.5, "val": "x.jsonl"}, "`PromptDataModule.val_fraction` must be None when"),
        ({"too_long": "cut"}, "`PromptDataModule.too_long` must be"),
        ({"train": []}, "`PromptDataModule.train` must be at least one source"),
        ({"chat_template": "maybe"}, "`PromptDataModule.chat_template` must be True, False or 'auto'"),
        ({"teacher_chat_template": "maybe"}, "`PromptDataModule.teacher_chat_template` must be True, False or"),
    ],
)
def test_bad_settings_name_field_and_value(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, settings: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        module_of(tokenizer, **({"train": problems(tmp_path, 4), "prompt_batch": 2} | settings)).setup("fit")


def test_missing_tokenizer_or_validation_data_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = problems(tmp_path, 4)
    with pytest.raises(InputError, match=r"`PromptDataModule.tokenizer` must be .* or call `use_tokenizer`"):
        PromptDataModule(path).setup("fit")
    with pytest.raises(InputError, match=r"`PromptDataModule.tokenizer` must be a tokenizer folder or hub id, got"):
        PromptDataModule(path, tokenizer=str(tmp_path)).setup("fit")
    for stage in ("validate", "test", "predict"):
        with pytest.raises(InputError, match=f"`PromptDataModule.val` must name data .* to {stage}"):
            module_of(tokenizer, path).setup(stage)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    module = PromptDataModule(path, prompt_batch=2, tokenizer=str(tmp_path / "tokenizer"))
    assert module.train_dataloader().batch(0).mask.any() and module.val_dataloader() == []


def test_a_configured_tokenizer_renders_the_prompts_where_its_vocabulary_is_the_students(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    base, path = make_tokenizer(None), problems(tmp_path, 4)
    tokenizer.save_pretrained(tmp_path / "instruct")
    named = PromptDataModule(path, prompt_batch=4, tokenizer=str(tmp_path / "instruct")).use_tokenizer(base)
    batch = named.train_dataloader().batch(0)
    own = module_of(tokenizer, path, prompt_batch=4).train_dataloader().batch(0)
    assert torch.equal(batch.ids, own.ids) and START in tokenizer.decode(batch.ids[0])
    wider = make_tokenizer()
    wider.add_tokens(["<tool>"])
    wider.save_pretrained(tmp_path / "wider")
    folder = re.escape(repr(str(tmp_path / "wider")))
    wanted = rf"`PromptDataModule.tokenizer` must have the student's vocabulary, got {folder}.* 1 tokens .*<tool>"
    named = PromptDataModule(path, prompt_batch=4, tokenizer=str(tmp_path / "wider"))
    with pytest.raises(InputError, match=wanted + r".*`template_options` \(`chat_template`\)"):
        named.use_tokenizer(base).setup("fit")
    named.use_tokenizer(None).trainer = Trainer(logger=False, accelerator="cpu")
    named.trainer.strategy._lightning_module = Recorder(base)  # what `validate` and `predict` leave it to
    with pytest.raises(InputError, match=wanted):
        named.setup("fit")


def test_settings_come_from_yaml_with_nested_sources() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PromptDataModule, "data")
    text = (
        "{train: [a.jsonl, {path: b.parquet, weight: 2, filter: ['difficulty >= 6']}], val: v.jsonl, "
        "filter: level > 1, template_options: {enable_thinking: false}, chat_template: auto, "
        "teacher_chat_template: true}"
    )
    data = parser.instantiate_classes(parser.parse_string(f"data: {text}")).data
    assert data.train == ["a.jsonl", DataSource("b.parquet", weight=2, filter=["difficulty >= 6"])]
    assert data.template_options == {"enable_thinking": False} and data.chat_template == "auto"
    with pytest.raises(jsonargparse.ArgumentError, match="too_long"):
        parser.parse_args(["--data.train", "a.jsonl", "--data.too_long", "cut"])


# ----------------------------------------------------------------------------------------------- resume under Lightning


class Recorder(LightningModule):
    """Notes the rows of each step; fails inside the step ``fail_at`` once."""

    def __init__(self, tokenizer: object, fail_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.rows: list[tuple[str, ...]] = []
        self.fail_at = fail_at

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        if self.global_step == self.fail_at:
            raise KeyboardInterrupt
        self.rows.append(batch.row_ids)
        self.optimizers().step()

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        assert len(batch) and not batch.counted.logical_not().any()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_of(folder: Path, **options: object) -> Trainer:
    saver = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", devices=1, callbacks=[saver], **quiet, **({"max_epochs": -1} | options))


@pytest.mark.parametrize(
    "options", [{}, {"limit_train_batches": 2}, {"val_check_interval": 2, "check_val_every_n_epoch": None}]
)
def test_resume_continues_at_the_batch_after_the_last_trained_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, options: dict
) -> None:
    def data() -> PromptDataModule:  # 3 batches an epoch, so the stops fall inside, at and after an epoch's end
        return PromptDataModule(train, prompt_batch=4, val=train)

    train = problems(tmp_path, 10)
    whole = Recorder(tokenizer)
    trainer_of(tmp_path / "whole", max_steps=7, **options).fit(whole, data())
    loader = module_of(tokenizer, train, prompt_batch=4).train_dataloader()
    assert whole.rows == [loader.batch(index).row_ids for index in range(7)]
    for step in range(1, 7):
        rest = Recorder(tokenizer)
        path = str(tmp_path / "whole" / f"step={step}.ckpt")
        trainer_of(tmp_path / "rest", max_steps=7, **options).fit(rest, data(), ckpt_path=path)
        assert rest.rows == whole.rows[step:], f"resumed after step {step}"


def test_resume_by_epochs_keeps_the_position(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train = problems(tmp_path, 10)
    whole, first, rest = (Recorder(tokenizer) for _ in range(3))
    trainer_of(tmp_path / "whole", max_epochs=3).fit(whole, PromptDataModule(train, prompt_batch=4))
    trainer = trainer_of(tmp_path / "first", max_epochs=1)
    trainer.fit(first, PromptDataModule(train, prompt_batch=4))
    trainer.save_checkpoint(tmp_path / "end.ckpt")  # after the epoch: Lightning drops the loader's own state here
    again = trainer_of(tmp_path / "rest", max_epochs=3)
    again.fit(rest, PromptDataModule(train, prompt_batch=4), ckpt_path=str(tmp_path / "end.ckpt"))
    assert first.rows + rest.rows == whole.rows


def test_a_batch_in_flight_is_not_counted_as_done(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train = problems(tmp_path, 10)
    whole, cut, rest = Recorder(tokenizer), Recorder(tokenizer, fail_at=4), Recorder(tokenizer)
    trainer_of(tmp_path / "whole", max_steps=7).fit(whole, PromptDataModule(train, prompt_batch=4))
    trainer = trainer_of(tmp_path / "cut", max_steps=7)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trainer.fit(cut, PromptDataModule(train, prompt_batch=4))
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    again = trainer_of(tmp_path / "rest", max_steps=7)
    again.fit(rest, PromptDataModule(train, prompt_batch=4), ckpt_path=str(tmp_path / "cut.ckpt"))
    assert cut.rows == whole.rows[:4] and rest.rows == whole.rows[4:]


def test_resuming_on_other_data_is_an_error_but_validating_it_is_not(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    train, other = problems(tmp_path, 10), problems(tmp_path, 10, "other.jsonl")
    module = module_of(tokenizer, train, prompt_batch=4)
    next(iter(module.train_dataloader()))
    state = module.state_dict()
    assert state["loader"]["batches"] == 1 and all(type(value) is int for value in state["loader"].values())
    changes = {
        "as many rows as in the checkpoint, 10, got 9": {"train": problems(tmp_path / ".", 9, "train9.jsonl")},
        "the row ids and shares of the checkpoint": {"train": other},
        "`PromptDataModule.seed` must be the checkpoint's, 0, got 1": {"seed": 1},
        "`PromptDataModule.prompt_batch` must be the checkpoint's, 4, got 2": {"prompt_batch": 2},
    }
    for message, change in changes.items():
        changed = module_of(tokenizer, **({"train": train, "prompt_batch": 4} | change))
        changed.load_state_dict(state)
        with pytest.raises(InputError, match=message):
            changed.train_dataloader()
    trainer_of(tmp_path / "run", max_steps=2).fit(Recorder(tokenizer), PromptDataModule(train, prompt_batch=4))
    validated = PromptDataModule(other, val=other)
    trainer_of(tmp_path / "val").validate(
        Recorder(tokenizer), validated, ckpt_path=str(tmp_path / "run" / "step=2.ckpt"), verbose=False
    )
    half = PromptLoader(module.train_dataloader().prompts, module.train_dataloader().order, prompt_batch=4, world=2)
    half.load_state_dict(state["loader"])  # another number of ranks goes on
    assert half.num_finished == 1
