"""What engines are held against, and where their figures go, without timing any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import detector_engines
from benchmarks.processes import ALLOCATOR
from deployments.detector import DetectorModel
from deployments.engines import Logits
from tests.train.small_models import noise, small_detector
from train.export import torch_runner


class Here:
    """Stands in for a process of its own."""

    def __init__(self) -> None:
        self.environments: list[Mapping[str, str]] = []

    def __call__(self, environment: Mapping[str, str]) -> Here:
        self.environments.append(environment)
        return self

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


def test_what_was_measured_elsewhere_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Here()
    row = {"times_bfloat16_eager": 2.0}
    measured = {"model": "one#1", "speed": {"openvino-float32": row}}
    monkeypatch.setattr(detector_engines, "RESULTS", tmp_path)
    monkeypatch.setattr(detector_engines, "process_with", here)
    monkeypatch.setattr(detector_engines, "measure", lambda config: dict(measured))
    file = tmp_path / "detector_engines.json"

    def told() -> dict[str, Any]:
        detector_engines.main(["--photos", str(tmp_path)])
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    assert told()["speed"] == measured["speed"]
    assert here.environments[0].items() >= ALLOCATOR.items()
    assert "parity" not in told(), "of the committed file"
    # the other part's last result is kept beside it, of the same checkpoint
    kept = {"parity": {"openvino-float32": {"max_difference": 0.001}}}
    file.write_text(json.dumps(kept | {"model": "one#1"}))
    assert told()["reaches_the_bar"] == ["openvino-float32"]
    file.write_text(json.dumps(kept | {"model": "another#2"}))
    assert "parity" not in told()


def test_pytorch_computes_a_batch_in_parts_as_a_replica_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_detector(tmp_path / "detector")
    for number in range(4):
        noise(number).save(tmp_path / f"{number}.png")
    parts: list[int] = []

    def watched(model: DetectorModel, *how: Any, **threads: int) -> Logits:
        model.network.register_forward_pre_hook(
            lambda _, __, given: parts.append(len(given["pixel_values"])), with_kwargs=True
        )
        return torch_runner(model, *how, **threads)

    monkeypatch.setattr(detector_engines, "torch_runner", watched)
    monkeypatch.setattr(detector_engines, "candidates", lambda *_: {})
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of this process, which others test in
    settings = {"checkpoint": str(tmp_path / "detector"), "photos": tmp_path, "parts": "speed", "rounds": 1}
    found = detector_engines.measure(
        detector_engines.EnginesConfig.model_validate(settings | {"batch_size": 4, "batches": 1, "threads": 2})
    )
    assert set(parts) == {2}
    assert {"pytorch-float32", "pytorch-bfloat16"} < set(found["speed"]) and found["speed"]["threads"] == 2
