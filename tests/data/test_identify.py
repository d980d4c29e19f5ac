"""One picture's particulars: of every format and mode, and the quality that it was saved with."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image
from PIL.Image import Exif

from data.identify import identify, jpeg_quality, pixel_digest, read_jpeg_header
from deployments.images import ImageError, ImageLimits
from tests.data.made import encoded, picture

LIMITS = ImageLimits()


@pytest.mark.parametrize("quality", [1, 10, 24, 25, 26, 40, 49, 50, 51, 60, 75, 76, 90, 95, 99, 100])
def test_the_quality_is_read_off_the_tables(quality: int) -> None:
    tables, components = read_jpeg_header(encoded(picture(1), quality=quality))
    assert (jpeg_quality(tables[0]), components) == (quality, 3)


def test_tables_tell_encoders_apart() -> None:
    first, second = (identify(encoded(picture(n), quality=80), LIMITS) for n in (1, 2))
    other = identify(encoded(picture(1), quality=81), LIMITS)
    assert first.quantisation == second.quantisation != other.quantisation


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG")]
    + [(mode, "PNG") for mode in ("RGB", "L", "P", "RGBA", "1")]
    + [("RGB", "WEBP"), ("RGB", "TIFF"), ("P", "GIF")],
)
def test_particulars_of_formats_and_modes(mode: str, kind: str) -> None:
    data = encoded(picture(3).convert(mode), kind)
    what = identify(data, LIMITS)
    assert (what.id, what.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert (what.format, what.mode, what.width, what.height) == (kind, mode, 96, 72)
    assert (what.jpeg_quality, what.quantisation is not None) == ((90, True) if kind == "JPEG" else (None, False))
    assert len(what.phash) == 16


def test_progressive_and_padded_headers_are_read() -> None:
    buffer = io.BytesIO()
    picture(4).save(buffer, "JPEG", quality=70, progressive=True, comment=b"x" * 3000)
    data = buffer.getvalue()
    filled = data[:2] + b"\xff\xff" + data[2:]
    for version in (data, filled):
        tables, components = read_jpeg_header(version)
        assert (jpeg_quality(tables[0]), components, len(tables)) == (70, 3, 2)
    assert read_jpeg_header(b"\xff\xd8\xff") == ([], 0)


def test_a_turned_picture_is_the_upright_one() -> None:
    exif = Exif()
    exif[0x0112], exif[0x010F] = 6, "Canon"
    buffer = io.BytesIO()
    picture(5).rotate(90, expand=True).save(buffer, "JPEG", quality=95, exif=exif)
    turned, upright = identify(buffer.getvalue(), LIMITS), identify(encoded(picture(5), quality=95), LIMITS)
    assert (turned.width, turned.height) == (96, 72)
    assert (int(turned.phash, 16) ^ int(upright.phash, 16)).bit_count() <= 4
    assert turned.declared == ["exif:Make=Canon"]
    assert upright.declared == []


def test_equal_pixels_are_told_from_other_ones() -> None:
    png, again = encoded(picture(6), "PNG"), io.BytesIO()
    picture(6).save(again, "PNG", compress_level=1)
    changed = np.asarray(picture(6)).copy()
    changed[0, 0, 0] ^= 1
    other = identify(encoded(Image.fromarray(changed), "PNG"), LIMITS)
    first, second = identify(png, LIMITS), identify(again.getvalue(), LIMITS)
    assert (first.pixels, first.phash) == (second.pixels, second.phash)
    assert first.id != second.id
    assert other.pixels != first.pixels


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_body"),
        (b"text", "not_an_image"),
        (encoded(picture(7))[:900], "truncated"),
        (encoded(picture(7, (15, 90))), "too_small"),
    ],
)
def test_what_the_service_refuses_is_refused(data: bytes, code: str) -> None:
    with pytest.raises(ImageError) as error:
        identify(data, LIMITS)
    assert error.value.code == code


def test_the_digest_of_pixels_depends_on_each_and_on_nothing_else() -> None:
    rng = np.random.default_rng(4)
    for width, height in ((1, 1), (3, 3), (333, 401), (2100, 2003)):  # the last is kept in pieces by Pillow
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        pasted = Image.new("RGB", image.size)
        pasted.paste(image.convert("RGBA"), (0, 0), image.convert("RGBA"))
        assert pixel_digest(image) == pixel_digest(pasted)  # whose unused fourth bytes differ
        for row, column in ((0, 0), (height // 2, width // 2), (-1, -1)):
            other = pixels.copy()
            other[row, column, 1] ^= 1
            assert pixel_digest(Image.fromarray(other)) != pixel_digest(image)
