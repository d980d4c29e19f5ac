"""Decoding: every format and mode comes out right, every limit holds, nothing but ImageError comes out."""

from __future__ import annotations

import hashlib
import random
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms, ImageFile

from deployments import images
from deployments.bmff import av1_sizes
from deployments.containers import jpeg_scans, pixels_only, read_metadata
from deployments.images import ImageError, ImageLimits, Picture, decode
from deployments.metadata import ContainerError


def photo(width: int = 96, height: int = 64) -> Image.Image:
    """Something smooth that differs in all four corners."""
    grain = np.random.default_rng(5).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, picture_format: str, **options: Any) -> bytes:
    buffer = BytesIO()
    if picture_format == "HEIC":
        pillow_heif.from_pillow(image).save(buffer, format="HEIF", **options)
    else:
        image.save(buffer, picture_format, **options)
    return buffer.getvalue()


def distance(picture: Picture, expected: Image.Image) -> float:
    """Mean absolute difference of 8-bit values."""
    assert picture.image.mode == "RGB"
    assert (picture.width, picture.height) == picture.image.size == expected.size
    return float(np.abs(np.asarray(picture.image, np.int16) - np.asarray(expected.convert("RGB"), np.int16)).mean())


def refused(data: bytes, **limits: int) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, ImageLimits(**limits))
    assert caught.value.detail
    return caught.value.code


FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIC")


@pytest.mark.parametrize("picture_format", FORMATS)
def test_each_format_is_told_by_content_and_decoded(picture_format: str) -> None:
    data = encode(photo(), picture_format)
    picture = decode(data)
    assert picture.format == picture_format
    assert picture.sha256 == hashlib.sha256(data).hexdigest()
    assert picture.size_bytes == len(data)
    assert distance(picture, photo()) < 6


@pytest.mark.parametrize("picture_format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(picture_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    block: Any = exif.tobytes() if picture_format == "HEIC" else exif
    transposes = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
    expected = photo().transpose(Image.Transpose(transposes[orientation])) if orientation > 1 else photo()
    assert distance(decode(encode(photo(), picture_format, exif=block)), expected) < 6


@pytest.mark.parametrize("garbage", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 5000])
def test_corrupt_exif_does_not_fail_a_sound_picture(garbage: bytes) -> None:
    jpeg = encode(photo(), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(garbage) + 2) + garbage
    assert distance(decode(jpeg[:2] + segment + jpeg[2:]), photo()) < 6
    png = encode(photo(), "PNG")
    chunk = struct.pack(">I", len(garbage)) + b"eXIf" + garbage + b"\0\0\0\0"  # its checksum is wrong as well
    assert distance(decode(png[:33] + chunk + png[33:]), photo()) == 0
    assert distance(decode(encode(photo(), "WEBP", exif=garbage)), photo()) < 6


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("big", [False, True])
def test_tiff_compressions(compression: str, big: bool) -> None:
    assert distance(decode(encode(photo(), "TIFF", compression=compression, big_tiff=big)), photo()) < 6


