"""Views: the fixed-size pictures that a model sees of a picture of any size.

In: an RGB ``PIL.Image`` and a ``ViewSpec``. Out: ``uint8`` pixels of shape ``(V, S, S, 3)``, still unnormalised, so
that they are small enough to cross between processes and the replica that owns the model only has to scale them.

One spec expresses every model here: a plain ViT or BLIP (the whole picture squashed), CLIP (short side, then the
centre) and the starter detector (the whole picture beside crops at the picture's own resolution, which keep the fine
traces that resizing wipes out).

Knows no tensor library, no model and no file format: decoding, orientation and colour conversion are done before.
"""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.pixels import processor_settings

View = Literal["squash", "centre", "native", "native_nw", "native_ne", "native_sw", "native_se"]
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]

#: Where a crop at native resolution lies in the room that the picture leaves around it, (x, y) from 0 to 1.
_ANCHORS: dict[str, tuple[float, float]] = {
    "native": (0.5, 0.5),
    "native_nw": (0.0, 0.0),
    "native_ne": (1.0, 0.0),
    "native_sw": (0.0, 1.0),
    "native_se": (1.0, 1.0),
}

#: Pixels of a resized picture that is still made whole and then cropped. Only elongated pictures exceed it: of
#: 16 x 3,125,000, a file of a few KB, the whole would be 224 x 43,750,000.
_MAX_RESIZED_PX = 50_000_000

#: A region of the picture: left, top, right, bottom as fractions of its width and height.
Box = tuple[float, float, float, float]


class ViewSpec(BaseModel):
    """Which views of a picture a model sees."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size_px: int = Field(224, ge=16, le=1024, description="side S of every view")
    views: Annotated[tuple[View, ...], Field(min_length=1, max_length=8)] = Field(
        ("squash",),
        description="`squash`: the whole picture at S x S; `centre`: short side to `short_side_px`, then "
        "the centre; `native*`: an S x S crop without resizing, at the centre or in a corner",
    )
    resample: Resample = Field("bicubic", description="filter of every resize")
    short_side_px: int | None = Field(
        None, ge=16, le=2048, description="short side before the crop of `centre`; null means S"
    )
    native_long_side_px: int | None = Field(
        None, ge=16, description="larger pictures are first reduced to this long side for `native*`; null means never"
    )

    @model_validator(mode="after")
    def _centre_fits(self) -> Self:
        if self.short_side_px is not None and self.short_side_px < self.size_px:
            raise ValueError(f"short_side_px {self.short_side_px} is smaller than size_px {self.size_px}")
        return self

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of one picture's views, ``(V, S, S, 3)``."""
        return len(self.views), self.size_px, self.size_px, 3

    @classmethod
    def from_processor(cls, folder: Path) -> Self:
        """The spec that the image processor's settings of a checkpoint describe.

        A detector of ours states it outright (``view_spec``); any other Hugging Face checkpoint's keys describe one
        view.

        Raises:
            FileNotFoundError: the checkpoint has no such settings.
            ValueError: they describe something other than square views (the message names the key).
        """
        config, where = processor_settings(folder), f"image processor of {folder}"
        if "view_spec" in config:
            return cls.model_validate(config["view_spec"])
        size, crop = config.get("size", 224), config.get("crop_size", 224)
        resample: Any = Image.Resampling(config.get("resample", Image.Resampling.BICUBIC)).name.lower()
        if not config.get("do_resize", True):
            raise ValueError(f"{where}: do_resize is false; pictures of any size cannot be batched")
        short, side = _resize_of(size, where)
        if not config.get("do_center_crop", False):
            if side is None:
                raise ValueError(f"{where}: size {size} without do_center_crop does not give square pictures")
            return cls(size_px=side, views=("squash",), resample=resample)
        if isinstance(crop, int):
            crop = {"height": crop, "width": crop}
        if crop.get("height") != crop.get("width"):
            raise ValueError(f"{where}: crop_size {crop} is not square")
        if short is None:
            raise ValueError(f"{where}: size {size} with do_center_crop is not a shortest_edge")
        return cls(size_px=crop["height"], views=("centre",), resample=resample, short_side_px=short)


def _resize_of(size: Any, where: str) -> tuple[int | None, int | None]:
    """(short side, square side) that a processor's ``size`` asks for; one of them is None unless it is a bare
    number."""
    if isinstance(size, int):
        return size, size
    if "shortest_edge" in size:
        return size["shortest_edge"], None
    if "height" in size and size["height"] == size.get("width"):
        return None, size["height"]
    raise ValueError(f"{where}: size {size} is not understood: want a number, shortest_edge, or equal height and width")


