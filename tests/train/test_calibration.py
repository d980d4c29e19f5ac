"""Temperature, thresholds and weights: what validation data decide."""

from __future__ import annotations

import numpy as np
import pytest

from train.aivshuman import family
from train.calibration import calibrate, choose_thresholds, sigmoid


def test_relatives_of_a_generator_are_one_family() -> None:
    assert family("stable-diffusion-1.4") == family("Stable Diffusion 1.x (2022)") != family("GLIDE")


def test_calibration_undoes_a_known_scale_and_shift() -> None:
    random = np.random.default_rng(0)
    true = random.normal(0, 2, 20000)
    labels = (random.random(20000) < sigmoid(true)).astype(int)
    temperature, bias = calibrate(true * 3 - 1.5, labels, np.ones(20000))
    assert temperature == pytest.approx(3, rel=0.05)
    assert bias == pytest.approx(1.5, abs=0.15)


@pytest.mark.parametrize("spread", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("rank", ["perfect", "reversed", "none", "constant"])
def test_scores_without_a_best_calibration_have_a_valid_one(rank: str, spread: float) -> None:
    """A card takes no temperature of nought, and an infinite bias would go into the head unseen."""
    labels = np.repeat([0, 1], 8)
    values = np.arange(16.0) - 7.5
    values = {"perfect": values, "reversed": -values, "none": np.tile([-1.0, 1.0], 8), "constant": values * 0 + 3}[rank]
    temperature, bias = calibrate(values * spread, labels, np.ones(16))
    assert 0 < temperature < np.inf and np.isfinite(bias)
    chances = sigmoid((values * spread + bias) / temperature)
    if rank == "perfect":
        assert ((chances > 0.5) == labels).all()
    elif rank != "constant":
        assert chances.mean() == pytest.approx(0.5, abs=0.05)


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
