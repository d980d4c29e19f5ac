"""Checkpoints from a model hub: what is fetched, with which token, and that an offline process can have it fetched."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from deployments.checkpoints import CheckpointError, resolve
from deployments.tagger import TaggerSettings, engine_environment

COMMIT = "3ad372fc79158a2148299e3318516c786aeded6c"
URI = f"mistralai/tiny@{COMMIT}"
FILES = {
    "config.json": b"{}",
    "model.safetensors": save({"weight": torch.ones(2)}),
    "pytorch_model.bin": b"\x80",
    "modeling_tiny.py": b"raise SystemExit('code of a checkpoint')",
}


class Hub(ThreadingHTTPServer):
    """As much of a model hub as one commit of one repository needs; where `token` is set, files are for who has it."""

    def __init__(self) -> None:
        self.token: str | None = None
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Answers)


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path.rsplit("/", 1)[1])
        status, headers, body = 404, {"X-Error-Code": "EntryNotFound"}, b""
        if path == f"/api/models/mistralai/tiny/tree/{COMMIT}":
            rows = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in FILES.items()
            ]
            status, headers, body = 200, {"Content-Type": "application/json"}, json.dumps(rows).encode()
        elif path.startswith(f"/mistralai/tiny/resolve/{COMMIT}/"):
            name = path.rsplit("/", 1)[1]
            if self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
                status, headers = 401, {"X-Error-Code": "GatedRepo"}
            else:
                status, body = 200, FILES[name]
                headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, for a process with the environment of a tagger's replica."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in engine_environment(TaggerSettings(device="gpu")).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DEEPTRUST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_process_whose_hub_client_is_offline_gets_what_it_names(hub: Hub, tmp_path: Path) -> None:
    code = (
        "import sys, huggingface_hub; from deployments.checkpoints import resolve;"
        "print(huggingface_hub.is_offline_mode(), resolve(sys.argv[1]).folder)"
    )
    ran = subprocess.run([sys.executable, "-c", code, URI], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    offline, folder = ran.stdout.split()
    assert offline == "True", "the engine's own client asks nobody"
    assert Path(folder).is_relative_to(tmp_path / "cache" / "hub") and Path(folder).name == COMMIT


def test_weights_are_fetched_once_and_neither_pickles_nor_code_ever(hub: Hub) -> None:
    checkpoint = resolve(URI)
    fetched = {"config.json", "model.safetensors"}
    assert {file.name for file in checkpoint.folder.iterdir()} == fetched
    assert set(hub.asked) & {*FILES, COMMIT} == {*fetched, COMMIT}
    hub.asked.clear()
    assert resolve(URI) == checkpoint
    assert not hub.asked, "what is whole is asked of nobody"


def test_a_licence_that_nobody_accepted_is_told(hub: Hub) -> None:
    hub.token = "hf_of_another_site"
    with pytest.raises(CheckpointError, match=rf"{URI}.*GatedRepoError"):
        resolve(URI)


@pytest.mark.parametrize("place", ["environment", "file"])
def test_the_token_of_who_accepted_it_is_shown(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    hub.token = "hf_of_this_site"
    (tmp_path / "token").write_text(hub.token)
    if place == "environment":
        monkeypatch.setenv("HF_TOKEN", hub.token)
    else:
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    assert resolve(URI).folder.name == COMMIT
