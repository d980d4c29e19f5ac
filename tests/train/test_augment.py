"""BLIP's augmentation: repeatable, different in every epoch, and every operation changes a picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from train.augment import _OPERATIONS, BlipAugment, change, random_part


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(20, 200, (6, 8, 3), dtype=np.uint8)).resize(
        (160, 120), Image.Resampling.BICUBIC
    )


def test_the_draw_follows_from_picture_and_epoch(picture: Image.Image) -> None:
    augment = BlipAugment()
    first, again, other = augment(picture, "a", 0), augment(picture, "a", 0), augment(picture, "a", 1)
    assert np.array_equal(np.asarray(first), np.asarray(again))
    assert first.size != other.size or not np.array_equal(np.asarray(first), np.asarray(other))


@pytest.mark.parametrize("operation", _OPERATIONS)
def test_an_operation_keeps_the_size_and_changes_the_picture(picture: Image.Image, operation: str) -> None:
    changed = change(picture, operation, 0.5)
    assert changed.size == picture.size and changed.mode == "RGB"
    assert np.array_equal(np.asarray(changed), np.asarray(picture)) == (operation == "identity")


def test_a_part_has_at_least_half_of_the_area(picture: Image.Image) -> None:
    random = np.random.default_rng(1)
    parts = [random_part(picture, (0.5, 1.0), random).size for _ in range(50)]
    areas = [width * height / (160 * 120) for width, height in parts]
    assert min(areas) > 0.48 and max(areas) <= 1 and len(set(parts)) > 20
    assert random_part(Image.new("RGB", (300, 2)), (0.9, 0.9), random).size == (300, 2)
