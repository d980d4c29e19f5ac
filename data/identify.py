"""Validates one picture and takes its particulars: bytes in, `Particulars` or the reason to leave it out.

A picture is valid if the decoder that serves (`deployments.images`) takes it within the limits. It is decoded once;
everything else is read off that and off the file's header. Knows no files, no labels and no Ray.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
from PIL import Image

from data.splits import perceptual_hash
from deployments.annotation import Provenance
from deployments.images import ImageLimits, decode
from deployments.provenance import read_provenance

#: Luminance table of ITU-T T.81, annex K.1, row by row; libjpeg scales it by quality.
_LUMINANCE = np.array(
    (
        (16, 11, 10, 16, 24, 40, 51, 61),
        (12, 12, 14, 19, 26, 58, 60, 55),
        (14, 13, 16, 24, 40, 57, 69, 56),
        (14, 17, 22, 29, 51, 87, 80, 62),
        (18, 22, 37, 56, 68, 109, 103, 77),
        (24, 35, 55, 64, 81, 104, 113, 92),
        (49, 64, 78, 87, 103, 121, 120, 101),
        (72, 92, 95, 98, 112, 100, 103, 99),
    )
)
_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_DQT, _SOS = 0xDB, 0xDA
_MAX_SEGMENTS = 4096
_PAIRS = 512
_PIXELS_AT_ONCE = 128 * _PAIRS
_RGB = np.uint32(0xFFFFFF)


@dataclass(frozen=True)
class Particulars:
    """What a picture is, without its pixels."""

    id: str
    """sha256 of the bytes, hexadecimal."""
    width: int
    """Pixels of the upright picture; `height` alike."""
    height: int
    format: str
    mode: str
    """Pillow's name for how pixels are stored: `RGB`, `L`, `CMYK`, `P`, ..."""
    bytes: int
    jpeg_quality: int | None
    quantisation: str | None
    declared: list[str]
    phash: str
    pixels: str
    """Digest of the decoded pixels. With `phash` and size it tells whether two files show the very same picture."""


def identify(data: bytes, limits: ImageLimits) -> Particulars:
    """The particulars of a picture that decodes fully.

    Raises:
        ImageError: it is none that the service would take, or smaller or larger than the limits.
    """
    picture = decode(data, limits)
    quality, quantisation, mode = None, None, None
    if picture.format == "JPEG":
        tables, components = read_jpeg_header(data)
        mode = _JPEG_MODES.get(components)
        if tables:
            quantisation = hashlib.sha256(b"".join(tables)).hexdigest()[:16]
            quality = jpeg_quality(tables[0])
    return Particulars(
        id=picture.sha256,
        width=picture.width,
        height=picture.height,
        format=picture.format,
        mode=mode or _stored_mode(data),
        bytes=len(data),
        jpeg_quality=quality,
        quantisation=quantisation,
        declared=_declared(read_provenance(data, picture.format)),
        phash=f"{perceptual_hash(picture.image):016x}",
        pixels=pixel_digest(picture.image),
    )


def pixel_digest(image: Image.Image) -> str:
    """16 hexadecimal digits over the pixels of an RGB picture.

    Sums of every 512th pair of pixels and a checksum of those, read where Pillow keeps them (four bytes a pixel):
    copying them out and a checksum of each byte takes a tenth of the whole time of `identify`. Not cryptographic, and
    need not be: equal size and perceptual hash are asked for as well.
    """
    try:
        memory = pa.array(image).values.buffers()[1]
    except ValueError:  # above 16 MiB Pillow keeps it in several pieces
        memory = image.tobytes("raw", "RGBX")
    pixels = np.frombuffer(memory, dtype="<u4", count=image.width * image.height)
    sums, part = np.zeros(_PAIRS, np.uint64), np.zeros(_PIXELS_AT_ONCE, np.uint32)
    for start in range(0, len(pixels), _PIXELS_AT_ONCE):  # which the processor's cache holds
        # the fourth byte is none of the picture's, and whatever made it left it as it liked
        count = len(np.bitwise_and(pixels[start : start + _PIXELS_AT_ONCE], _RGB, out=part[: len(pixels) - start]))
        part[count:] = 0
        sums += part.view(np.uint64).reshape(-1, _PAIRS).sum(axis=0)
    return f"{zlib.crc32(sums.data):08x}{zlib.adler32(sums.data):08x}"


def _stored_mode(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.mode
    except (OSError, ValueError, SyntaxError):
        return "RGB"  # Pillow has no plugin for HEIC by itself, and that is how it is decoded


def _declared(provenance: Provenance) -> list[str]:
    traces = [] if provenance.c2pa == "absent" else [f"c2pa:{provenance.c2pa}"]
    return traces + [f"{signal.kind}:{signal.name}={signal.value}" for signal in provenance.signals]


def read_jpeg_header(data: bytes) -> tuple[list[bytes], int]:
    """Quantisation tables in the order of their numbers, each as 64 values of 16 bits in zigzag order, and how many
    components the frame has (0: no frame found). ITU-T T.81, annex B.
    """
    tables: dict[int, bytes] = {}
    components, at = 0, 2
    for _ in range(_MAX_SEGMENTS):
        while at < len(data) - 3 and data[at] == 0xFF and data[at + 1] == 0xFF:
            at += 1  # fill bytes
        if at >= len(data) - 3 or data[at] != 0xFF or data[at + 1] == _SOS:
            break
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at + 4 : at + 2 + length]
        if marker == _DQT:
            while len(segment) >= 65:
                wide, number = segment[0] >> 4, segment[0] & 15
                size = 128 if wide else 64
                values = np.frombuffer(segment[1 : 1 + size], dtype=">u2" if wide else "u1")
                if len(values) < 64:
                    break
                tables[number] = values.astype(">u2").tobytes()
                segment = segment[1 + size :]
        elif marker in _FRAMES and len(segment) >= 6:
            components = segment[5]
        at += 2 + length
    return [tables[number] for number in sorted(tables)], components


@lru_cache(maxsize=1)
def _tables_by_quality() -> np.ndarray:
    """libjpeg's luminance table for qualities 1 to 100, ``(100, 64)`` in zigzag order (jcparam.c)."""
    diagonals = sorted(
        ((row, column) for row in range(8) for column in range(8)),
        key=lambda at: (at[0] + at[1], at[0] if (at[0] + at[1]) % 2 else at[1]),
    )
    zigzag = np.array([_LUMINANCE[at] for at in diagonals])
    quality = np.arange(1, 101)
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return np.clip((zigzag[None] * scale[:, None] + 50) // 100, 1, 255)


@lru_cache(maxsize=1024)
def jpeg_quality(table: bytes) -> int:
    """libjpeg's quality, 1 to 100, whose luminance table is nearest; exact for files that libjpeg wrote.

    Args:
        table: 64 values of 16 bits, big-endian, in zigzag order.
    """
    values = np.frombuffer(table, dtype=">u2").astype(np.int64)
    return int(np.abs(_tables_by_quality() - values).sum(axis=1).argmin()) + 1