def render(image: Image.Image, spec: ViewSpec) -> np.ndarray:
    """The views of one picture, ``uint8`` of shape ``(V, S, S, 3)`` in the order of ``spec.views``.

    Args:
        image: RGB, any size from 1 x 1; pictures smaller than a view are enlarged.

    Raises:
        ValueError: the picture is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB picture, got {image.mode}")
    resample = Image.Resampling[spec.resample.upper()]
    views = np.empty((len(spec.views), spec.size_px, spec.size_px, 3), dtype=np.uint8)
    resized: dict[tuple[int, int], Image.Image] = {image.size: image}  # made once for all crops
    for index, view in enumerate(spec.views):
        if view == "squash":
            shown = _squashed(image, spec.size_px, resample)
        else:
            size, box = _crop_of(image.size, view, spec)
            if size not in resized and size[0] * size[1] > _MAX_RESIZED_PX:
                shown = _resized_crop(image, size, box, resample)
            else:
                if size not in resized:
                    resized[size] = image.resize(size, resample)
                shown = resized[size].crop(box)
        views[index] = np.asarray(shown)
    return views


def regions(size: tuple[int, int], spec: ViewSpec) -> list[Box]:
    """Which part of a picture of ``size`` (width, height in px) each view shows, to lay a heat map over it."""
    boxes: list[Box] = []
    for view in spec.views:
        if view == "squash":
            boxes.append((0.0, 0.0, 1.0, 1.0))
            continue
        (width, height), (left, top, right, bottom) = _crop_of(size, view, spec)
        boxes.append((left / width, top / height, right / width, bottom / height))
    return boxes


def _crop_of(size: tuple[int, int], view: View, spec: ViewSpec) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """The size to which a picture is resized for a view other than `squash`, and the crop of that."""
    short = spec.short_side_px or spec.size_px
    scale = short / min(size) if view == "centre" else _native_scale(size, spec)
    scaled = _scaled_size(size, scale, spec.size_px)
    return scaled, _crop_box(scaled, spec.size_px, _ANCHORS.get(view, (0.5, 0.5)))


def _native_scale(size: tuple[int, int], spec: ViewSpec) -> float:
    """1, or less for a picture beyond ``native_long_side_px``, or more for one smaller than a view."""
    scale = 1.0 if spec.native_long_side_px is None else min(1.0, spec.native_long_side_px / max(size))
    return max(scale, spec.size_px / min(size))


def _scaled_size(size: tuple[int, int], scale: float, least_px: int) -> tuple[int, int]:
    # truncated, as Hugging Face's processors do; never below the view, whatever rounding says
    return max(int(size[0] * scale + 1e-6), least_px), max(int(size[1] * scale + 1e-6), least_px)


def _crop_box(size: tuple[int, int], side: int, anchor: tuple[float, float]) -> tuple[int, int, int, int]:
    left, top = int((size[0] - side) * anchor[0]), int((size[1] - side) * anchor[1])
    return left, top, left + side, top + side


def _squashed(image: Image.Image, side: int, resample: Image.Resampling) -> Image.Image:
    # `resize` brings every row to the new width before it brings the columns to the new height
    if side * image.height > _MAX_RESIZED_PX:
        image = image.resize((image.width, side), resample)
    return image.resize((side, side), resample)


def _resized_crop(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], resample: Image.Resampling
) -> Image.Image:
    """The crop `box` of the picture resized to `size`, made without the rest of it."""
    across, down = image.width / size[0], image.height / size[1]
    left, top, right, bottom = box[0] * across, box[1] * down, box[2] * across, box[3] * down
    # `resize` holds its box in single precision, too coarse far from the corner: it is given the surroundings alone,
    # as far as the widest filter (Lanczos, three pixels) reaches.
    reach_x, reach_y = 4 * max(1.0, across), 4 * max(1.0, down)
    x, y = max(0, int(left - reach_x)), max(0, int(top - reach_y))
    end_x, end_y = min(image.width, ceil(right + reach_x)), min(image.height, ceil(bottom + reach_y))
    near = image.crop((x, y, end_x, end_y))
    source = (left - x, top - y, min(right - x, near.width), min(bottom - y, near.height))
    return near.resize((box[2] - box[0], box[3] - box[1]), resample, box=source)
