"""What training a captioner does to pictures: the augmentation of BLIP's fine-tuning, without torchvision.

In: an RGB picture, its id and the epoch. Out: a random part of it (half to all of its area), sometimes mirrored, with
two random changes of RandAugment (Cubuk et al. 2020; the operations and the magnitude of BLIP's). The draw follows
from id and epoch. Knows no model; a caption that says "left" is not looked at, as in the original.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_OPERATIONS = (
    *("identity", "autocontrast", "equalize", "brightness", "sharpness"),
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
)


@dataclass(frozen=True)
class BlipAugment:
    """RandomResizedCrop, flip, RandAugment."""

    area: tuple[float, float] = (0.5, 1.0)
    operations: int = 2
    magnitude: float = 0.5
    """Of the greatest change, 0 to 1."""
    seed: int = 0

    def __call__(self, image: Image.Image, id_: str, epoch: int) -> Image.Image:
        digest = hashlib.sha256(f"{self.seed}:{epoch}:{id_}".encode()).digest()
        random = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        image = random_part(image, self.area, random)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for index in random.integers(len(_OPERATIONS), size=self.operations):
            sign = 1 if random.random() < 0.5 else -1
            image = change(image, _OPERATIONS[index], self.magnitude * sign)
        return image


def random_part(image: Image.Image, area: tuple[float, float], random: np.random.Generator) -> Image.Image:
    """A crop of a random share of the area, its proportions between 3:4 and 4:3; the whole picture if none fits."""
    for _ in range(10):
        wanted = image.width * image.height * random.uniform(*area)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(wanted * ratio)), round(math.sqrt(wanted / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left, top = random.integers(image.width - width + 1), random.integers(image.height - height + 1)
            return image.crop((int(left), int(top), int(left) + width, int(top) + height))
    return image


def change(image: Image.Image, operation: str, amount: float) -> Image.Image:
    """One operation of RandAugment; ``amount`` -1 to 1."""
    if operation == "autocontrast":
        return ImageOps.autocontrast(image)
    if operation == "equalize":
        return ImageOps.equalize(image)
    if operation == "brightness":
        return ImageEnhance.Brightness(image).enhance(1 + 0.9 * amount)
    if operation == "sharpness":
        return ImageEnhance.Sharpness(image).enhance(1 + 0.9 * amount)
    if operation == "rotate":
        return image.rotate(30 * amount, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
    matrix = {
        "shear_x": (1, 0.3 * amount, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * amount, 1, 0),
        "translate_x": (1, 0, 0.3 * amount * image.width / 3, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, 0.3 * amount * image.height / 3),
    }.get(operation)
    if matrix is None:
        return image
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
    )
