"""Checkpoints: what a URI may name, and what is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deployments.checkpoints import CheckpointError, open_checkpoint, publish, resolve, scratch_folder


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


@pytest.mark.parametrize("uri", ["nothing", "starter:painter", "/no/such/folder", "ftp://host/x", ""])
def test_an_unknown_uri_says_what_would_be_one(uri: str) -> None:
    with pytest.raises(CheckpointError):
        resolve(uri)


def test_a_folder_is_published_whole_and_the_first_one_stays(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model"
    for content in ("first", "second"):
        build = scratch_folder(target)
        (build / "file").write_text(content)
        publish(build, target)
    assert (target / "file").read_text() == "first"
    assert [path.name for path in target.parent.iterdir()] == ["model"]
