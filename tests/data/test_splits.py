"""Near-duplicates stay together, splits are as asked, and everything follows from the content."""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data.splits import assign_splits, near_duplicate_groups, perceptual_hash

ROOT = Path(__file__).parents[2]
FRACTIONS = {"train": 0.64, "val": 0.16, "test": 0.2}


def picture(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Random blobs: low frequencies as a photo has them."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


@pytest.mark.parametrize("seed", range(5))
def test_hash_survives_delivery_and_tells_pictures_apart(seed: int) -> None:
    original = perceptual_hash(picture(seed))
    delivered = perceptual_hash(jpeg(picture(seed).resize((200, 150)), 40))
    other = perceptual_hash(picture(seed + 100))
    assert (original ^ delivered).bit_count() <= 6
    assert (original ^ other).bit_count() > 12


def test_hash_takes_any_mode_and_a_flat_picture() -> None:
    for mode in ("L", "RGB", "RGBA", "CMYK", "P", "1"):
        assert 0 <= perceptual_hash(Image.new(mode, (5, 900))) < 2**64


#: Pictures most of whose coefficients are 0: flat, a ramp, noise beside its mirror image.
_SYMMETRIC = """
import numpy as np
from PIL import Image
from data.splits import perceptual_hash
noise = np.random.default_rng(0).integers(0, 256, (64, 32), dtype=np.uint8)
ramp = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
for pixels in (np.full((64, 64), 77, np.uint8), ramp, np.concatenate([noise, noise[:, ::-1]], axis=1)):
    print(perceptual_hash(Image.fromarray(pixels)))
"""


def test_symmetric_pictures_have_the_same_hash_whatever_the_processors_arithmetic() -> None:
    hashes = {
        kernel: subprocess.run(
            [sys.executable, "-c", _SYMMETRIC],
            env=os.environ | {"OPENBLAS_CORETYPE": kernel, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for kernel in ("Haswell", "Nehalem")
    }
    assert hashes["Haswell"] == hashes["Nehalem"]


def test_groups_are_those_of_comparing_every_pair() -> None:
    generator = random.Random(0)
    hashes = [generator.getrandbits(64) for _ in range(60)]
    for _ in range(60):
        value = generator.choice(hashes)
        for bit in generator.sample(range(64), generator.randint(0, 9)):
            value ^= 1 << bit
        hashes.append(value)

    expected = list(range(len(hashes)))
    for first in range(len(hashes)):
        for second in range(first):
            if (hashes[first] ^ hashes[second]).bit_count() <= 6:
                old, new = max(expected[first], expected[second]), min(expected[first], expected[second])
                expected = [new if group == old else group for group in expected]
    assert near_duplicate_groups(hashes, 6) == expected


def test_groups_join_through_a_middle_member() -> None:
    assert near_duplicate_groups([0, 0b111111, 0b111111111111, 1 << 63 | 0xFFFF << 32], 6) == [0, 0, 0, 3]
    assert near_duplicate_groups([], 6) == []
    with pytest.raises(ValueError):
        near_duplicate_groups([0], 16)


def ids(count: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]


def test_shares_hold_in_every_stratum() -> None:
    names = ids(500)
    strata = ["large"] * 400 + ["small"] * 85 + ["tiny"] * 15
    splits = assign_splits(names, range(500), strata, FRACTIONS)
    for stratum in ("large", "small", "tiny"):
        found = Counter(split for split, name in zip(splits, strata, strict=True) if name == stratum)
        total = sum(found.values())
        for split, share in FRACTIONS.items():
            assert abs(found[split] - share * total) <= 1


def test_a_group_is_never_divided() -> None:
    groups = [number // 3 for number in range(300)]
    splits = assign_splits(ids(300), groups, [number % 2 for number in range(300)], FRACTIONS)
    sides: dict[int, set[str]] = {}
    for group, split in zip(groups, splits, strict=True):
        sides.setdefault(group, set()).add(split)
    assert all(len(found) == 1 for found in sides.values())


def test_the_split_does_not_depend_on_order_but_on_the_seed() -> None:
    names, groups = ids(200), [number // 2 for number in range(200)]
    splits = dict(zip(names, assign_splits(names, groups, ["all"] * 200, FRACTIONS), strict=True))
    order = list(range(200))
    random.Random(1).shuffle(order)
    shuffled = assign_splits([names[i] for i in order], [groups[i] for i in order], ["all"] * 200, FRACTIONS)
    assert {names[i]: split for i, split in zip(order, shuffled, strict=True)} == splits
    assert assign_splits(names, groups, ["all"] * 200, FRACTIONS, seed=1) != list(splits.values())


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="repeat"):
        assign_splits(["a", "a"], [0, 1], [0, 0], FRACTIONS)
    with pytest.raises(ValueError, match="strata"):
        assign_splits(["a"], [0], [], FRACTIONS)
    with pytest.raises(ValueError, match="add up"):
        assign_splits(["a"], [0], [0], {"train": 0.5})
