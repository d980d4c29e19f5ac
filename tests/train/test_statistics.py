"""The figures agree with references, and intervals behave as intervals do."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from train.statistics import (
    answers,
    auc,
    by_generator,
    expected_calibration_error,
    interval,
    paired_difference,
    reliability,
    share_of,
    verdict_figures,
)


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
    assert sum(entry["pictures"] for entry in reliability(chances, labels)) == 20000


def test_intervals_hold_the_value_and_narrow_with_more_pictures() -> None:
    random = np.random.default_rng(0)
    widths = []
    for count in (30, 3000):
        found = interval(lambda values: float(values.mean()), [random.normal(size=count)], 300, 0)
        assert found["low"] <= found["value"] <= found["high"]
        widths.append(found["high"] - found["low"])
    assert widths[1] < widths[0] / 5


def test_copies_of_a_picture_narrow_no_interval() -> None:
    random = np.random.default_rng(0)
    ai, real = random.normal(1, size=(40, 1)), random.normal(size=(50, 1))
    groups = [np.arange(40).repeat(8), np.array([f"group {number}" for number in range(50)]).repeat(8)]
    sides = [ai[:, 0].repeat(8), real[:, 0].repeat(8)]

    def width(found: dict[str, float]) -> float:
        return found["high"] - found["low"]

    alone = interval(auc, [ai[:, 0], real[:, 0]], 300, 0)
    assert interval(auc, sides, 300, 0, groups) == alone
    assert width(interval(auc, sides, 300, 0)) < width(alone) / 2
    # groups of one are drawn as pictures are
    assert interval(auc, [ai[:, 0], real[:, 0]], 300, 0, [np.arange(40)[::-1], np.arange(50)]) == alone

    theirs = [side + random.normal(0, 0.3, 320 + 80 * place) for place, side in enumerate(sides)]
    assert width(paired_difference(auc, sides, theirs, 300, 0, groups)) > width(
        paired_difference(auc, sides, theirs, 300, 0)
    )

    chances, labels = 1 / (1 + np.exp(-np.concatenate(sides))), np.repeat([1, 0], [320, 400])
    borders = {"human_below": 0.4, "ai_above": 0.6}
    of_all = np.concatenate([[f"ai {name}" for name in groups[0]], groups[1]])
    few, many = (verdict_figures(chances, labels, borders, 100, 0, names) for names in (of_all, None))
    for name in ("roc_auc", "real_accuracy", "ai_recall", "balanced_accuracy"):
        assert width(few[name]) > 1.5 * width(many[name])

    scores, named = {"one": (ai.repeat(8, 0), real.repeat(8, 0))}, {"one": (groups[0], groups[1])}
    same = by_generator({"one": (ai, real)}, 0, 100, 0)["mean_over_generators"]
    assert by_generator(scores, 0, 100, 0, named)["mean_over_generators"] == same


def test_a_share_of_all_is_as_sure_as_its_pictures_are_many() -> None:
    for count, low in ((3, 0.2924), (116, 0.9687), (1000, 0.9963)):
        assert share_of(np.ones(count, bool), 50, 0) == {"value": 1.0, "low": low, "high": 1.0}
        assert share_of(np.zeros(count, bool), 50, 0) == {"value": 0.0, "low": 0.0, "high": pytest.approx(1 - low)}
        # Clopper & Pearson: of what had that share, so many would be right once in forty times
        assert low**count == pytest.approx(0.025, rel=0.05)
    assert share_of(np.ones(40, bool), 50, 0, np.arange(40) // 8) == share_of(np.ones(5, bool), 50, 0)
    some = np.arange(100) < 90
    as_before = interval(lambda values: float(values.mean()), [some], 200, 0)
    assert share_of(some, 200, 0) == as_before and as_before["low"] < 0.9 < as_before["high"]


def test_a_paired_difference_is_much_narrower_than_its_sides() -> None:
    random = np.random.default_rng(0)
    hard = random.normal(size=400)  # how hard a picture is moves both models alike
    ours, theirs = hard + 0.1 + 0.05 * random.normal(size=400), hard
    mean = lambda values: float(values.mean())  # noqa: E731
    paired = paired_difference(mean, [ours], [theirs], 500, 0)
    alone = interval(mean, [ours], 500, 0)
    assert paired["low"] > 0 and paired["value"] == pytest.approx(0.1, abs=0.02)
    assert paired["high"] - paired["low"] < (alone["high"] - alone["low"]) / 5


def test_a_model_does_not_differ_from_itself() -> None:
    values = np.random.default_rng(1).random(50)
    assert paired_difference(auc, [values, 1 - values], [values, 1 - values], 50, 0) == {
        "value": 0.0,
        "low": 0.0,
        "high": 0.0,
    }


def test_three_answers_share_out_everything() -> None:
    shares = answers(np.array([0.1, 0.3, 0.5, 0.7, 0.9]), 0.3, 0.7)
    assert shares == {"human": 0.2, "uncertain": 0.4, "ai": 0.4}


def test_verdicts_use_the_given_threshold_and_no_other() -> None:
    chances, labels = np.array([0.1, 0.2, 0.6, 0.4, 0.7, 0.9]), np.array([0, 0, 0, 1, 1, 1])
    figures = verdict_figures(chances, labels, {"human_below": 0.3, "ai_above": 0.65}, 50, 0)
    assert figures["real_accuracy"]["value"] == 1.0
    assert figures["ai_recall"]["value"] == pytest.approx(2 / 3, abs=1e-3)
    assert figures["ai_answers"] == {"human": 0.0, "uncertain": 0.3333, "ai": 0.6667}
    with pytest.raises(ValueError, match="both classes"):
        verdict_figures(chances, np.ones(6), {"human_below": 0.3, "ai_above": 0.65}, 50, 0)


def test_generators_count_once_each_or_by_their_pictures() -> None:
    real = np.zeros((10, 1))
    seen_through, missed = np.ones((30, 1)), -np.ones((10, 1))
    figures = by_generator({"easy": (seen_through, real), "hard": (missed, real)}, 0, 100, 0)
    assert figures["mean_over_generators"]["value"] == 0.5
    assert figures["mean_over_pictures"]["value"] == 0.75
    assert figures["generators"]["hard"]["pictures"] == 10
