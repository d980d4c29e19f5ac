"""Checkpoints: what a URI may name, and what is refused with a reason."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch
from safetensors.torch import save_file

from deployments.checkpoints import CheckpointError, open_checkpoint, publish, resolve, scratch_folder
from tests.data.made import s3_server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    (folder / "card.json").write_text(json.dumps({"task": "detection", "labels": ["human", "ai"], "temperature": 1.5}))
    return folder


def test_a_folder_is_a_uri_and_its_card_is_read(folder: Path) -> None:
    checkpoint = resolve(str(folder))
    assert checkpoint.card.temperature == 1.5
    assert checkpoint.name == f"{folder}#{checkpoint.revision}"
    assert len(checkpoint.revision) == 12


def test_the_revision_follows_the_bytes_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    before = resolve(str(folder)).revision
    (folder / ".hidden").write_text("bookkeeping")
    assert resolve(str(folder)).revision == before
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    assert resolve(str(folder)).revision != before


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"\x80"), "pickled"),
        (lambda folder: (folder / "card.json").write_text('{"temperature": 0}'), "card"),
        (lambda folder: (folder / "card.json").write_text("{"), "card"),
    ],
)
def test_what_is_no_safe_checkpoint_is_refused_by_name(folder: Path, break_it, complaint: str) -> None:
    break_it(folder)
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(folder, "x")


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        *((uri, "Expected a folder that exists, starter:NAME") for uri in ("nothing", "/no/such/folder", "ftp://x/y")),
        ("", "no such checkpoint: ''. Expected"),
        ("starter:painter", "there are .*detector"),
    ],
)
def test_an_unknown_uri_says_what_would_be_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, uri: str, complaint: str
) -> None:
    monkeypatch.chdir(folder)  # which nobody has named
    with pytest.raises(CheckpointError, match=complaint):
        resolve(uri)


def test_a_checkpoint_on_s3_is_fetched_once_and_anew_when_it_has_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPTRUST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(s3fs.S3FileSystem, "_cache", {})  # those of other tests go to other servers
    uri, weights = "s3://bucket/models/detector", folder / "model.safetensors"
    with s3_server(tmp_path / "s3" / "root") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        shutil.copytree(folder, server.folder / "bucket" / "models" / "detector")
        first = resolve(uri)
        assert (first.uri, first.revision) == (uri, resolve(str(folder)).revision)
        assert first.card.temperature == 1.5
        with monkeypatch.context() as patch:
            patch.setattr(s3fs.S3FileSystem, "get_file", lambda *_: pytest.fail("it is fetched again"))
            assert resolve(uri).folder == first.folder
        save_file({"weight": torch.zeros(2)}, weights)
        s3fs.S3FileSystem().put_file(str(weights), f"bucket/models/detector/{weights.name}")
        assert resolve(uri).revision == resolve(str(folder)).revision != first.revision
        for wrong, complaint in (("bucket/models", "holds no files"), ("bucket/x", "cannot fetch"), ("x/y", "bucket")):
            with pytest.raises(CheckpointError, match=complaint):
                resolve(f"s3://{wrong}")


def test_a_folder_is_published_whole_and_the_first_one_stays(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model"
    for content in ("first", "second"):
        build = scratch_folder(target)
        (build / "file").write_text(content)
        publish(build, target)
    assert (target / "file").read_text() == "first"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


class Registry(ThreadingHTTPServer):
    """As much of an MLflow server as an alias and a version need; `answer` is what it says."""

    def __init__(self, folder: Path) -> None:
        version = {"name": "detector", "version": "3", "source": str(folder)}
        self.answer: tuple[int, dict[str, Any]] = 200, {"model_version": version}
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Answers)


class Answers(BaseHTTPRequestHandler):
    server: Registry

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        status, content = self.server.answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def registry(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """The registry that `models:/` means; what is fetched goes into a cache of the test's own."""
    monkeypatch.setenv("DEEPTRUST_CACHE", str(tmp_path / "cache"))
    for pause in ("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER"):
        monkeypatch.setenv(pause, "0")
    for patience in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(patience, raising=False)
    with Registry(folder) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("uri", ["models:/detector@production", "models:/detector/3"])
def test_what_the_registry_said_last_holds_while_it_does_not_answer(
    registry: Registry, caplog: pytest.LogCaptureFixture, uri: str
) -> None:
    revision = resolve(uri).revision
    registry.answer = 503, {}
    registry.asked.clear()
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)  # it does not propagate once Serve has set it up
    assert resolve(uri).revision == revision
    assert "does not answer" in caplog.text and f"{uri} is detector/3" in caplog.text
    assert len(registry.asked) == 4, "MLflow's own patience is for whoever knows nothing"
    registry.shutdown()
    registry.server_close()
    assert resolve(uri).revision == revision, "nothing listens"
    logger.removeHandler(caplog.handler)


def test_what_the_registry_answers_counts_and_not_what_it_said_before(registry: Registry, folder: Path) -> None:
    uri = "models:/detector@production"
    resolve(uri)
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    _, content = registry.answer
    registry.answer = 200, {"model_version": content["model_version"] | {"version": "4"}}
    moved = resolve(uri).revision
    registry.answer = 503, {}
    assert resolve(uri).revision == moved
    registry.answer = 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such alias"}
    with pytest.raises(CheckpointError, match="no such alias"):
        resolve(uri)


def test_a_registry_that_never_answered_is_an_error(registry: Registry) -> None:
    registry.answer = 503, {}
    with pytest.raises(CheckpointError, match="models:/detector@production"):
        resolve("models:/detector@production")
