"""The seven picture containers: which one a file is, what lies in it beside the pixels, and the file without that.

In: the bytes of a file. Out: its format by content (`sniff`), its metadata blocks (`read_metadata`), or a copy that
holds only what a decoder needs (`pixels_only`). JPEG, PNG, WebP and GIF are walked here; `tiff` and `bmff` are
structures of their own.

Two readers need this. Provenance looks at nothing but metadata. The decoder must not look at it at all: metadata is
where a hostile file hurts a decoder (a TIFF directory of 60,000 entries that all point to the same 20 MB, a GIF comment
in 80,000 pieces, an EXIF block that is garbage around a sound photo), and no pixel depends on it.

Every walk is linear, bounded in steps and in what it keeps. Knows no pixels, no Pillow and no HTTP.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Literal

from deployments.bmff import bmff_metadata, bmff_pixels
from deployments.metadata import MAX_BLOCK_BYTES, ContainerError, Metadata
from deployments.tiff import tiff_metadata, tiff_pixels

Format = Literal["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "HEIC"]
FORMATS: tuple[Format, ...] = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "HEIC")

_MAX_STEPS = 20_000  # blocks of one file that a walk looks at; 20 MiB of PNG in 8 KiB pieces has 2,560
#: A progressive JPEG has about ten scans. Each costs a pass over all pixels, so thousands of tiny ones stall a decoder,
#: and dozens one of a large picture (`images` limits what they come to).
_MAX_JPEG_SCANS = 100
_MAX_GIF_SUB_BLOCKS = 200_000  # of at most 255 bytes: 20 MiB have 82,241
_MAX_TEXTS = 64

_HEIC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"mif2"))
_AVIF_BRANDS = frozenset((b"avif", b"avis"))


def sniff(data: bytes) -> Format | None:
    """The format by content, or None when it is none of the seven. A file's name and declared type are never asked."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data[4:8] == b"ftyp":
        size = min(int.from_bytes(data[:4], "big"), 512)
        brands = [data[8:12], *(data[at : at + 4] for at in range(16, size - 3, 4))]
        # `mif1` says only "a picture of some codec": the other brands decide, AVIF first.
        if not _AVIF_BRANDS.isdisjoint(brands):
            return "AVIF"
        if not _HEIC_BRANDS.isdisjoint(brands):
            return "HEIC"
    return None


def pixels_only(data: bytes, picture_format: Format) -> bytes:
    """The same picture without metadata, first frame only where that is a matter of copying (GIF).

    Raises:
        ContainerError: the structure cannot be followed, or has more parts than an honest file has.
    """
    if picture_format == "JPEG":
        return _jpeg_pixels(data)
    if picture_format == "PNG":
        return _png_pixels(data)
    if picture_format == "GIF":
        return _gif_pixels(data)
    if picture_format == "TIFF":
        return tiff_pixels(data)
    if picture_format in ("AVIF", "HEIC"):
        return bmff_pixels(data)
    return data  # WebP: its decoder hands metadata over unread


def read_metadata(data: bytes, picture_format: Format) -> Metadata:
    """The metadata blocks of a file. Damage ends the walk early: what was found until then is returned.

    A file of more parts than an honest one has is said to have no C2PA block; `pixels_only` refuses it anyway.
    """
    readers = {"JPEG": _jpeg_metadata, "PNG": _png_metadata, "WEBP": _webp_metadata, "GIF": _gif_metadata}
    if picture_format == "TIFF":
        return tiff_metadata(data)
    return readers.get(picture_format, bmff_metadata)(data)


# ---------------------------------------------------------------------------------------------------------------- JPEG


