"""What is wrong with servers, keys, certificates, ports and teacher names is one clear error before training."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from callbacks import default_callbacks
from lit_opd.cli.command import main
from lit_opd.distributed import check_master_port
from lit_opd.errors import InputError, ServerError
from lit_opd.rollout import VLLMEngine, VLLMSampler
from lit_opd.teacher import RemoteTeacher
from tests.helpers import fake_vllm as fake
from tests.helpers import tiny

ROOT = Path(__file__).resolve().parents[2]
START = {"timeout": 2.0, "start_seconds": 1.0}
SECRET = "sk-not-for-logs"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def server(folders):
    with fake.serving(folders[1]) as running:
        yield running


def asked(url: str, **changes) -> None:
    VLLMSampler([url], **(START | {"max_new_tokens": 8} | changes)).check(tokens=20, vocabulary=64)


# -- who answers at the address ----------------------------------------------------------------------------------------


def test_a_missing_server_is_waited_for_briefly_and_said_once(capsys):
    start = time.monotonic()
    with pytest.raises(ServerError, match="127.0.0.1:9 could not be reached.*is a vLLM server running.*start_seconds"):
        asked("http://127.0.0.1:9")
    assert time.monotonic() - start < 10  # retry_seconds is 300
    assert capsys.readouterr().err.count("asking again for up to 1 s") == 1


def test_a_server_that_comes_up_late_is_found(folders, capsys):
    with fake.serving(folders[1]) as running:
        port = running.server_address[1]
    late: list = []

    def start() -> None:
        time.sleep(1.0)
        late.append(fake.FakeServer(folders[1], model="tiny", window=64, port=port))
        threading.Thread(target=late[0].serve_forever, daemon=True).start()

    threading.Thread(target=start, daemon=True).start()
    asked(f"http://127.0.0.1:{port}", start_seconds=60.0)
    assert "asking again" in capsys.readouterr().err
    late[0].shutdown()
    late[0].server_close()


class _Page(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"<html>a wiki</html>")

    def log_message(self, *args) -> None:
        """Quiet."""


class _Missing(_Page):
    status = 404


@contextmanager
def another_program(kind: str):
    """Something that listens and is no vLLM."""
    if kind in ("page", "missing page"):
        running = ThreadingHTTPServer(("127.0.0.1", 0), _Page if kind == "page" else _Missing)
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield running.server_address[1]
        running.shutdown()
        running.server_close()
        return
    with socket.create_server(("127.0.0.1", 0)) as listening:
        if kind == "other protocol":

            def greet() -> None:
                while True:
                    try:
                        listening.accept()[0].sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                    except OSError:
                        return

            threading.Thread(target=greet, daemon=True).start()
        yield listening.getsockname()[1]


@pytest.mark.parametrize("kind", ["page", "missing page", "other protocol", "silent"])
def test_another_program_at_the_address_is_one_clear_error(kind):
    with another_program(kind) as port:
        start = time.monotonic()
        with pytest.raises(ServerError, match=f"model.sampler.urls.*127.0.0.1:{port} .*is a vLLM server running"):
            asked(f"http://127.0.0.1:{port}", timeout=600.0)
        assert time.monotonic() - start < 15


# -- what it can do ----------------------------------------------------------------------------------------------------


LACKS = {
    "token ids": (lambda a: a["choices"][0].pop("token_ids"), "no token_ids"),
    "log-probs": (lambda a: a["choices"][0].update(logprobs=None), "no log-probs of sampled"),
    "more than was asked for": (lambda a: a["choices"][0]["token_ids"].append(5), "2 tokens and 1 log-probs"),
}


@pytest.mark.parametrize("name", sorted(LACKS))
def test_a_server_whose_answers_lack_something_is_refused_before_the_run(server, name):
    change, message = LACKS[name]
    server.always = fake.changed(change)
    with pytest.raises(ServerError, match=message):
        asked(server.url)


def test_a_teacher_server_without_prompt_logprobs_is_refused_before_the_run(folders, server):
    server.always = fake.changed(lambda a: a["choices"][0].pop("prompt_logprobs"))
    with pytest.raises(ServerError, match="model.teacher.urls.*has no prompt_logprobs"):
        RemoteTeacher([server.url], folders[1], **START).check(temperature=1.0, tokens=None)


def test_a_server_with_a_smaller_vocabulary_is_refused_before_the_run(tmp_path, folders, server):
    bigger = tiny.save(tiny.qwen3(seed=3, rows=70), tmp_path / "bigger")
    with pytest.raises(ServerError, match="400.*out of vocabulary"):
        VLLMSampler([server.url], **START).check(tokens=None, vocabulary=70)
    with pytest.raises(ServerError, match="400.*out of vocabulary"):
        RemoteTeacher([server.url], bigger, **START).check(temperature=1.0, tokens=None)


# -- keys and certificates ---------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_shown_nowhere(server, monkeypatch):
    server.key = SECRET
    with pytest.raises(ServerError, match="401"):
        asked(server.url)
    monkeypatch.delenv("THE_KEY", raising=False)
    with pytest.raises(InputError, match="api_key_env.*'THE_KEY', which is not set"):
        asked(server.url, api_key_env="THE_KEY")
    monkeypatch.setenv("THE_KEY", SECRET)
    asked(server.url, api_key_env="THE_KEY")
    server.key = "another"
    with pytest.raises(ServerError, match=r"401.*Bearer \*\*\*") as caught:
        asked(server.url, api_key_env="THE_KEY")
    assert SECRET not in str(caught.value)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_certificates_are_checked(tmp_path, server, monkeypatch):
    plain = server.url
    with pytest.raises(ServerError, match="write http://"):
        asked(plain.replace("http:", "https:"))
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += [
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        str(tmp_path / "key"),
        "-out",
        str(tmp_path / "cert"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    server.encrypt(tmp_path / "cert", tmp_path / "key")
    with pytest.raises(ServerError, match=r"not trusted \(self.signed certificate.*SSL_CERT_FILE"):
        asked(server.url)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
    asked(server.url)


# -- ports and names, through the command line -------------------------------------------------------------------------


@pytest.fixture
def config(folders, tmp_path) -> dict:
    rows = [{"prompt": f"{i} + {i} =", "teacher": "ab"[i % 2]} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teachers = {
        name: {"class_path": "lit_opd.teacher.LocalTeacher", "init_args": {"path": folders[1]}} for name in "ab"
    }
    return {
        "wandb": {"mode": "disabled"},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 1},
        "model": {
            "student": {"path": folders[0]},
            "teacher": {"class_path": "lit_opd.teacher.RoutedTeacher", "init_args": {"teachers": teachers}},
            "sampler": {"init_args": {"max_new_tokens": 4}},
        },
        "data": {
            "train": str(tmp_path / "train.jsonl"),
            "prompt_batch": 4,
            "max_prompt_tokens": 24,
            "teacher_column": "teacher",
        },
    }


def refused(config: dict, folder: Path, capsys, *words: str) -> str:
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as caught:
        main(
            default_callbacks,
            ["fit", "--config", str(folder / "config.yaml"), "--run_dir", str(folder / "run"), *words],
        )
    assert caught.value.code == 2 and not (folder / "run").exists()
    return capsys.readouterr().err


def test_a_teacher_name_that_no_teacher_has_is_found_before_the_run(config, tmp_path, capsys):
    data = Path(config["data"]["train"])
    good = data.read_text()
    data.write_text(good + '{"prompt": "1 + 1 =", "teacher": "c"}\n')
    assert "['a', 'b'], got 'c' in train row 'train-8'" in refused(config, tmp_path, capsys)
    data.write_text(good)
    validation = tmp_path / "val.jsonl"
    validation.write_text('{"prompt": "1 + 1 =", "teacher": "d"}\n')
    config["data"]["val"] = str(validation)
    assert "got 'd' in val row 'val-0'" in refused(config, tmp_path, capsys)
    del config["data"]["teacher_column"], config["data"]["val"]
    assert "got None in train row 'train-0'" in refused(config, tmp_path, capsys)


def test_a_port_in_use_is_found_before_the_ranks_start(config, tmp_path, capsys, monkeypatch):
    with socket.create_server(("", 0)) as listening:
        monkeypatch.setenv("MASTER_PORT", str(listening.getsockname()[1]))
        words = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
        message = refused(config, tmp_path, capsys, *words)
        assert (
            f"`MASTER_PORT` must be a free port for the ranks to meet at, got {listening.getsockname()[1]}" in message
        )
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "torchrun listens there itself")
        check_master_port()


# -- other ways to sample ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_an_engine_without_its_package_is_refused_before_the_run(config, tmp_path, capsys):
    config["model"]["sampler"] = {"class_path": "lit_opd.rollout.VLLMEngine", "init_args": {"max_new_tokens": 4}}
    assert "VLLMEngine without vllm; install the extra vllm" in refused(config, tmp_path, capsys)


def test_settings_of_the_engine_outside_their_range_are_refused():
    for name, value in {"memory_fraction": 1.0, "max_logprob_gap": 0.0}.items():
        with pytest.raises(InputError, match=f"`VLLMEngine.{name}` must be"):
            VLLMEngine(**{name: value})


@pytest.mark.slow
def test_the_overlay_for_the_quickstart_trains_from_a_server(tmp_path, monkeypatch):
    """``configs/sampling/vllm.yaml`` over the quickstart, with another address and fewer rows."""
    monkeypatch.chdir(ROOT)
    student = "lit_opd/testbed/assets/student"
    overlay = "configs/sampling/vllm.yaml"
    assert (ROOT / overlay).read_text().splitlines()[0].endswith(f"--config configs/quickstart.yaml --config {overlay}")
    words = ["fit", "--config", "configs/quickstart.yaml", "--config", overlay, "--run_dir", str(tmp_path / "run")]
    words += ["--trainer.max_steps", "2", "--data.prompt_batch", "4", "--data.val", "null", "--wandb.mode", "disabled"]
    words += ["--model.sampler.max_new_tokens", "6"]
    with fake.serving(student, model="student", window=256) as server:
        words += ["--model.sampler.urls", f'["{server.url}"]', "--model.sampler.sync.folder", str(tmp_path / "pushed")]
        main(default_callbacks, words)
        assert server.reloads == 2  # before each batch
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
