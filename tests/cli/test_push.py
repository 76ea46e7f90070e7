"""``push`` through the hub's own client, to a server on this machine that speaks the hub's four requests."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_opd.cli.command import main
from tests.helpers import tiny

TOKEN = "hf_aVerySecretTokenOfSomebody"


class Hub(BaseHTTPRequestHandler):
    """Keeps what was asked and the files of the commit."""

    asked: list[tuple[str, Any]] = []
    files: dict[str, bytes] = {}
    refuses = False

    def do_POST(self) -> None:
        """Make a repository, say how files are to be sent, take them."""
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        assert self.headers["Authorization"] == f"Bearer {TOKEN}"
        path = self.path.split("?")[0]
        if Hub.refuses:
            self._answer(403, {"error": f"the token {TOKEN} may not write here"})
        elif path == "/api/repos/create":
            Hub.asked.append((path, json.loads(content)))
            self._answer(200, {"url": f"http://{self.headers['Host']}/ann/small"})
        elif path.endswith("/preupload/main"):
            files = json.loads(content)["files"]
            self._answer(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif path.endswith("/commit/main"):
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    Hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(200, {"commitUrl": f"http://{self.headers['Host']}/ann/small/commit/abc", "commitOid": "abc"})
        else:
            self._answer(200, {})

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The client reads its settings when it is imported, so its constants are set."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "files", {})
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with an exported student."""
    folder = tmp_path / "run"
    path = tiny.save(tiny.qwen3(seed=1), folder / "student")
    config = {"model": {"student": {"path": path}, "weighting": None}, "data": {"train": "train.jsonl"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_a_runs_student_and_its_card_arrive(run, hub, capsys):
    main(args=["push", str(run), "--repo", "ann/small", "--private"])
    said = capsys.readouterr()
    assert hub.asked[0][1]["name"] == "small" and hub.asked[0][1]["organization"] == "ann"
    assert hub.asked[0][1].get("private") is True or hub.asked[0][1].get("visibility") == "private"
    sent = {path.name: path.read_bytes() for path in (run / "student").iterdir()}
    assert hub.files == sent and "# run" in sent["README.md"].decode()
    assert "/ann/small" in said.out and TOKEN not in said.out + said.err


def test_a_card_of_ones_own_is_kept(run, hub):
    (run / "student" / "README.md").write_text("mine")
    main(args=["push", str(run / "student"), "--repo", "ann/small"])
    assert hub.files["README.md"] == b"mine" and not hub.asked[0][1].get("private")


def test_a_refusal_is_one_line_without_the_token(run, hub, monkeypatch, capsys):
    monkeypatch.setattr(Hub, "refuses", True)
    error_of(["push", str(run), "--repo", "ann/small"], "--repo", capsys)


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_that_is_not_there_is_one_line(run, hub, monkeypatch, capsys, offline):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    error_of(["push", str(run), "--repo", "ann/small"], "--repo", capsys)


def error_of(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(args=words)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert named in said and TOKEN not in said
    return said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--repo", "small"], "--repo"),
        (["--repo", "ann/small/3"], "--repo"),
        (["--repo", "ann/small", "--checkpoint", "best"], "--ckpt_path"),
        (["--repo", "ann/small", "--checkpoint", "nothing.ckpt"], "--ckpt_path"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_sent(run, hub, words, named, capsys):
    error_of(["push", str(run), *words], named, capsys)
    assert hub.asked == [] and sorted(path.name for path in run.iterdir()) == ["config.yaml", "student"]


def test_a_folder_that_holds_no_model_and_options_of_a_run_are_refused(run, hub, tmp_path, capsys):
    error_of(["push", str(tmp_path / "none"), "--repo", "a/b"], "push", capsys)
    error_of(["push", str(tmp_path), "--repo", "a/b"], "config.json", capsys)
    error_of(["push", str(run / "student"), "--repo", "a/b", "--checkpoint", "best"], "--checkpoint", capsys)


def test_a_dry_run_shows_files_and_card_and_sends_nothing(run, hub, capsys):
    main(args=["push", str(run), "--repo", "ann/small", "--dry_run"])
    said = capsys.readouterr().out
    assert "model.safetensors" in said and "# run" in said and hub.asked == [] and hub.files == {}
