"""The seven picture containers: which one a file is, what lies in it beside the pixels, and the file without that.

In: the bytes of a file. Out: its format by content (`sniff`), its metadata blocks (`read_metadata`, `read_exif`), or a
copy that holds only what a decoder needs (`pixels_only`).

Two readers need this. Provenance looks at nothing but metadata. The decoder must not look at it at all: metadata is
where a hostile file hurts a decoder (a TIFF directory of 60,000 entries that all point to the same 20 MB, a GIF comment
in 80,000 pieces, an EXIF block that is garbage around a sound photo), and no pixel depends on it.

Every walk is linear, bounded in steps and in what it keeps. Knows no pixels, no Pillow and no HTTP.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Format = Literal["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "HEIC"]
FORMATS: tuple[Format, ...] = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "HEIC")

_MAX_STEPS = 20_000  # blocks of one file that a walk looks at; 20 MiB of PNG in 8 KiB pieces has 2,560
_MAX_BOXES = 2048  # of an AVIF or HEIC; a picture of 48 megapixels in tiles has some 300
_MAX_GIF_SUB_BLOCKS = 200_000  # of at most 255 bytes: 20 MiB have 82,241
_MAX_BLOCK_BYTES = 1 << 20  # of one metadata block that is kept
_MAX_TEXTS = 64
_MAX_IFD_ENTRIES = 512

_HEIC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"mif2"))
_AVIF_BRANDS = frozenset((b"avif", b"avis"))
#: Boxes made of boxes, and how many bytes come before the first of these.
_BOXES_OF_BOXES = dict.fromkeys(
    (
        b"moov",
        b"trak",
        b"edts",
        b"mdia",
        b"minf",
        b"dinf",
        b"stbl",
        b"mvex",
        b"moof",
        b"traf",
        b"mfra",
        b"schi",
        b"sinf",
        b"udta",
        b"iprp",
        b"ipco",
    ),
    8,
) | {b"meta": 12, b"iinf": 14, b"dref": 16, b"stsd": 16, b"iref": 12}
_C2PA_UUID = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")

EXIF_DESCRIPTION, EXIF_MAKE, EXIF_MODEL, EXIF_ORIENTATION = 0x010E, 0x010F, 0x0110, 0x0112
EXIF_SOFTWARE, EXIF_ARTIST, EXIF_COPYRIGHT, EXIF_USER_COMMENT = 0x0131, 0x013B, 0x8298, 0x9286
_EXIF_TEXTS = frozenset(
    (EXIF_DESCRIPTION, EXIF_MAKE, EXIF_MODEL, EXIF_SOFTWARE, EXIF_ARTIST, EXIF_COPYRIGHT, EXIF_USER_COMMENT)
)
_EXIF_IFD_POINTER, _TIFF_XMP, _TIFF_C2PA = 0x8769, 0x02BC, 0xCD41

#: The TIFF tags that pixels depend on. Orientation is not one of them: it is applied afterwards, alike for all formats.
_TIFF_PIXEL_TAGS = frozenset(
    (
        254,
        256,
        257,
        258,
        259,
        262,
        266,
        273,
        277,
        278,
        279,
        284,
        292,
        293,
        317,
        320,
        321,
        322,
        323,
        324,
        325,
        332,
        338,
        339,
        347,
        529,
        530,
        531,
        532,
    )
)
_TIFF_TYPE_BYTES = {
    kind: size
    for size, kinds in ((1, (1, 2, 6, 7)), (2, (3, 8)), (4, (4, 9, 11, 13)), (8, (5, 10, 12, 16, 17, 18)))
    for kind in kinds
}


class ContainerError(ValueError):
    """The container itself is broken or hostile: no decoder should be asked."""


@dataclass(frozen=True)
class Metadata:
    """What a file carries beside its pixels. Values are as they stand in the file, at most 1 MiB each."""

    exif: bytes | None = None
    """A TIFF structure, without the `Exif` prefix."""
    xmp: bytes | None = None
    texts: tuple[tuple[str, str], ...] = field(default=())
    """(keyword, value) of PNG text chunks and GIF comments, at most 64."""
    c2pa: bool = False
    """There is a C2PA block; whether it is sound is another question."""


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
        return _tiff_pixels(data)
    if picture_format in ("AVIF", "HEIC"):
        return _bmff_pixels(data)
    return data  # WebP: its decoder hands metadata over unread


def read_metadata(data: bytes, picture_format: Format) -> Metadata:
    """The metadata blocks of a file. Damage ends the walk early: what was found until then is returned.

    A file of more parts than an honest one has is said to have no C2PA block; `pixels_only` refuses it anyway.
    """
    readers = {"JPEG": _jpeg_metadata, "PNG": _png_metadata, "WEBP": _webp_metadata, "GIF": _gif_metadata}
    if picture_format == "TIFF":
        return _tiff_metadata(data)
    return readers.get(picture_format, _bmff_metadata)(data)


def read_exif(block: bytes) -> dict[int, str | int]:
    """Orientation (int) and the text tags of an EXIF block or TIFF file: IFD0 and its EXIF IFD, nothing else.

    Garbage gives an empty or partial answer, never an error.
    """
    tags: dict[int, str | int] = {}
    try:
        directory = _Ifd.first(block)
        pointer = _collect_exif(directory, tags)
        if pointer:
            _collect_exif(_Ifd(block, directory.order, pointer, directory.big), tags)
    except (ContainerError, struct.error):
        pass
    return tags


# ---------------------------------------------------------------------------------------------------------------- JPEG


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment before the scan data; then (0xDA, start, length of the file)."""
    at = 2
    for _ in range(_MAX_STEPS):
        at = data.find(b"\xff", at)
        while at >= 0 and data[at + 1 : at + 2] == b"\xff":
            at += 1
        if at < 0 or at + 4 > len(data):
            return
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