_JPEG_MARKER = re.compile(rb"\xff[^\xff]")  # any number of FF may come before it
#: A marker that begins a segment or ends the picture: within a scan, what is no stuffing, no filling and no restart.
_JPEG_MARKER_OF_SCANS = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment before the scan data; then (0xDA, start, length of the file)."""
    at = 2
    for _ in range(_MAX_STEPS):
        found = _JPEG_MARKER.search(data, at)
        if found is None or found.start() + 4 > len(data):
            return
        at = found.start()
        marker = data[at + 1]
        if marker == 0xDA:
            yield marker, at, len(data)
            return
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            at += 2
            continue
        if marker == 0xD9:
            return
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if end < at + 4 or end > len(data):
            return
        yield marker, at, end
        at = end
    raise ContainerError("more segments than an honest JPEG has")


def jpeg_scans(data: bytes) -> int:
    """How many scans a JPEG has.

    Raises:
        ContainerError: more than an honest one.
    """
    return sum(_jpeg_scans(data, start)[0] for marker, start, _ in _jpeg_segments(data) if marker == 0xDA)


def _jpeg_scans(data: bytes, start: int) -> tuple[int, int]:
    """How many scans there are, of which the first begins at `start`, and where they end: after the end marker, or with
    a file that lacks it.

    What follows is none of the picture's: a phone's Motion Photo has a film there.
    """
    at, scans = start, 0
    for _ in range(_MAX_STEPS):
        found = _JPEG_MARKER_OF_SCANS.search(data, at)
        if found is None:
            return scans, len(data)
        at = found.end()
        marker = data[at - 1]
        if marker == 0xD9:
            return scans, at
        scans += marker == 0xDA
        if scans > _MAX_JPEG_SCANS:
            raise ContainerError("more scans than an honest JPEG has")
        at += max(2, int.from_bytes(data[at : at + 2], "big"))  # as libjpeg skips a length below its own two bytes
    raise ContainerError("more segments than an honest JPEG has")


def _jpeg_pixels(data: bytes) -> bytes:
    parts = [data[:2]]
    for marker, start, end in _jpeg_segments(data):
        if marker == 0xDA:
            _, end = _jpeg_scans(data, start)
        body = data[start + 4 : start + 10]
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        # JFIF and Adobe say how to read the colours; all other application segments are metadata.
        if not is_metadata or (marker == 0xE0 and body[:4] == b"JFIF") or (marker == 0xEE and body[:5] == b"Adobe"):
            parts.append(data[start:end])
    return b"".join(parts)


def _jpeg_metadata(data: bytes) -> Metadata:
    exif = xmp = None
    c2pa = False
    try:
        for marker, start, end in _jpeg_segments(data):
            if marker == 0xE1:
                body = data[start + 4 : end]
                if exif is None and body.startswith(b"Exif\0"):
                    exif = body[6:]
                elif xmp is None and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                    xmp = body[29:]
            elif marker == 0xEB and data[start + 4 : start + 6] == b"JP":
                c2pa = c2pa or b"c2pa" in data[start:end]
    except ContainerError:
        c2pa = False
    return Metadata(exif, xmp, (), c2pa)


# ----------------------------------------------------------------------------------------------------------------- PNG


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start of the chunk, end of the chunk); the end lies beyond the file when the last chunk is cut off."""
    at = 8
    for _ in range(_MAX_STEPS):
        if at + 8 > len(data):
            return
        kind = data[at + 4 : at + 8]
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield kind, at, end
        if kind == b"IEND" or end > len(data):
            return
        at = end
    raise ContainerError("more chunks than an honest PNG has")


def _png_pixels(data: bytes) -> bytes:
    keep = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
    return b"".join([data[:8], *(data[start:end] for kind, start, end in _png_chunks(data) if kind in keep)])


def _png_metadata(data: bytes) -> Metadata:
    exif = xmp = None
    texts: list[tuple[str, str]] = []
    c2pa = False
    try:
        for kind, start, end in _png_chunks(data):
            if end > len(data):
                break
            if kind == b"eXIf" and exif is None:
                exif = data[start + 8 : end - 4][:MAX_BLOCK_BYTES].removeprefix(b"Exif\0\0")
            elif kind == b"caBX":
                c2pa = True
            elif kind in (b"tEXt", b"zTXt", b"iTXt") and len(texts) < _MAX_TEXTS:
                keyword, value = _png_text(kind, data[start + 8 : end - 4])
                if keyword == b"XML:com.adobe.xmp":
                    xmp = value if xmp is None else xmp
                else:
                    encoding = "utf-8" if kind == b"iTXt" else "latin-1"
                    texts.append((keyword.decode("latin-1"), value.decode(encoding, "replace")))
    except ContainerError:
        c2pa = False
    return Metadata(exif, xmp, tuple(texts), c2pa)


