"""The starter head's recipe, on real towers and small data: what is written is what was learnt, and calibrated on
validation alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from deployments.detector_model import ClipBlocksConfig, model_on_clip
from deployments.towers import CLIP_MEAN, CLIP_STD
from deployments.views import ViewSpec, render
from train.aivshuman import LabelledPicture, open_rgb, read_pictures
from train.blocks_head import (
    DetectorConfig,
    balance_weights,
    fit_head,
    head_scores,
    tower_features,
    train_head,
)
from train.calibration import calibrate, choose_thresholds, sigmoid
from train.damage import TIERS


def settings(folder: Path, **changes: object) -> DetectorConfig:
    """A run on two shallow blocks: real, and over in seconds."""
    values: dict[str, object] = {
        "data": folder,
        "output": folder / "out",
        "cache": folder / "cache",
        "view": ViewSpec(views=("centre",)),
        "blocks": [1, 2],
        "pools": ["cls", "mean"],
        "variants": 1,
        "epochs": 20,
    }
    return DetectorConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def pictures_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures: smooth blobs are human; those with a checkerboard on top, as transposed convolutions leave it,
    are AI."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    board = (np.indices((160, 200)).sum(0) // 4 % 2)[..., None] * 90.0
    rows = []
    for number in range(40):
        label = number % 2
        small = Image.fromarray(random.integers(0, 256, (8, 10, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((200, 160), Image.Resampling.BICUBIC)) * 0.6 + label * board
        name = f"{number:02d}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name, quality=95)
        rows.append((name, label))
    (folder / "broken.jpg").write_bytes((folder / "00.jpg").read_bytes()[:500])
    Image.new("RGB", (20, 20)).save(folder / "tiny.jpg")
    (folder / "copy.jpg").write_bytes((folder / "02.jpg").read_bytes())
    (folder / "liar.jpg").write_bytes((folder / "04.jpg").read_bytes())
    rows += [("broken.jpg", 0), ("missing.jpg", 1), ("tiny.jpg", 0), ("copy.jpg", 0), ("liar.jpg", 1)]
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "label"), *rows])
    return folder


def test_unusable_rows_are_left_out_with_their_reason(pictures_folder: Path) -> None:
    pictures, rejects = read_pictures(pictures_folder)
    reasons = {reject.file_name: reject.reason for reject in rejects}
    assert reasons["tiny.jpg"] == "too small: 20x20"
    assert reasons["copy.jpg"] == "repeated bytes"
    assert reasons["broken.jpg"].startswith("unreadable") and reasons["missing.jpg"].startswith("unreadable")
    assert "contradictory labels" in reasons.values()
    assert len(pictures) == 39
    assert {picture.split for picture in pictures} == {"train", "val", "test"}


def test_training_tells_a_plain_trace_apart_and_writes_a_loadable_head(pictures_folder: Path) -> None:
    config = settings(pictures_folder)
    metrics = train_head(config)
    assert metrics["val_real_called_ai"] <= config.real_error
    card = json.loads((config.output / "card.json").read_text())
    assert card["thresholds"]["human_below"] <= card["thresholds"]["ai_above"]
    assert card["preprocessing"]["views"] == ["centre"]

    pictures, _ = read_pictures(pictures_folder)
    test = [picture for picture in pictures if picture.split == "test"]
    state = load_file(config.output / "head.safetensors")
    features = tower_features(config, test, list(TIERS))
    scores = head_scores(config, state, features)
    labels = np.array([picture.label for picture in test])
    assert scores[labels == 1, 0].min() > scores[labels == 0, 0].max()

    # the served model on the served views gives the same log-odds as cached features through the head
    model_config = ClipBlocksConfig.from_dict(json.loads((config.output / "config.json").read_text()))
    model = model_on_clip(model_config, state)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    views = torch.from_numpy(render(open_rgb(test[0].path), config.view)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        logits = model(((views / 255 - mean) / std)[None]).logits[0]
    assert float(logits[1] - logits[0]) == pytest.approx(scores[0, 0], abs=0.05)


def test_the_same_input_gives_the_same_head(tmp_path: Path) -> None:
    config = settings(tmp_path, epochs=3)
    random = np.random.default_rng(0)
    features = random.normal(size=(60, 2 * 2 * 768)).astype(np.float32)
    labels = (features[:, 0] > 0).astype(int)
    first, second = (fit_head(config, features, labels, np.ones(60)) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def labelled(label: int, source: str, generator: str) -> LabelledPicture:
    return LabelledPicture("id", Path("x"), label, source, generator, 0, "train")


def test_weights_balance_classes_and_temper_large_strata() -> None:
    pictures = [labelled(0, "a", "photo")] * 16 + [labelled(1, "b", "one")] * 100 + [labelled(1, "b", "two")] * 4
    labels = np.array([picture.label for picture in pictures])
    for power, ratio in ((1.0, 25.0), (0.5, 5.0), (0.0, 1.0)):
        weights = balance_weights(pictures, power)
        assert weights.mean() == pytest.approx(1)
        assert weights[labels == 0].sum() == pytest.approx(weights[labels == 1].sum())
        assert weights[16:116].sum() / weights[116:].sum() == pytest.approx(ratio)


def test_relatives_of_a_generator_are_one_family() -> None:
    assert labelled(1, "a", "stable-diffusion-1.4").family == labelled(1, "b", "Stable Diffusion 1.x (2022)").family


def test_calibration_undoes_a_known_scale_and_shift() -> None:
    random = np.random.default_rng(0)
    true = random.normal(0, 2, 20000)
    labels = (random.random(20000) < sigmoid(true)).astype(int)
    temperature, bias = calibrate(true * 3 - 1.5, labels, np.ones(20000))
    assert temperature == pytest.approx(3, rel=0.05)
    assert bias == pytest.approx(1.5, abs=0.15)


def test_thresholds_keep_their_promises_and_their_order() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], 500)
    for shift in (0.0, 1.0, 6.0):
        chances = sigmoid(random.normal(0, 1, 1000) + shift * labels)
        borders = choose_thresholds(chances, labels, 0.02, 0.10)
        assert (chances[labels == 0] >= borders["ai_above"]).mean() <= 0.02
        assert (chances[labels == 1] < borders["human_below"]).mean() <= 0.10
        assert borders["human_below"] <= borders["ai_above"]


def test_sigmoid_does_not_overflow() -> None:
    np.testing.assert_allclose(sigmoid(np.array([-1000.0, 0.0, 1000.0])), [0, 0.5, 1])
