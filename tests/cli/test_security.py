"""What SECURITY.md promises: files that would run code are refused, requests stay with their host, secrets stay out of files."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.distributed.checkpoint.metadata import MetadataIndex

from benchmarks.audit import CLEAN, NOT_AUDITED, VULNERABLE, report
from callbacks import default_callbacks
from lit_opd.cli.command import OPDCLI, main
from lit_opd.cli.redaction import one_line, redacted, with_references
from lit_opd.errors import InputError, ServerError
from lit_opd.models.loading import load_config, load_tokenizer
from lit_opd.run.checkpoint_kinds import CONSOLIDATE, check_checkpoint
from lit_opd.run.shard_index import read_index
from lit_opd.teacher import RemoteTeacher
from tests.cli.test_inputs import base, nowhere  # noqa: F401  # fixtures
from tests.helpers import bad_inputs as bad
from tests.helpers import fake_vllm as fake
from tests.helpers import tiny

ROOT = Path(__file__).resolve().parents[2]
SECRET = "sk-52a1c0ffee0123456789"
OWN = "pa55word"  # in no environment variable
HARD = [
    'ab\\cd"ef gh\tij',
    'it\'s "ten" é\u202e',
    "-----BEGIN KEY-----\nMIIEvgIBADANBg\n'x\\y=z#'\n-----END KEY-----\n",
]


def spoken(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a refused command says, on both streams."""
    with pytest.raises(SystemExit) as stopped:
        main(default_callbacks, arguments)
    assert stopped.value.code == 2
    return "".join(capsys.readouterr())


# -- no code from files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
@pytest.mark.parametrize("inside", [False, True])
def test_no_command_unpickles_a_checkpoint(base, nowhere, capsys, command, inside):  # noqa: F811
    evil = nowhere / "evil.ckpt"
    torch.save({"global_step": 1, "state_dict": bad.Evil()}, evil) if inside else evil.write_bytes(
        pickle.dumps(bad.Evil())
    )
    said = spoken([command, "--config", str(base / "base.yaml"), "--ckpt_path", str(evil)], capsys)
    assert "--ckpt_path" in said and "evil.ckpt" in said
    assert ("executing code" if inside else "not a zip file") in said
    assert not list((nowhere / "cwd").iterdir())


def test_a_checkpoint_changes_no_setting(base, nowhere, capsys):  # noqa: F811
    """Lightning reads ``hyper_parameters`` of a checkpoint into the config, class paths included."""
    path = nowhere / "other.ckpt"
    torch.save(bad.OTHER_STUDENT | {"hyper_parameters": {"no_such_setting": 1}}, path)
    said = spoken(["fit", "--config", str(base / "base.yaml"), "--ckpt_path", str(path), "--run_dir", "run"], capsys)
    assert "26 weights" in said and "no_such_setting" not in said


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy])
@pytest.mark.parametrize("content", [pickle.dumps(bad.Evil()), b"", b"noise", pickle.dumps(re.compile("a"))])
def test_the_index_of_a_sharded_checkpoint_runs_nothing(nowhere, kind, content):  # noqa: F811
    (nowhere / "shards").mkdir()
    (nowhere / "shards" / ".metadata").write_bytes(content)
    strategy = kind.__new__(kind)  # only its class is looked at
    with pytest.raises(InputError, match=r"--ckpt_path.*shards.*\.metadata"):
        check_checkpoint(nowhere / "shards", strategy, training=True)
    assert not list((nowhere / "cwd").iterdir())


def test_a_name_inside_an_allowed_module_is_no_way_out(nowhere):  # noqa: F811
    """``torch.distributed.checkpoint.metadata`` imports ``os``: protocol 4 could walk to ``os.system`` through it."""
    walk = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93\x8c\x0btouch pwned\x85R."
    (nowhere / ".metadata").write_bytes(walk)
    with pytest.raises(InputError, match="os.system"):
        check_checkpoint(nowhere, FSDPStrategy.__new__(FSDPStrategy), training=True)
    assert not list((nowhere / "cwd").iterdir())


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy])
def test_an_entry_of_a_sharded_checkpoint_runs_nothing(nowhere, kind):  # noqa: F811
    """torch would unpickle it; one process is told of a command that does, so the look comes first there too."""
    shards, name = nowhere / "shards", "model.a" if kind is FSDPStrategy else "state_dict.a"
    dcp.save({name: bad.Evil(), f"{name}.weight": torch.zeros(3)}, checkpoint_id=shards, no_dist=True)
    with pytest.raises(InputError, match=r"--ckpt_path.*shards.*could run code.*system") as refused:
        check_checkpoint(shards, kind.__new__(kind), training=True)
    assert CONSOLIDATE not in str(refused.value) and not list((nowhere / "cwd").iterdir())


