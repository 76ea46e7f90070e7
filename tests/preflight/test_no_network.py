"""Without a network the hub is asked once, and every command ends at once with one line."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from callbacks import default_callbacks
from lit_opd import hub
from lit_opd.cli.command import main
from lit_opd.errors import InputError
from lit_opd.models.loading import load_config, load_tokenizer
from lit_opd.prompts import PromptDataModule, read_prompts
from lit_opd.prompts.sources import DataSource
from lit_opd.testbed import ASSETS

MODEL = "some-organisation/some-model"
SOON = 60.0  # seconds, far below what the client's own retries take


class Rude:
    """A server that hangs up on everybody, and counts them."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.calls = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:  # closed
                return
            self.calls += 1
            connection.close()


@pytest.fixture
def rude(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[Rude]:
    """The hub is this server, the cache is empty, and nobody has said that there is no network."""
    from huggingface_hub import constants

    server = Rude()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    hub.silence.cache_clear()
    yield server
    server.socket.close()
    hub.silence.cache_clear()


def fit(*words: str) -> list[str]:
    """A command line of the quickstart with a student on the hub."""
    return [*words, "--config", "configs/quickstart.yaml", "--model.student.path", MODEL, "--wandb.mode", "disabled"]


def test_loading_asks_once_and_says_what_to_set(rude):
    start = time.monotonic()
    for load in (load_config, load_tokenizer, load_config):
        with pytest.raises(InputError) as error:
            load(MODEL, "model.student.path")
        said = str(error.value)
        assert said.startswith(
            f"`model.student.path` could not be loaded from {MODEL!r}: the hub {rude.address} does not"
        )
        assert "HF_HUB_OFFLINE=1" in said and said.endswith("local folder") and "\n" not in said
    assert rude.calls == 1 and time.monotonic() - start < SOON
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # what ranks and workers inherit


def test_a_data_set_of_the_hub_asks_once_too(rude):
    pytest.importorskip("datasets")
    for _ in range(2):
        with pytest.raises(InputError, match=r"the hub http://127.0.0.1:\d+ does not answer .*HF_HUB_OFFLINE=1"):
            read_prompts(DataSource("some-organisation/some-data"))
    assert rude.calls == 1


def test_a_tokenizer_of_the_data_module_asks_once_too(rude):
    data = PromptDataModule(train=str(ASSETS / "train.jsonl"), tokenizer=MODEL)
    for _ in range(2):
        with pytest.raises(InputError, match=r"^`PromptDataModule.tokenizer` .* does not answer .*HF_HUB_OFFLINE=1"):
            data.setup("fit")
    assert rude.calls == 1


def test_preflight_asks_once_and_tells_the_error_once(rude, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(default_callbacks, fit("preflight", "--run_dir", str(tmp_path / "run")))
    said = capsys.readouterr().out
    assert ended.value.code == 2 and rude.calls == 1
    assert said.count("does not answer") == 1 and said.count("first the error of tokenizers") >= 3
    assert " 1 error" in said


def test_fit_ends_at_once_with_one_line_and_leaves_no_folder(rude, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(default_callbacks, fit("fit", "--run_dir", str(tmp_path / "run")))
    errors = [line for line in capsys.readouterr().err.splitlines() if "does not answer" in line]
    assert ended.value.code == 2 and len(errors) == 1 and rude.calls == 1
    assert not (tmp_path / "run").exists()


def test_a_local_folder_asks_nobody(rude):
    load_config(str(ASSETS / "student"), "model.student.path")
    load_tokenizer(str(ASSETS / "student"), "model.student.path")
    assert rude.calls == 0


def test_who_has_said_that_there_is_no_network_is_not_asked_for_one(rude, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="unset HF_HUB_OFFLINE, fill the cache, or give a local folder$"):
        load_config(MODEL, "model.student.path")
    assert rude.calls == 0


def test_a_hub_that_answers_is_not_called_silent(rude, monkeypatch):
    """Of any status: 404 is an answer."""

    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        connection.close()

    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=lambda: answer(server.accept()[0]), daemon=True).start()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    assert hub.silence() == ""
    server.close()