def _jpeg_pixels(data: bytes) -> bytes:
    parts = [data[:2]]
    for marker, start, end in _jpeg_segments(data):
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
                exif = data[start + 8 : end - 4][:_MAX_BLOCK_BYTES].removeprefix(b"Exif\0\0")
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
            rest = zlib.decompressobj().decompress(rest, _MAX_BLOCK_BYTES)
        except zlib.error:
            rest = b""
    return keyword[:79], rest[:_MAX_BLOCK_BYTES]


# ---------------------------------------------------------------------------------------------------------------- WebP


def _webp_metadata(data: bytes) -> Metadata:
    exif = xmp = None
    c2pa = False
    at = 12
    for _ in range(_MAX_STEPS):
        if at + 8 > len(data):
            break
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        body = data[at + 8 : at + 8 + min(size, _MAX_BLOCK_BYTES)] if kind in (b"EXIF", b"XMP ") else b""
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
                xmp = data[start + 14 : min(end, start + 14 + _MAX_BLOCK_BYTES)]
            elif kind == 0xFF and data[start + 3 : start + 11] == b"C2PA_GIF":
                c2pa = True
    except ContainerError:
        c2pa = False
    return Metadata(None, xmp, tuple(texts), c2pa)


# ---------------------------------------------------------------------------------------------------------------- TIFF


