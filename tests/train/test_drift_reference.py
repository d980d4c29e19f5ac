"""The reference for drift of a detector: made of a prepared version, part of the checkpoint, the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from deployments.checkpoints import CheckpointError, resolve
from deployments.detector import Detector, DetectorModel
from deployments.drift_statistic import FILE, Reference
from deployments.images import decode
from deployments.views import render
from tests.train.small import traced
from tests.train.small_models import small_detector
from train.drift_reference import DriftReferenceConfig, make

SMALL = {"window": 16, "step": 4, "dimensions": 4, "splits": 2, "stream": 2000, "between_alarms": 500}


def settings(checkpoint: Path, version: Path, **changes: object) -> DriftReferenceConfig:
    given = {"checkpoint": str(checkpoint), "data": str(version), **SMALL, **changes}
    return DriftReferenceConfig.model_validate(given)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_detector(tmp_path_factory.mktemp("detector") / "model")


def test_it_is_a_part_of_the_checkpoint_and_the_same_every_time(detector: Path, version: Path, tmp_path: Path) -> None:
    before = resolve(str(detector)).revision
    file, reference = make(settings(detector, version))
    assert file == detector / FILE and resolve(str(detector)).revision != before
    elsewhere, _ = make(settings(detector, version, output=tmp_path / "again"))
    assert elsewhere.read_bytes() == file.read_bytes()
    assert reference.facts["data"]["splits"] == ["train", "val"]
    assert sum(reference.facts["kinds"].values()) == reference.facts["pictures"] == len(reference.rows)
    assert "photo" in reference.facts["kinds"]


def test_a_detector_answers_with_what_its_reference_compares(detector: Path, version: Path) -> None:
    _, reference = make(settings(detector, version))
    model = DetectorModel(resolve(str(detector)))
    views = np.stack([render(decode(traced(number, number % 2)).image, model.views) for number in range(3)])
    answers = Detector.answer(object.__new__(Detector), model, views)
    logits, embeddings = model.outputs(views)
    assert embeddings is not None and np.allclose(logits, model.logits(views), atol=1e-5)
    for place, answer in enumerate(answers):
        assert answer["observed"][:-1] == pytest.approx(reference.projection(embeddings)[place], abs=1e-4)
        assert answer["observed"][-1] == pytest.approx(model.margins(logits)[place], abs=1e-4)
        assert 1 / (1 + np.exp(-answer["observed"][-1])) == pytest.approx(answer["ai_probability"], abs=1e-3)
    assert Reference.from_bytes((detector / FILE).read_bytes()).rows.shape[1] == len(answers[0]["observed"]) + 7


def test_without_a_reference_it_answers_all_the_same(tmp_path: Path) -> None:
    model = DetectorModel(resolve(str(small_detector(tmp_path / "plain"))))
    view = render(decode(traced(1, 1)).image, model.views)[None]
    (answer,) = Detector.answer(object.__new__(Detector), model, view)
    assert answer["observed"] is None and 0 <= answer["ai_probability"] <= 1


def test_what_cannot_be_done_is_said(detector: Path, version: Path) -> None:
    with pytest.raises(DataError, match="too few"):
        make(settings(detector, version, window=4096, step=4096))
    with pytest.raises(CheckpointError, match="--output"):
        make(settings(Path("starter:detector"), version))