def test_an_index_of_one_rank_is_refused(nowhere):  # noqa: F811
    """torch unpickles it where it stumbles over the index that was looked at."""
    dcp.save({"state_dict.a": torch.zeros(3)}, checkpoint_id=nowhere / "shards", no_dist=True)
    (nowhere / "shards" / "__0.metadata").write_bytes(pickle.dumps(bad.Evil()))
    with pytest.raises(InputError, match=r"falls back to __0\.metadata"):
        check_checkpoint(nowhere / "shards", ModelParallelStrategy.__new__(ModelParallelStrategy), training=True)
    assert not list((nowhere / "cwd").iterdir())


def test_an_index_that_changes_its_own_classes_is_refused(nowhere):  # noqa: F811
    """It could make keys equal that are not, and so hide an entry from the look at it."""
    change = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadataIndex\nN}X\x04\x00\x00\x00mineK\x01s\x86b."
    (nowhere / ".metadata").write_bytes(change)
    with pytest.raises(InputError, match="changes the class MetadataIndex"):
        check_checkpoint(nowhere, FSDPStrategy.__new__(FSDPStrategy), training=True)
    assert not hasattr(MetadataIndex, "mine")


def test_the_index_that_torch_writes_is_read(tmp_path):
    state = {"state_dict.a": torch.zeros(3), "state_dict.b": torch.ones(2, 2, dtype=torch.bfloat16), "step": 3}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    ours, torchs = read_index(tmp_path), dcp.FileSystemReader(tmp_path).read_metadata()
    assert ours.state_dict_metadata == torchs.state_dict_metadata and ours.storage_data == torchs.storage_data


def test_a_models_own_code_is_not_run_unless_asked(nowhere):  # noqa: F811
    folder = nowhere / "model"
    tiny.save(tiny.qwen3(seed=1, layers=1), folder)
    (folder / "mine.py").write_text("open('pwned', 'w').close()\nclass C: pass\n")
    bad.changed("config.json", model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.C"})(
        folder
    )
    with pytest.raises(InputError, match="model.student.path.*custom code"):
        load_config(str(folder), "model.student.path")
    bad.changed("tokenizer_config.json", tokenizer_class="C", auto_map={"AutoTokenizer": ["mine.C", None]})(folder)
    try:
        load_tokenizer(str(folder), "model.student.path")
    except InputError:
        pass
    assert not list((nowhere / "cwd").iterdir())


def test_every_load_of_a_pickle_is_weights_only_and_no_code_is_evaluated():
    """By the text of the sources: a new call has to be looked at. One file runs code, for those who name its tool."""
    fenced = ROOT / "lit_opd" / "turns" / "python_worker.py"
    sources = {path: path.read_text() for folder in ("lit_opd", "callbacks") for path in (ROOT / folder).rglob("*.py")}
    for path, text in sources.items():
        for call in re.findall(r"torch\.load\((.*?)\)", text, flags=re.S):
            assert "weights_only=True" in call, path
        if path == fenced:
            continue
        assert not re.search(r"(?<![\w.])(eval|exec)\(|pickle\.loads?\(|yaml\.(unsafe_)?load\(|shell=True", text), path
        assert "trust_remote_code=True" not in text and "trust_remote_code: bool = True" not in text, path


# -- requests stay with their host -------------------------------------------------------------------------------------


def test_a_redirect_to_another_host_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("THE_KEY", SECRET)
    folder = tiny.save(tiny.qwen3(seed=1, layers=1), tmp_path / "model")
    with fake.serving(folder) as asked, fake.serving(folder) as other:
        asked.always = fake.status(307, Location=f"{other.url}/v1/completions")
        teacher = RemoteTeacher(
            [asked.url], folder, timeout=2.0, retry_seconds=0.0, start_seconds=0.0, api_key_env="THE_KEY"
        )
        with pytest.raises(ServerError, match="307") as caught:
            teacher.servers.model = "tiny"
            teacher.servers.complete([{"prompt": [[1, 2]], "max_tokens": 1}], lambda choices, index: choices)
        assert not other.requests and SECRET not in str(caught.value)


# -- secrets -----------------------------------------------------------------------------------------------------------


def test_secrets_are_found_by_the_name_of_their_variable(monkeypatch):
    names = ["HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD", "AWS_ACCESS_KEY_ID", "api_key"]
    for number, name in enumerate(names):
        monkeypatch.setenv(name, f"{SECRET}{number}")
    for name in ("KEYBOARD_LAYOUT", "TOKENIZERS_PARALLELISM", "MONKEY_HOUSE"):
        monkeypatch.setenv(name, "long enough")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    text = " ".join(f"{SECRET}{number}" for number in range(len(names)))
    assert redacted(text) == " ".join(["***"] * len(names))
    assert with_references(f"a: {SECRET}0") == "a: ${oc.env:HF_TOKEN}\n"
    assert redacted("long enough, true") == "long enough, true"
    assert redacted("http://me:p@ss@host:1/x and s3://key@bucket") == "http://***@host:1/x and s3://***@bucket"
    assert one_line("a\n b\x1b[31m\u202e") == "a b\\x1b[31m\\u202e"


