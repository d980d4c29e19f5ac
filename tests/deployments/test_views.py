"""Views show what their names say, for pictures of any size, and agree with Hugging Face's own processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from deployments import views
from deployments.views import Resample, ViewSpec, regions, render

ALL_VIEWS = ("squash", "centre", "native", "native_nw", "native_ne", "native_sw", "native_se")


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: a pixel's colour says where it comes from."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], -1).astype(np.uint8))


@pytest.mark.parametrize(
    "size", [(1, 1), (16, 16), (1, 3000), (3000, 1), (223, 224), (224, 224), (225, 1000), (4032, 3024)]
)
def test_every_view_has_the_promised_shape_for_any_size(size: tuple[int, int]) -> None:
    spec = ViewSpec(size_px=64, views=ALL_VIEWS, native_long_side_px=512)
    views = render(gradient(*size), spec)
    assert views.shape == (7, 64, 64, 3)
    assert views.dtype == np.uint8


def test_native_crops_are_the_picture_s_own_pixels() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    spec = ViewSpec(size_px=100, views=("native", "native_nw", "native_ne", "native_sw", "native_se"))
    centre, north_west, north_east, south_west, south_east = render(Image.fromarray(noise), spec)
    np.testing.assert_array_equal(centre, noise[100:200, 150:250])
    np.testing.assert_array_equal(north_west, noise[:100, :100])
    np.testing.assert_array_equal(north_east, noise[:100, -100:])
    np.testing.assert_array_equal(south_west, noise[-100:, :100])
    np.testing.assert_array_equal(south_east, noise[-100:, -100:])


def test_a_large_picture_is_reduced_before_the_native_crop_only_beyond_the_limit() -> None:
    spec = ViewSpec(size_px=100, views=("native",), native_long_side_px=400)
    assert regions((400, 300), spec) == [(150 / 400, 100 / 300, 250 / 400, 200 / 300)]
    assert regions((1600, 1200), spec) == regions((400, 300), spec)


@pytest.mark.parametrize("view", ALL_VIEWS)
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (90, 300), (1600, 1200)])
def test_regions_tell_where_a_view_comes_from(view: str, size: tuple[int, int]) -> None:
    spec = ViewSpec(size_px=112, views=(view,), native_long_side_px=512)
    [(left, top, right, bottom)] = regions(size, spec)
    pixels = render(gradient(*size), spec)[0].astype(float)
    middle = pixels[51:61, 51:61].mean((0, 1)) / 255
    assert middle[0] == pytest.approx((left + right) / 2, abs=0.02)
    assert middle[1] == pytest.approx((top + bottom) / 2, abs=0.02)
    assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1


@pytest.mark.parametrize("size", [(500, 375), (375, 501), (100, 90), (224, 224), (1023, 767)])
def test_centre_view_equals_clip_s_processor(size: tuple[int, int], tmp_path: Path) -> None:
    processors = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = processors.CLIPImageProcessorPil(do_normalize=False, do_rescale=False)
    processor.save_pretrained(tmp_path)
    image = gradient(*size)
    expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    spec = ViewSpec.from_processor(tmp_path)
    assert spec.views == ("centre",)
    difference = np.abs(render(image, spec)[0].astype(int) - expected.astype(int))
    # a crop with an odd remainder may start one pixel earlier or later
    assert difference.max() <= 3


def test_squash_view_equals_vit_s_processor(tmp_path: Path) -> None:
    processors = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
    processor = processors.ViTImageProcessorPil(do_normalize=False, do_rescale=False)
    processor.save_pretrained(tmp_path)
    image = gradient(500, 375)
    expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    spec = ViewSpec.from_processor(tmp_path)
    assert (spec.views, spec.resample, spec.size_px) == (("squash",), "bilinear", 224)
    np.testing.assert_array_equal(render(image, spec)[0], expected.astype(np.uint8))


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(16, 4000), (4000, 17)])
def test_a_crop_made_without_the_rest_shows_what_the_whole_would(
    size: tuple[int, int], resample: Resample, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = Image.fromarray(np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    spec = ViewSpec(size_px=96, views=ALL_VIEWS[1:], resample=resample, short_side_px=128, native_long_side_px=300)
    whole = render(noise, spec)
    monkeypatch.setattr(views, "_MAX_RESIZED_PX", 1)
    difference = np.abs(render(noise, spec).astype(int) - whole.astype(int))
    assert difference.max() <= 1


def test_no_picture_is_resized_to_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    resize = Image.Image.resize

    def spy(self: Image.Image, size: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        # Pillow brings the rows of the box to their width first
        box = options.get("box") or (0, 0, *self.size)
        asked.append(size[0] * max(size[1], int(box[3] - box[1])))
        assert asked[-1] <= 50_000_000
        return resize(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    y = np.linspace(0, 255, 400_000).astype(np.uint8)
    tall = Image.fromarray(np.broadcast_to(y[:, None, None], (400_000, 16, 3)).copy())
    spec = ViewSpec(views=("squash", "centre", "native_nw", "native_ne", "native_sw"))
    squash, *crops = render(tall, spec)
    assert np.abs(squash[:, 100, 0] - np.linspace(0, 255, 224)).max() < 3
    for crop, grey in zip(crops, (127, 0, 0, 255), strict=True):
        assert np.abs(crop.astype(int) - grey).max() <= 1
    wide = render(tall.transpose(Image.Transpose.ROTATE_90), spec)
    for crop, grey in zip(wide[1:], (127, 0, 255, 0), strict=True):
        assert np.abs(crop.astype(int) - grey).max() <= 1
    assert len(asked) == 11


@pytest.mark.parametrize("size", [(120, 90), (1600, 1200), (150, 5000)])
def test_pictures_of_ordinary_sizes_are_resized_whole(size: tuple[int, int]) -> None:
    image = gradient(*size)
    centre, native = render(image, ViewSpec(size_px=224, views=("centre", "native_se")))
    scale = 224 / min(size)
    scaled = image.resize((int(size[0] * scale + 1e-6), int(size[1] * scale + 1e-6)), Image.Resampling.BICUBIC)
    left, top = (scaled.width - 224) // 2, (scaled.height - 224) // 2
    np.testing.assert_array_equal(centre, np.asarray(scaled.crop((left, top, left + 224, top + 224))))
    shown = scaled if min(size) < 224 else image
    np.testing.assert_array_equal(
        native, np.asarray(shown.crop((shown.width - 224, shown.height - 224, shown.width, shown.height)))
    )


def write_processor(folder: Path, **config: object) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def test_processor_files_are_read(tmp_path: Path) -> None:
    blip = write_processor(tmp_path, do_resize=True, size={"height": 384, "width": 384}, resample=3)
    assert ViewSpec.from_processor(blip) == ViewSpec(size_px=384, views=("squash",), resample="bicubic")
    regnet = write_processor(
        tmp_path,
        do_resize=True,
        size={"shortest_edge": 256},
        do_center_crop=True,
        crop_size={"height": 224, "width": 224},
        resample=2,
    )
    assert ViewSpec.from_processor(regnet) == ViewSpec(
        size_px=224, views=("centre",), resample="bilinear", short_side_px=256
    )
    old_style = write_processor(tmp_path, do_resize=True, size=224, do_center_crop=True, crop_size=224)
    assert ViewSpec.from_processor(old_style) == ViewSpec(size_px=224, views=("centre",), short_side_px=224)
    own = ViewSpec(views=("centre", "native"), native_long_side_px=512)
    assert ViewSpec.from_processor(write_processor(tmp_path, view_spec=own.model_dump(mode="json"))) == own


def test_the_image_part_of_a_whole_processor_s_file_is_read(tmp_path: Path) -> None:
    file, image = tmp_path / "processor_config.json", {"size": {"height": 384, "width": 384}, "resample": 2}
    file.write_text(json.dumps({"processor_class": "BlipProcessor", "image_processor": image}))
    assert ViewSpec.from_processor(tmp_path) == ViewSpec(size_px=384, views=("squash",), resample="bilinear")
    beside = write_processor(tmp_path, size=224)
    assert ViewSpec.from_processor(beside).size_px == 224, "the plain file comes first"
    (beside / "preprocessor_config.json").unlink()
    file.write_text(json.dumps({"processor_class": "BlipProcessor"}))
    with pytest.raises(FileNotFoundError, match="does not say how pictures are prepared"):
        ViewSpec.from_processor(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"do_resize": False},
        {"size": {"height": 224, "width": 336}},
        {"size": {"shortest_edge": 224}, "do_center_crop": False},
        {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": {"height": 224, "width": 200}},
        {"size": {"longest_edge": 224}},
        {"view_spec": {"views": ["sideways"]}},
    ],
)
def test_a_processor_that_is_not_square_or_not_understood_is_refused(config: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        ViewSpec.from_processor(write_processor(tmp_path, **config))


def test_bad_specs_and_pictures_are_refused() -> None:
    with pytest.raises(ValidationError):
        ViewSpec(views=())
    with pytest.raises(ValidationError):
        ViewSpec(size_px=224, short_side_px=200)
    with pytest.raises(ValueError, match="RGB"):
        render(Image.new("L", (300, 300)), ViewSpec())
