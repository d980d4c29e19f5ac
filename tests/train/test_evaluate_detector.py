"""The evaluation's own arithmetic: figures that agree with references, and pictures chosen as its docstring says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from train.aivshuman import LabelledPicture
from train.damage import TIERS
from train.evaluate_detector import (
    EvaluationConfig,
    answers,
    auc,
    baseline_pictures,
    examined_pictures,
    expected_calibration_error,
    file_traits,
    interval,
    unseen_figures,
    verdict_figures,
)


def settings(**changes: int) -> EvaluationConfig:
    values: dict[str, object] = {"data": Path("d"), "head": Path("h"), "result": Path("r.json"), "resamples": 200}
    return EvaluationConfig.model_validate(values | changes)


def picture(number: int, label: int, generator: str, split: str) -> LabelledPicture:
    return LabelledPicture(f"{number:04d}", Path("x"), label, "source", generator, number, split)


def test_auc_agrees_with_scikit_learn_ties_included() -> None:
    random = np.random.default_rng(0)
    ai, real = random.integers(0, 8, 50).astype(float), random.integers(0, 6, 70).astype(float)
    labels = np.r_[np.ones(50), np.zeros(70)]
    assert auc(ai, real) == pytest.approx(roc_auc_score(labels, np.r_[ai, real]))


def test_calibration_error_is_zero_when_calibrated_and_large_when_not() -> None:
    random = np.random.default_rng(0)
    chances = random.random(20000)
    labels = (random.random(20000) < chances).astype(int)
    assert expected_calibration_error(chances, labels) < 0.02
    assert expected_calibration_error(np.full(100, 0.95), np.repeat([0, 1], 50)) == pytest.approx(0.45)


def test_intervals_hold_the_value_and_narrow_with_more_pictures() -> None:
    random = np.random.default_rng(0)
    widths = []
    for count in (30, 3000):
        found = interval(lambda values: float(values.mean()), [random.normal(size=count)], 300, 0)
        assert found["low"] <= found["value"] <= found["high"]
        widths.append(found["high"] - found["low"])
    assert widths[1] < widths[0] / 5


def test_three_answers_share_out_everything() -> None:
    shares = answers(np.array([0.1, 0.3, 0.5, 0.7, 0.9]), 0.3, 0.7)
    assert shares == {"human": 0.2, "uncertain": 0.4, "ai": 0.4}


def test_verdicts_use_the_given_threshold_and_no_other() -> None:
    chances, labels = np.array([0.1, 0.2, 0.6, 0.4, 0.7, 0.9]), np.array([0, 0, 0, 1, 1, 1])
    figures = verdict_figures(chances, labels, {"human_below": 0.3, "ai_above": 0.65}, 50, 0)
    assert figures["real_accuracy"]["value"] == 1.0
    assert figures["ai_recall"]["value"] == pytest.approx(2 / 3, abs=1e-3)
    assert figures["ai_answers"] == {"human": 0.0, "uncertain": 0.3333, "ai": 0.6667}


def test_unseen_generators_count_once_each_or_by_their_pictures() -> None:
    real = np.zeros((10, len(TIERS)))
    seen_through, missed = np.ones((30, len(TIERS))), -np.ones((10, len(TIERS)))
    figures = unseen_figures({"easy": (seen_through, real), "hard": (missed, real)}, 0, settings())
    assert figures["mean_over_generators"]["value"] == 0.5
    assert figures["mean_over_pictures"]["value"] == 0.75
    assert figures["generators"]["hard"]["pictures"] == 10


def test_rare_generators_are_examined_whole_and_common_ones_in_part() -> None:
    pictures = [picture(number, 1, "common", "test" if number % 2 else "train") for number in range(40)]
    pictures += [picture(100 + number, 1, "rare", ("train", "val", "test")[number % 3]) for number in range(6)]
    pictures += [picture(200 + number, 0, "photo", "test" if number % 2 else "train") for number in range(60)]
    chosen = examined_pictures(pictures, settings(many=20, most=5))
    assert sum(p.generator == "rare" for p in chosen) == 6
    assert [p.id for p in chosen if p.generator == "common"] == ["0001", "0003", "0005", "0007", "0009"]
    assert all(p.split == "test" for p in chosen if p.label == 0) and sum(p.label == 0 for p in chosen) == 30

    asked, rows = baseline_pictures(chosen, settings(baseline_most=3, baseline_photos=4))
    assert {name: int(row.sum()) for name, row in rows.items()} == {"common": 3, "rare": 3, "photo": 4}
    assert len(asked) == 10


def test_file_traits_read_the_header_and_not_the_pixels(tmp_path: Path) -> None:
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 48), colour).save(tmp_path / f"{colour}.jpg", quality=80, subsampling=0)
    red, blue = (file_traits(tmp_path / f"{colour}.jpg") for colour in ("red", "blue"))
    assert red[:4] == [1.0, 64, 48, 64 / 48]
    assert red[6:] == blue[6:] and red[8] == 0
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    assert file_traits(tmp_path / "a.png")[0] == 0.0
