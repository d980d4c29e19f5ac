"""The stages of a bulk annotation, called as Ray Data calls them, with models of a few kilobytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.annotate_stages import Batch, CaptionerStage, DetectorStage, ModelName, TaggerStage
from deployments.annotation import Annotation, Provenance, StageError
from deployments.checkpoints import resolve
from deployments.tagger import TaggerSettings
from tests.train.small_models import SIDE_PX, small_captioner, small_detector


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stage thinks that its process is its own: what it sets there is set back."""
    monkeypatch.setattr("os.nice", lambda _: 0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def named(checkpoint: Path) -> ModelName:
    return ModelName(str(checkpoint), resolve(str(checkpoint)).revision)


def shard(*values: int | None) -> Batch:
    """Pictures of one grey each, as the reader leaves them; None: could not be decoded."""
    records = [Annotation(id=str(index), sha256="ab" * 32) for index in range(len(values))]
    for record, value in zip(records, values, strict=True):
        if value is None:
            record.failed("decode", "truncated", "cut off")
    views = np.stack([np.full((1, SIDE_PX, SIDE_PX, 3), value or 0, np.uint8) for value in values])
    provenance = Provenance(c2pa="absent", declared_ai=None).model_dump_json()
    return {
        "shard": np.zeros(len(values), np.int64),
        "record": np.array([record.model_dump_json() for record in records], object),
        "provenance": np.array(["" if value is None else provenance for value in values], object),
        "detector": views,
        "captioner": views,
    }


class Words:
    """A tagger that takes a caption's words for tags."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def tag(self, captions: list[str]) -> list[dict[str, Any]]:
        return [{"tags": caption.split()[:3], "model": "t#1", "prompt": "tags-1"} for caption in captions]


def test_a_picture_the_detector_cannot_answer_is_captioned_and_tagged_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = DetectorStage(named(small_detector(tmp_path / "detector")), 8, 1)
    captioner = CaptionerStage(named(small_captioner(tmp_path / "captioner")), 8, 1)
    monkeypatch.setattr("deployments.offline_tagger.OfflineTagger", Words)
    tagger = TaggerStage(named(tmp_path / "captioner"), TaggerSettings())
    sound = detector._model.outputs

    def overflows(views: np.ndarray) -> Any:
        logits, embeddings = sound(views)
        logits[views[:, 0, 0, 0, 0] == 7, 0] = np.inf
        return logits, embeddings

    detector._model.outputs = overflows
    done = tagger(captioner(detector(shard(100, 7, None, 200))))
    first, spoilt, broken, last = [Annotation.model_validate_json(record) for record in done["record"]]
    for record in (first, last):
        assert record.detection and record.caption and record.tags and not record.errors
    said = "the model failed: the detector's answer is no number"  # as POST /v1/analyze does
    assert spoilt.errors == [StageError(stage="detector", code="failed", detail=said)]
    assert spoilt.detection is None and spoilt.caption and spoilt.tags
    assert set(spoilt.models) == {"captioner", "tagger", "prompt"}
    assert set(spoilt.timings_ms) == {"detector", "captioner", "tagger"}
    assert [error.stage for error in broken.errors] == ["decode"]
    assert broken.caption is None and not broken.models and not broken.timings_ms
