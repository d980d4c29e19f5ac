"""Damage is repeatable, stays within its settings, and never tells the classes apart."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from train.damage import TIERS, Damage, deliver, random_damage, reencode


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(2000, 1500), (300, 900), (64, 64), (3000, 10)])
def test_tiers_bound_the_long_side_and_never_enlarge(size: tuple[int, int]) -> None:
    image = picture(*size)
    assert deliver(image, "clean") is image
    for tier, limit in (("768_q60", 768), ("512_q40", 512)):
        delivered = deliver(image, tier)
        assert max(delivered.size) == min(limit, max(size))
        assert delivered.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(delivered), np.asarray(deliver(image, tier)))
    assert list(TIERS) == ["clean", "768_q60", "512_q40"]


def test_random_damage_follows_from_name_and_variant() -> None:
    image, damage = picture(700, 500), Damage()
    first = np.asarray(random_damage(image, damage, "a", 0))
    np.testing.assert_array_equal(first, np.asarray(random_damage(image, damage, "a", 0)))
    others = [np.asarray(random_damage(image, damage, *name)) for name in (("a", 1), ("b", 0))]
    assert all(other.shape != first.shape or (other != first).any() for other in others)


def test_damaged_pictures_stay_within_the_settings() -> None:
    damage = Damage(light=0, max_long_side_px=400, min_long_side_px=200, crop=0.9)
    sizes = {max(random_damage(picture(600, 300), damage, str(number), 0).size) for number in range(30)}
    assert min(sizes) >= 200 and max(sizes) <= 400
    assert len(sizes) > 5


def test_the_light_share_keeps_the_size() -> None:
    damage = Damage(light=1)
    assert all(random_damage(picture(600, 300), damage, str(number), 0).size == (600, 300) for number in range(5))


@pytest.mark.parametrize("size", [(64, 64), (65, 1000), (1, 1)])
def test_small_and_odd_pictures_survive(size: tuple[int, int]) -> None:
    for variant in range(10):
        assert min(random_damage(picture(*size), Damage(), "x", variant).size) >= 1


def test_every_encoding_is_lossy() -> None:
    image = picture(64, 64)
    for encoding in ("JPEG", "WEBP"):
        assert (np.asarray(reencode(image, encoding, 50)) != np.asarray(image)).any()