@pytest.mark.parametrize("secret", HARD)
def test_a_secret_is_found_however_it_is_quoted(monkeypatch, secret):
    monkeypatch.setenv("SERVICE_API_KEY", secret)
    outer = f"say 'it' \"so\": {secret}"
    written = [repr(secret), repr(outer), json.dumps(secret), json.dumps([secret], ensure_ascii=False), secret.strip()]
    written += [yaml.safe_dump({"a": [secret]}, allow_unicode=allowed) for allowed in (True, False)]
    written += [yaml.safe_dump({"a": {"b": secret}}, default_style=style) for style in "'\"|"]
    for text in written:
        assert "***" in redacted(text) and not re.search(r"cd|gh|ij|ten|it\S?'s|MIIE|END KEY", redacted(text)), text
    saved = with_references(yaml.safe_dump({"a": {"b": secret, "c": f"Bearer {secret}", "d": 3, "e": None}}))
    assert yaml.safe_load(saved)["a"] == {
        "b": "${oc.env:SERVICE_API_KEY}",
        "c": "Bearer ${oc.env:SERVICE_API_KEY}",
        "d": 3,
        "e": None,
    }


def test_no_secret_is_left_in_a_run_folder_or_on_the_screen(base, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Neither of the environment through ``${oc.env:...}`` nor of an address; W&B's own files and the saved config included."""
    monkeypatch.setenv("SERVICE_API_KEY", SECRET)
    monkeypatch.setattr("sys.argv", ["train.py"])
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "vars: {key: '${oc.env:SERVICE_API_KEY}', url: 'http://me:passw0rd@host/x'}\nwandb: {mode: offline}\n"
    )
    settings = ["--config", str(base / "base.yaml"), "--config", str(overlay), "--trainer.max_steps", "1"]
    main(default_callbacks, ["fit", *settings, "--run_dir", str(tmp_path / "run"), "--trainer.limit_val_batches", "0"])
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    leaking = [
        path
        for path in files
        if {SECRET.encode(), b"passw0rd"} & set(re.findall(rb"sk-\w+|passw0rd", path.read_bytes()))
    ]
    assert any(path.suffix == ".wandb" for path in files) and not leaking
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "${oc.env:SERVICE_API_KEY}" in saved and "http://***@host/x" in saved
    said = "".join(capsys.readouterr())
    assert SECRET not in said and "passw0rd" not in said
    again = OPDCLI(
        args=["preflight", "--config", str(tmp_path / "run" / "config.yaml"), "--run_dir", str(tmp_path / "new")]
    )
    assert again.settings["vars"]["key"] == SECRET


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.bogus", SECRET],
        ["--model.teacher", "RemoteTeacher", "--model.teacher.urls", f"http://me:{SECRET}@host"],
        ["--model.teacher", "RemoteTeacher", "--model.teacher.urls", f"[http://me:{SECRET}@host]"],
        ["--model.teacher", "RemoteTeacher", "--model.teacher.urls", f"[http://me:{SECRET}@host:99999]"],
        ["--model.teacher", "RemoteTeacher", "--model.teacher.urls", f"[http://me:{OWN}/more@host]"],
        ["--model.teacher", "RemoteTeacher", "--model.teacher.urls", f"[http://me/{OWN}@host]"],
        ["--data.train", f"https://me:{SECRET}@host/data"],
        ["--model.student.path", f"./{SECRET}"],
    ],
)
def test_no_secret_is_in_an_error(base, tmp_path, monkeypatch, capsys, arguments):  # noqa: F811
    monkeypatch.setenv("SERVICE_API_KEY", SECRET)
    if arguments[1] == "RemoteTeacher":
        arguments = [*arguments, "--model.teacher.tokenizer_path", str(base / "student")]
    said = spoken(["fit", "--config", str(base / "base.yaml"), "--run_dir", str(tmp_path / "run"), *arguments], capsys)
    assert "error: " in said and SECRET not in said and OWN not in said


# -- the lock and the page ---------------------------------------------------------------------------------------------


def test_an_audit_that_asked_nobody_is_no_clean_audit(capsys):
    """pip-audit itself ends with status 0 and "No known vulnerabilities found" where it could look up nothing."""
    looked_up = {"name": "a", "version": "1", "vulns": []}
    holed = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}
    skipped = {"name": "c", "skip_reason": "not found"}
    assert report([looked_up]) == CLEAN and report([]) == report([looked_up, skipped]) == NOT_AUDITED
    assert report([looked_up, holed]) == report([skipped, holed]) == VULNERABLE
    said = capsys.readouterr().out
    assert "b 2: CVE-1, fixed in 2.1" in said and "NOT AUDITED: 1 could not be looked up" in said


def test_the_page_of_promises_names_tests_that_exist():
    page = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) >= 10
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), (file, name)
