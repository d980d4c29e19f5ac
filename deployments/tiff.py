"""TIFF directories: a format of pictures, and the form of every EXIF block.

In: the bytes of a TIFF file or of an EXIF block. Out: the EXIF tags that anybody here asks for (`read_exif`), a file's
metadata, or a copy of it that lists only what pixels depend on. Garbage never raises anything but `ContainerError`.

Knows no other container and no pixels.
"""

from __future__ import annotations

import struct

from deployments.metadata import MAX_BLOCK_BYTES, ContainerError, Metadata

_MAX_ENTRIES = 512  # of one directory
_MAX_PARTS = 100_000  # strips or tiles of one picture: a reader makes an object of each

EXIF_DESCRIPTION, EXIF_MAKE, EXIF_MODEL, EXIF_ORIENTATION = 0x010E, 0x010F, 0x0110, 0x0112
EXIF_SOFTWARE, EXIF_ARTIST, EXIF_COPYRIGHT, EXIF_USER_COMMENT = 0x0131, 0x013B, 0x8298, 0x9286
_EXIF_TEXTS = frozenset(
    (EXIF_DESCRIPTION, EXIF_MAKE, EXIF_MODEL, EXIF_SOFTWARE, EXIF_ARTIST, EXIF_COPYRIGHT, EXIF_USER_COMMENT)
)
_EXIF_IFD_POINTER, _XMP, _C2PA = 0x8769, 0x02BC, 0xCD41

#: The TIFF tags that pixels depend on. Orientation is not one of them: it is applied afterwards, alike for all formats.
_PIXEL_TAGS = frozenset(
    (
        254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317,
        320, 321, 322, 323, 324, 325, 332, 338, 339, 347, 529, 530, 531, 532,
    )
)  # fmt: skip
_WIDTH, _HEIGHT, _SAMPLES_PER_PIXEL, _ROWS_PER_STRIP, _PLANAR_CONFIGURATION = 256, 257, 277, 278, 284
_TILE_WIDTH, _TILE_LENGTH = 322, 323
#: Strip offsets and byte counts, tile offsets and byte counts: one number for each part of the picture.
_PART_TAGS = frozenset((273, 279, 324, 325))
_TYPE_BYTES = {
    kind: size
    for size, kinds in ((1, (1, 2, 6, 7)), (2, (3, 8)), (4, (4, 9, 11, 13)), (8, (5, 10, 12, 16, 17, 18)))
    for kind in kinds
}


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


def tiff_pixels(data: bytes) -> bytes:
    """The file with a new first directory, at its end, that lists only what pixels depend on and has no successor.

    Raises:
        ContainerError: there is no directory, or one that no honest file has.
    """
    try:
        directory = _Ifd.first(data)
    except struct.error:
        raise ContainerError("cut off in its header") from None
    kept: dict[int, tuple[int, int, bytes]] = {}
    for tag, kind, count, raw in directory.entries:
        if tag in _PIXEL_TAGS:
            kept.setdefault(tag, (kind, count, raw))
    # Values of an honest file do not overlap. A reader copies each of them: together they may not exceed the file.
    if sum(_TYPE_BYTES.get(kind, 0) * count for kind, count, _ in kept.values()) > len(data):
        raise ContainerError("TIFF tags larger than the file")
    numbers = {tag: directory.number(*entry) for tag, entry in kept.items() if tag not in _PART_TAGS}
    if max((kept[tag][1] for tag in _PART_TAGS & kept.keys()), default=0) > min(_parts(numbers), _MAX_PARTS):
        raise ContainerError("more strips or tiles than the picture has")
    order, big = directory.order, directory.big
    offset = len(data) + (len(data) & 1)
    header = data[:8] + struct.pack(order + "Q", offset) if big else data[:4] + struct.pack(order + "I", offset)
    count_and_entries = struct.pack(order + ("Q" if big else "H"), len(kept))
    count_and_entries += b"".join(raw for _, (_, _, raw) in sorted(kept.items()))
    return b"".join(
        [header, data[len(header) :], b"\0" * (len(data) & 1), count_and_entries, b"\0" * (8 if big else 4)]
    )


def _parts(numbers: dict[int, int | None]) -> int:
    """Number of strips or tiles of a picture, of its tags' numbers; 0 of one without a size."""
    width, height = numbers.get(_WIDTH) or 0, numbers.get(_HEIGHT) or 0
    part_width = numbers.get(_TILE_WIDTH) or max(width, 1)
    part_height = numbers.get(_TILE_LENGTH) or numbers.get(_ROWS_PER_STRIP) or max(height, 1)
    planes = (numbers.get(_SAMPLES_PER_PIXEL) or 1) if numbers.get(_PLANAR_CONFIGURATION) == 2 else 1
    return -(-width // part_width) * -(-height // part_height) * planes


def tiff_metadata(data: bytes) -> Metadata:
    """The metadata of a TIFF file; its EXIF block is the file itself."""
    try:
        directory = _Ifd.first(data)
    except (ContainerError, struct.error):
        return Metadata()
    xmp = None
    c2pa = False
    for tag, kind, count, raw in directory.entries:
        if tag == _XMP and xmp is None:
            xmp = directory.value(kind, count, raw, MAX_BLOCK_BYTES)
        c2pa = c2pa or tag == _C2PA
    return Metadata(data, xmp, (), c2pa)


class _Ifd:
    """One directory of a TIFF structure: (tag, type, count, raw entry) of each entry, values read on demand."""

    def __init__(self, data: bytes, order: str, offset: int, big: bool) -> None:
        self.data, self.order, self.big = data, order, big
        head = "Q" if big else "H"
        if offset < 8 or offset + struct.calcsize(order + head) > len(data):
            raise ContainerError("a TIFF directory outside the file")
        (count,) = struct.unpack_from(order + head, data, offset)
        if count > _MAX_ENTRIES:
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
        size = _TYPE_BYTES.get(kind, 0) * count
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
