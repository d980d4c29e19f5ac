"""What delivery does to pictures: the fixed tiers of evaluation, and the random damage of training.

In: an RGB picture. Out: the picture as it arrives after resizing, blurring and lossy encoding. Training applies the
same damage to both classes, because in collected data size and compression alone tell the classes apart, and a detector
would learn just that.

Knows no labels, no views and no model.
"""

from __future__ import annotations

import hashlib
import io
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter
from pydantic import BaseModel, ConfigDict, Field

Tier = Literal["clean", "768_q60", "512_q40"]

#: Tier -> (long side in px, JPEG quality); None leaves the picture as it was uploaded.
TIERS: dict[Tier, tuple[int, int] | None] = {"clean": None, "768_q60": (768, 60), "512_q40": (512, 40)}


class Damage(BaseModel):
    """How badly training pictures are treated; every picture of either class is re-encoded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    light: float = Field(
        0.35, ge=0, le=1, description="share only re-encoded at high quality, size kept: what a first upload looks like"
    )
    min_long_side_px: int = Field(256, ge=32, description="smallest long side that pictures are reduced to")
    max_long_side_px: int = Field(1024, ge=32, description="largest long side; larger pictures are always reduced")
    keep_size: float = Field(0.25, ge=0, le=1, description="share that keeps its size (up to the largest)")
    crop: float = Field(0.75, gt=0, le=1, description="smallest share of each side that a random crop keeps")
    min_quality: int = Field(30, ge=1, le=100, description="lowest JPEG or WebP quality")
    max_quality: int = Field(95, ge=1, le=100, description="highest JPEG or WebP quality")
    webp: float = Field(0.1, ge=0, le=1, description="share encoded as WebP instead of JPEG")
    twice: float = Field(0.3, ge=0, le=1, description="share encoded as JPEG once more before the resize")
    blur: float = Field(0.1, ge=0, le=1, description="share of the others blurred, Gaussian, sigma 0.3 to 1.2 px")


def deliver(image: Image.Image, tier: Tier) -> Image.Image:
    """The picture after a tier of delivery; the same input gives the same pixels."""
    setting = TIERS[tier]
    if setting is None:
        return image
    return reencode(reduce_to(image, setting[0]), "JPEG", setting[1])


def reduce_to(
    image: Image.Image, long_side_px: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """The picture with at most this long side, proportions kept; a smaller one is returned as it is."""
    scale = long_side_px / max(image.size)
    if scale >= 1:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)


def reencode(image: Image.Image, encoding: Literal["JPEG", "WEBP"], quality: int, subsampling: int = 2) -> Image.Image:
    """The picture after a lossy round trip; ``subsampling`` (JPEG) 0 is 4:4:4, 2 is 4:2:0."""
    buffer = io.BytesIO()
    if encoding == "JPEG":
        image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    else:
        image.save(buffer, "WEBP", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def random_damage(image: Image.Image, damage: Damage, name: str, variant: int) -> Image.Image:
    """A random but repeatable delivery of a picture: the draw follows from ``name`` (the picture's id) and ``variant``
    alone.

    In order: crop, mirror, sometimes an earlier JPEG, resize, sometimes blur, final JPEG or WebP. The crop also moves
    the blocks of the original's own JPEG against those of the final one, as cropping users do. The light share is only
    mirrored and re-encoded.
    """
    first = np.random.default_rng(
        int.from_bytes(hashlib.sha256(f"light:{variant}:{name}".encode()).digest()[:8], "big")
    )
    if first.random() < damage.light:
        if first.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return reencode(image, "JPEG", int(first.integers(80, 99)), subsampling=0 if first.random() < 0.5 else 2)
    seed = hashlib.sha256(f"{variant}:{name}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(seed[:8], "big"))
    filters = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BOX)

    keep = random.uniform(damage.crop, 1, size=2)
    width, height = max(1, int(image.width * keep[0])), max(1, int(image.height * keep[1]))
    left, top = random.integers(image.width - width + 1), random.integers(image.height - height + 1)
    image = image.crop((int(left), int(top), int(left) + width, int(top) + height))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if random.random() < damage.twice:
        image = reencode(image, "JPEG", int(random.integers(60, 96)))
    largest = min(max(image.size), damage.max_long_side_px)
    if random.random() >= damage.keep_size and largest > damage.min_long_side_px:
        largest = int(np.exp(random.uniform(np.log(damage.min_long_side_px), np.log(largest))))
    image = reduce_to(image, largest, filters[random.integers(len(filters))])
    if random.random() < damage.blur:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 1.2)))
    quality = int(random.integers(damage.min_quality, damage.max_quality + 1))
    if random.random() < damage.webp:
        return reencode(image, "WEBP", quality)
    return reencode(image, "JPEG", quality, subsampling=0 if random.random() < 0.3 else 2)