def _png_text(kind: bytes, body: bytes) -> tuple[bytes, bytes]:
    """Keyword and value of a text chunk; a compressed value that cannot be read is empty."""
    keyword, _, rest = body.partition(b"\0")
    compressed = kind == b"zTXt"
    if kind == b"zTXt":
        rest = rest[1:]
    elif kind == b"iTXt":
        compressed = rest[:1] == b"\1"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    if compressed:
        try:
            rest = zlib.decompressobj().decompress(rest, MAX_BLOCK_BYTES)
        except zlib.error:
            rest = b""
    return keyword[:79], rest[:MAX_BLOCK_BYTES]


# ---------------------------------------------------------------------------------------------------------------- WebP


def _webp_metadata(data: bytes) -> Metadata:
    exif = xmp = None
    c2pa = False
    at = 12
    for _ in range(_MAX_STEPS):
        if at + 8 > len(data):
            break
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        body = data[at + 8 : at + 8 + min(size, MAX_BLOCK_BYTES)] if kind in (b"EXIF", b"XMP ") else b""
        if kind == b"EXIF" and exif is None:
            exif = body.removeprefix(b"Exif\0\0")
        elif kind == b"XMP " and xmp is None:
            xmp = body
        elif kind == b"C2PA":
            c2pa = True
        at += 8 + size + (size & 1)
    return Metadata(exif, xmp, (), c2pa)


# ----------------------------------------------------------------------------------------------------------------- GIF


def _gif_blocks(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(kind, start, end): kind is the label of an extension, or 0x2C for the first frame, with which the walk ends.

    The end of a block that is cut off is the end of the file.
    """
    at = _gif_header_bytes(data)
    sub_blocks = 0
    for _ in range(_MAX_STEPS):
        start = at
        if data[at : at + 1] == b"\x21":
            kind, at = 0x21, at + 2
        elif data[at : at + 1] == b"\x2c" and at + 10 <= len(data):
            flags = data[at + 9]
            kind, at = 0x2C, at + 11 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
        else:
            return
        while at < len(data) and data[at]:
            at += 1 + data[at]
            sub_blocks += 1
            if sub_blocks > _MAX_GIF_SUB_BLOCKS:
                raise ContainerError("more blocks than an honest GIF has")
        at = min(at + 1, len(data))
        if kind == 0x2C:
            yield 0x2C, start, at
            return
        if start + 1 < len(data):
            yield data[start + 1], start, at
    raise ContainerError("more blocks than an honest GIF has")


def _gif_header_bytes(data: bytes) -> int:
    """Length of the header with its colour table; may lie beyond a file that is cut off."""
    return 13 + (3 << ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 0x80 else 0)


def _gif_pixels(data: bytes) -> bytes:
    parts = [data[: _gif_header_bytes(data)]]
    control = b""
    for kind, start, end in _gif_blocks(data):
        if kind == 0xF9 and end - start == 8:
            # What happens to the frame after it was shown concerns no first frame, and costs the decoder a canvas.
            control = data[start : start + 3] + bytes([data[start + 3] & 0x01]) + data[start + 4 : end]
        elif kind == 0x2C:
            return b"".join([*parts, control, data[start:end], b";"])
    raise ContainerError("no frame")


def _gif_metadata(data: bytes) -> Metadata:
    texts: list[tuple[str, str]] = []
    xmp = None
    c2pa = False
    try:
        for kind, start, end in _gif_blocks(data):
            if kind == 0xFE and len(texts) < _MAX_TEXTS:
                texts.append(("Comment", data[start + 3 : min(end, start + 258)].decode("utf-8", "replace")))
            elif kind == 0xFF and data[start + 3 : start + 14] == b"XMP DataXMP" and xmp is None:
                # XMP is laid in unframed, followed by a "magic trailer" that leads any sub-block walk to its end.
                xmp = data[start + 14 : min(end, start + 14 + MAX_BLOCK_BYTES)]
            elif kind == 0xFF and data[start + 3 : start + 11] == b"C2PA_GIF":
                c2pa = True
    except ContainerError:
        c2pa = False
    return Metadata(None, xmp, tuple(texts), c2pa)