def test_cmyk_of_adobe_is_not_inverted() -> None:
    data = encode(photo().convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    assert distance(decode(data), photo()) < 6
    assert distance(decode(encode(photo().convert("CMYK"), "TIFF")), photo()) < 1


@pytest.mark.parametrize("picture_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(picture_format: str) -> None:
    grey = photo().convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert distance(decode(encode(deep, picture_format)), grey) == 0


def test_32_bit_and_floating_point_grey_span_their_range() -> None:
    grey = photo().convert("L")
    values = (np.asarray(grey, np.float32) - np.asarray(grey).min()) / np.ptp(np.asarray(grey, np.float32))
    expected = Image.fromarray((values * 255).astype(np.uint8))
    assert distance(decode(encode(Image.fromarray(values), "TIFF")), expected) < 1.1
    assert distance(decode(encode(Image.fromarray((values * 1e9).astype(np.int32)), "TIFF")), expected) < 1.1
    holes = values.copy()
    holes[0, 0], holes[1, 1] = np.nan, np.inf
    assert distance(decode(encode(Image.fromarray(holes), "TIFF")), expected) < 1.2


def test_lab_becomes_rgb() -> None:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(photo(), *profiles, outputMode="LAB")
    assert lab is not None
    assert distance(decode(encode(lab, "TIFF")), photo()) < 2


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_bilevel_and_palette(mode: str) -> None:
    image = photo().convert(mode)
    assert distance(decode(encode(image, "PNG")), image) == 0
    assert distance(decode(encode(image, "GIF")), image) < 1


@pytest.mark.parametrize("picture_format", ["PNG", "WEBP", "AVIF", "HEIC", "TIFF"])
def test_transparency_lies_on_white(picture_format: str) -> None:
    image = photo().convert("RGBA")
    image.putalpha(0)
    picture = decode(encode(image, picture_format, **({"lossless": True} if picture_format == "WEBP" else {})))
    assert np.asarray(picture.image).min() == 255


def test_transparency_of_palettes_grey_and_single_colours_lies_on_white() -> None:
    clear = Image.new("RGBA", (20, 20), (10, 200, 30, 0))
    half = Image.new("LA", (20, 20), (0, 128))
    assert decode(encode(clear.quantize(4), "PNG")).image.getpixel((3, 3)) == (255, 255, 255)
    assert decode(encode(half, "PNG")).image.getpixel((3, 3)) == (127, 127, 127)
    one_colour = Image.new("RGB", (20, 20), (1, 2, 3))
    assert decode(encode(one_colour, "PNG", transparency=(1, 2, 3))).image.getpixel((3, 3)) == (255, 255, 255)
    assert decode(encode(one_colour.convert("P"), "GIF", transparency=0)).image.getpixel((3, 3)) is not None


@pytest.mark.parametrize("picture_format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_is_taken(picture_format: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    picture = decode(encode(frames[0], picture_format, save_all=True, append_images=frames[1:]))
    assert distance(picture, frames[0]) < 6


def test_what_is_none_of_the_formats_is_not_an_image() -> None:
    assert refused(b"") == "empty_body"
    assert refused(b"hello") == "not_an_image"
    for other in ("BMP", "PPM", "ICNS", "TGA", "JPEG2000", "EPS", "PDF", "ICO"):
        assert refused(encode(photo(64, 64), other)) == "not_an_image"


def test_limits_hold_at_their_edge() -> None:
    data = encode(photo(40, 30), "PNG")
    assert decode(data, ImageLimits(max_bytes=len(data), max_pixels=1200, min_side_px=30)).width == 40
    assert refused(data, max_bytes=len(data) - 1) == "too_large"
    assert refused(data, max_pixels=1199) == "too_many_pixels"
    assert refused(data, min_side_px=31) == "too_small"


@pytest.mark.parametrize("picture_format", ["PNG", "WEBP", "GIF", "TIFF", "AVIF", "HEIC", "JPEG"])
def test_too_many_pixels_are_refused_before_they_are_decoded(
    picture_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(photo(256, 256), picture_format)

    def load(self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert refused(data, max_pixels=65_535) == "too_many_pixels"


@pytest.mark.parametrize("picture_format", [*FORMATS, "GIF"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.8])
def test_a_file_that_is_cut_off_is_truncated(picture_format: str, kept: float) -> None:
    grain = np.random.default_rng(1).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    data = encode(Image.fromarray(grain), picture_format)
    assert refused(data[: int(len(data) * kept)]) in ("truncated", "not_an_image")


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_last_bytes_is_accepted_and_one_without_rows_is_not(progressive: bool) -> None:
    data = encode(photo(640, 480), "JPEG", quality=95, progressive=progressive)
    whole = decode(data)
    for lost in (1, 2, 3):
        assert distance(decode(data[:-lost]), whole.image) < 0.5
    assert refused(data[: len(data) * 3 // 4]) == "truncated"


def test_what_other_code_sets_in_pillow_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {picture_format: encode(photo(), picture_format) for picture_format in FORMATS}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(Image, "OPEN", {})
    for data in files.values():
        assert decode(data).width == 96
        assert refused(data, max_pixels=100) == "too_many_pixels"


def test_deeply_hostile_tiff_directories_are_refused() -> None:
    data = encode(photo(), "TIFF")
    assert decode(data)
    entries = [(tag, 7, len(data), 8) for tag in (258, 273, 277, 279, 282)]
    ifd = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    assert refused(data[:4] + struct.pack("<I", len(data)) + data[8:] + ifd) == "truncated"


def tiff(tags: dict[int, tuple[int, ...]], pixels: bytes) -> bytes:
    """A little-endian TIFF of tags of LONG values, its pixels from byte 8."""
    at = 8 + len(pixels)
    entries, values = b"", b""
    for tag, numbers in sorted(tags.items()):
        value = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(value) > 4:
            values, value = values + value, struct.pack("<I", at + len(values))
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + value
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", at + len(values)) + pixels + values + directory


GREY_TAGS = {256: (96,), 257: (64,), 258: (8,), 259: (1,), 262: (1,), 277: (1,)}


def test_a_tiff_of_more_strips_than_its_picture_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = photo().convert("L")
    rows = tuple(8 + 96 * row for row in range(64))
    sound = tiff(GREY_TAGS | {273: rows, 278: (1,), 279: (96,) * 64}, grey.tobytes())
    assert distance(decode(sound), grey) == 0

    def opened(*_: Any) -> None:
        raise ImageError("empty_body", "opened")

    monkeypatch.setitem(images._OPENERS, "TIFF", opened)
    assert refused(sound) == "empty_body"
    strips = {273: rows * 800, 278: (1,), 279: (96,)}
    assert refused(tiff(GREY_TAGS | strips, grey.tobytes())) == "truncated"
    tiles = {322: (96,), 323: (32,), 324: (8, 8, 8), 325: (96 * 32,) * 2}
    assert refused(tiff(GREY_TAGS | tiles, grey.tobytes())) == "truncated"
    assert refused(tiff(GREY_TAGS | tiles | {324: (8, 8), 325: (96,) * 3}, grey.tobytes())) == "truncated"
    absurd = {256: (50_000,), 257: (1000,), 322: (16,), 323: (16,), 324: (8,) * 100_001}
    assert refused(tiff(GREY_TAGS | absurd, grey.tobytes())) == "truncated"


def test_tiled_and_planar_tiffs_are_decoded() -> None:
    planes = [np.asarray(plane) for plane in photo().split()]
    tiles = b"".join(plane[y : y + 32, x : x + 48].tobytes() for plane in planes for y in (0, 32) for x in (0, 48))
    tags = GREY_TAGS | {258: (8, 8, 8), 262: (2,), 277: (3,), 284: (2,), 322: (48,), 323: (32,)}
    offsets = tuple(8 + 48 * 32 * number for number in range(12))
    assert distance(decode(tiff(tags | {324: offsets, 325: (48 * 32,) * 12}, tiles)), photo()) == 0


def test_what_follows_a_jpeg_s_end_is_none_of_its_picture() -> None:
    data = encode(photo(), "JPEG")
    film = random.Random(0).randbytes(8 * 2**20)
    assert film.count(b"\xff\xda") > 100
    assert decode(data + film).image.tobytes() == decode(data).image.tobytes()


@pytest.mark.parametrize(
    "between",
    [
        b"",
        b"\xff\xfe\x00\x06\xff\xd9\xff\xd9",  # a comment
        b"\xff\xff\xff\xc4\x00\x15\x00" + b"\xff\xd9" + bytes(16),  # fill bytes; a segment of tables
        b"\xff\x05\xff\xd3\xff\x00",
    ],
)
def test_a_jpeg_of_more_scans_than_an_honest_one_has_is_refused(between: bytes) -> None:
    data = encode(photo(), "JPEG", progressive=True)
    scans = data.count(b"\xff\xda")
    last = data[data.rindex(b"\xff\xda") : -2]
    head = data[:-2] + between
    assert pixels_only(head + last * (100 - scans) + b"\xff\xd9", "JPEG")
    with pytest.raises(ContainerError, match="scans"):
        pixels_only(head + last * (101 - scans) + b"\xff\xd9", "JPEG")
    if not between:
        assert distance(decode(data[:-2] + last * (100 - scans) + b"\xff\xd9"), photo()) < 12
    assert refused(head + last * (101 - scans) + b"\xff\xd9") == "truncated"


def test_the_scans_of_a_jpeg_are_limited_by_its_pixels_and_by_how_often_it_is_decoded() -> None:
    data = encode(photo(256, 256), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]

    def of(scans: int) -> bytes:
        made = data[:-2] + last * (scans - data.count(b"\xff\xda")) + b"\xff\xd9"
        assert jpeg_scans(made) == scans
        return made

    assert decode(of(15), ImageLimits(max_pixels=65_536)).width == 256
    assert refused(of(16), max_pixels=65_536) == "too_many_pixels"
    cut_off = of(10)[:-1]
    assert decode(cut_off, ImageLimits(max_pixels=131_072)).width == 256
    assert refused(of(11)[:-1], max_pixels=131_072) == "truncated"
    assert refused(cut_off, max_pixels=131_071) == "truncated"


def test_a_run_of_fill_bytes_in_a_jpeg_is_skipped_in_one_step() -> None:
    class Counted(bytes):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            Counted.reads += 1
            return super().__getitem__(index)

    jpeg = encode(photo(), "JPEG", exif=b"Exif\0\0II*\0")
    assert read_metadata(Counted(jpeg[:2] + b"\xff" * 100_000 + jpeg[2:]), "JPEG").exif == b"II*\0"
    assert Counted.reads < 100


def test_an_avif_whose_stream_is_larger_than_it_states_is_refused() -> None:
    data = encode(Image.new("RGBA", (1000, 1000), (9, 80, 200, 40)), "AVIF")
    at = data.index(b"ispe") + 8
    assert data[at : at + 8] == struct.pack(">2I", 1000, 1000)
    small = data[:at] + struct.pack(">2I", 64, 64) + data[at + 8 :]
    assert refused(small, max_pixels=100_000) == "too_many_pixels"
    assert refused(small, max_pixels=999_999) == "too_many_pixels"
    assert decode(data, ImageLimits(max_pixels=1_000_000)).width == 1000
    assert av1_sizes(data) == [(1000, 1000)] * 2


def test_the_streams_of_an_animated_avif_are_its_pictures_and_its_film_s_first() -> None:
    frames = [Image.new("RGBA", (320, 200), (shade, 0, 0, shade)) for shade in (50, 100, 150)]
    data = encode(frames[0], "AVIF", save_all=True, append_images=frames[1:])
    assert av1_sizes(data) == [(320, 200)] * 4
    film = data.replace(b"meta", b"free", 1)
    assert av1_sizes(film) == [(320, 200)] * 2
    with pytest.raises(ContainerError, match="no AV1 stream"):
        av1_sizes(film.replace(b"moov", b"free"))


def box(kind: bytes, body: bytes, long: bool = False) -> bytes:
    if long:
        return struct.pack(">I4sQ", 1, kind, 16 + len(body)) + body
    return struct.pack(">I4s", 8 + len(body), kind) + body


def avif_of_streams(*headers: str, long: bool = False) -> bytes:
    """An AVIF without pixels: an item for each AV1 sequence header, given in bits, all of them in the `meta` box."""
    infes, places, idat = b"", b"", b""
    for number, spaced in enumerate(headers, 1):
        bits = spaced.replace(" ", "") + "1"
        header = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
        stream = b"\x12\x00" + b"\x0e\x00" + bytes([len(header)]) + header  # a delimiter; the header, with an extension
        infes += box(b"infe", b"\2\0\0\0" + struct.pack(">HH4s", number, 0, b"av01") + b"\0")
        places += struct.pack(">5H", number, 1, 0, 2, len(idat)) + bytes([2])
        places += struct.pack(">HB", len(idat) + 2, len(stream) - 2)
        idat += stream
    iinf = box(b"iinf", bytes(4) + struct.pack(">H", len(headers)) + infes, long)
    iloc = box(b"iloc", b"\1\0\0\0" + bytes([0x21, 0]) + struct.pack(">H", len(headers)) + places, long)
    meta = box(b"meta", bytes(4) + iinf + iloc + box(b"idat", idat, long), long)
    return box(b"ftyp", b"avif" + bytes(4) + b"avifmif1") + meta


def av1_header(width: int, height: int, before: str = "000 1 1 00000") -> str:
    """The bits of an AV1 sequence header, by default a reduced one of a still picture, up to its size."""
    return before + "1111" + "1011" + f"{width - 1:016b}" + f"{height - 1:012b}"


@pytest.mark.parametrize("long", [False, True])
def test_the_size_of_each_av1_stream_is_read(long: bool) -> None:
    timing = "1" + "0" * 64 + "1 0001 010" + "1 01001" + "1" * 32 + "00101 00111"
    points = "1 00001" + "1" * 12 + "01001 1 1" + "0" * 21 + "1 1111" + "0" * 12 + "00100 0 0"
    full = "000 0 0" + timing + points
    plain = "000 0 0 0 0 00000" + "0" * 12 + "01000 1"
    headers = av1_header(300, 200), av1_header(65536, 4096, full), av1_header(17, 4000, plain)
    assert av1_sizes(avif_of_streams(*headers, long=long)) == [(300, 200), (65536, 4096), (17, 4000)]


def test_the_tiles_of_an_avif_are_limited_each_and_together() -> None:
    assert refused(avif_of_streams(av1_header(64, 64), av1_header(300, 301)), max_pixels=90_000) == "too_many_pixels"
    tiles = [av1_header(300, 300)] * 5
    assert refused(avif_of_streams(*tiles), max_pixels=90_000) == "too_many_pixels"
    assert refused(avif_of_streams(*tiles), max_pixels=112_500) == "truncated"  # there are no pixels
    assert refused(avif_of_streams(av1_header(300, 300)[:22])) == "truncated"


def test_a_text_bomb_in_a_png_costs_nothing() -> None:
    data = encode(photo(), "PNG")
    body = b"k\0\0" + zlib.compress(bytes(20_000_000), 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    assert distance(decode(data[:33] + chunk * 20 + data[33:]), photo()) == 0


def test_threads_do_not_disturb_each_other() -> None:
    files = [encode(photo(200 + 8 * number, 160), picture_format) for number, picture_format in enumerate(FORMATS)]
    start = threading.Barrier(8)

    def work(_: int) -> list[int]:
        start.wait()
        return [decode(data).width for data in files * 5]

    with ThreadPoolExecutor(8) as pool:
        assert all(widths == [200, 208, 216, 224, 232, 240] * 5 for widths in pool.map(work, range(8)))