class _Ifd:
    """One directory of a TIFF structure: (tag, type, count, raw entry) of each entry, values read on demand."""

    def __init__(self, data: bytes, order: str, offset: int, big: bool) -> None:
        self.data, self.order, self.big = data, order, big
        head = "Q" if big else "H"
        if offset < 8 or offset + struct.calcsize(order + head) > len(data):
            raise ContainerError("a TIFF directory outside the file")
        (count,) = struct.unpack_from(order + head, data, offset)
        if count > _MAX_IFD_ENTRIES:
            raise ContainerError("more TIFF tags than an honest picture has")
        self.entry_bytes = 20 if big else 12
        start = offset + struct.calcsize(order + head)
        raw = data[start : start + count * self.entry_bytes]
        if len(raw) < count * self.entry_bytes:
            raise ContainerError("a TIFF directory outside the file")
        layout = order + ("HHQ" if big else "HHI")
        self.entries = [
            (*struct.unpack_from(layout, raw, at), raw[at : at + self.entry_bytes])
            for at in range(0, len(raw), self.entry_bytes)
        ]

    @classmethod
    def first(cls, data: bytes) -> _Ifd:
        """The first directory. Raises ContainerError or struct.error when there is none."""
        order = {b"II": "<", b"MM": ">"}.get(data[:2])
        if order is None or len(data) < 8:
            raise ContainerError("no TIFF structure")
        version = struct.unpack_from(order + "H", data, 2)[0]
        if version == 42:
            return cls(data, order, struct.unpack_from(order + "I", data, 4)[0], False)
        if version == 43:
            return cls(data, order, struct.unpack_from(order + "Q", data, 8)[0], True)
        raise ContainerError("no TIFF structure")

    def value(self, kind: int, count: int, raw: bytes, limit: int) -> bytes:
        """The bytes of a value, at most `limit`; empty when they lie outside the file."""
        size = _TIFF_TYPE_BYTES.get(kind, 0) * count
        inline = raw[12:] if self.big else raw[8:]
        if size <= len(inline):
            return inline[:size]
        offset = struct.unpack(self.order + ("Q" if self.big else "I"), inline)[0]
        return self.data[offset : offset + min(size, limit)]

    def number(self, kind: int, count: int, raw: bytes) -> int | None:
        """The first number of a value of type SHORT, LONG, IFD or LONG8."""
        code = {3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}.get(kind)
        value = self.value(kind, count, raw, 8)
        if code is None or len(value) < struct.calcsize(self.order + code):
            return None
        return int(struct.unpack_from(self.order + code, value)[0])


def _collect_exif(directory: _Ifd, tags: dict[int, str | int]) -> int | None:
    """Adds a directory's tags of interest to `tags`; returns the offset of the EXIF directory that it points to."""
    pointer = None
    for tag, kind, count, raw in directory.entries:
        if tag == _EXIF_IFD_POINTER:
            pointer = directory.number(kind, count, raw)
        elif tag == EXIF_ORIENTATION:
            orientation = directory.number(kind, count, raw)
            if orientation is not None:
                tags.setdefault(tag, orientation)
        elif tag in _EXIF_TEXTS and kind in (1, 2, 7):
            tags.setdefault(tag, _exif_text(directory.value(kind, count, raw, 8192), directory.order))
    return pointer


def _exif_text(value: bytes, order: str) -> str:
    """A text value; a user comment starts with eight bytes that name its character code (Exif 2.32, 4.6.5)."""
    if value.startswith(b"UNICODE\0"):
        body = value[8:]
        # The standard leaves the byte order open: the file's own unless every other byte tells otherwise.
        little = order == "<" if body.count(0, 0, 256) == 0 else body[1:256:2].count(0) >= body[0:256:2].count(0)
        return body.decode("utf-16-le" if little else "utf-16-be", "replace").split("\0")[0]
    if value.startswith((b"ASCII\0\0\0", b"\0\0\0\0\0\0\0\0")):
        value = value[8:]
    return value.split(b"\0")[0].decode("utf-8", "replace")


def _tiff_pixels(data: bytes) -> bytes:
    """The file with a new first directory, at its end, that lists only what pixels depend on and has no successor."""
    try:
        directory = _Ifd.first(data)
    except struct.error:
        raise ContainerError("cut off in its header") from None
    kept, seen, total = [], set(), 0
    for tag, kind, count, raw in directory.entries:
        if tag in _TIFF_PIXEL_TAGS and tag not in seen:
            seen.add(tag)
            kept.append((tag, raw))
            total += _TIFF_TYPE_BYTES.get(kind, 0) * count
    # Values of an honest file do not overlap. A reader copies each of them: together they may not exceed the file.
    if total > len(data):
        raise ContainerError("TIFF tags larger than the file")
    order, big = directory.order, directory.big
    offset = len(data) + (len(data) & 1)
    header = data[:8] + struct.pack(order + "Q", offset) if big else data[:4] + struct.pack(order + "I", offset)
    count_and_entries = struct.pack(order + ("Q" if big else "H"), len(kept)) + b"".join(raw for _, raw in sorted(kept))
    return b"".join(
        [header, data[len(header) :], b"\0" * (len(data) & 1), count_and_entries, b"\0" * (8 if big else 4)]
    )


def _tiff_metadata(data: bytes) -> Metadata:
    try:
        directory = _Ifd.first(data)
    except (ContainerError, struct.error):
        return Metadata()
    xmp = None
    c2pa = False
    for tag, kind, count, raw in directory.entries:
        if tag == _TIFF_XMP and xmp is None:
            xmp = directory.value(kind, count, raw, _MAX_BLOCK_BYTES)
        c2pa = c2pa or tag == _TIFF_C2PA
    return Metadata(data, xmp, (), c2pa)


# -------------------------------------------------------------------------------------------- ISO BMFF: AVIF and HEIC


def _bmff_boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of the boxes between two positions, the whole file unless told otherwise."""
    at, stop = start, len(data) if end is None else end
    for _ in range(_MAX_BOXES):
        if at + 8 > stop:
            return
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        after = stop if size == 0 else at + size
        if after < at + 8:
            return
        yield kind, at, min(after, stop)
        at = after
    raise ContainerError("more boxes than an honest file has")


def _count_boxes(data: bytes) -> int:
    """Number of boxes in a file, those within boxes included; of more than `_MAX_BOXES` it counts a few more at most.

    Raises:
        ContainerError: far too many.
    """
    count = 0
    inside = [(0, len(data))]
    while inside and count <= _MAX_BOXES:
        for kind, start, end in _bmff_boxes(data, *inside.pop()):
            count += 1
            if kind in _BOXES_OF_BOXES:
                inside.append((start + _BOXES_OF_BOXES[kind], end))
    return count


def _bmff_pixels(data: bytes) -> bytes:
    """The file with its EXIF items renamed, so that no decoder takes them for EXIF.

    Rotation and mirroring are properties of their own in this container (`irot`, `imir`); EXIF is only a copy.
    """
    if _count_boxes(data) > _MAX_BOXES:
        raise ContainerError("more boxes than an honest file has")
    for kind, start, end in _bmff_boxes(data):
        if kind == b"meta":
            return data[:start] + data[start:end].replace(b"Exif", b"exif") + data[end:]
    return data


def _bmff_metadata(data: bytes) -> Metadata:
    try:
        # C2PA's reader takes time that grows with the square of the number of boxes.
        boxes = list(_bmff_boxes(data)) if _count_boxes(data) <= _MAX_BOXES else []
    except ContainerError:
        boxes = []
    c2pa = any(kind == b"uuid" and data[at + 8 : at + 24] == _C2PA_UUID for kind, at, _ in boxes)
    exif = xmp = None
    # Items lie anywhere in the file by offset tables; their own signatures are found faster than the tables are read.
    starts = [at for at in (data.find(b"II*\0\x08\0\0\0"), data.find(b"MM\0*\0\0\0\x08")) if at >= 0]
    if starts:
        exif = data[min(starts) : min(starts) + _MAX_BLOCK_BYTES]
    at = data.find(b"<x:xmpmeta")
    if at >= 0:
        xmp = data[at : at + _MAX_BLOCK_BYTES]
    return Metadata(exif, xmp, (), c2pa)
