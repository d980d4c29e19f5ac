"""The box structure that AVIF and HEIC share (ISO/IEC 14496-12), as far as metadata goes.

In: the bytes of a file. Out: its metadata, or a copy whose EXIF no decoder reads. Knows no codec and no pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

from deployments.metadata import MAX_BLOCK_BYTES, ContainerError, Metadata

_MAX_BOXES = 2048  # of an AVIF or HEIC; a picture of 48 megapixels in tiles has some 300
#: Boxes made of boxes, and how many bytes come before the first of these.
_BOXES_OF_BOXES = dict.fromkeys(
    b"moov trak edts mdia minf dinf stbl mvex moof traf mfra schi sinf udta iprp ipco".split(), 8
) | {b"meta": 12, b"iinf": 14, b"dref": 16, b"stsd": 16, b"iref": 12}
_C2PA_UUID = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")


def bmff_pixels(data: bytes) -> bytes:
    """The file with its EXIF items renamed, so that no decoder takes them for EXIF.

    Rotation and mirroring are properties of their own in this container (`irot`, `imir`); EXIF is only a copy.

    Raises:
        ContainerError: more boxes than an honest file has.
    """
    if _count_boxes(data) > _MAX_BOXES:
        raise ContainerError("more boxes than an honest file has")
    for kind, start, end in _boxes(data):
        if kind == b"meta":
            return data[:start] + data[start:end].replace(b"Exif", b"exif") + data[end:]
    return data


def bmff_metadata(data: bytes) -> Metadata:
    """The metadata of an AVIF or HEIC; of one with too many boxes C2PA is said to be absent."""
    try:
        # C2PA's reader takes time that grows with the square of the number of boxes.
        boxes = list(_boxes(data)) if _count_boxes(data) <= _MAX_BOXES else []
    except ContainerError:
        boxes = []
    c2pa = any(kind == b"uuid" and data[at + 8 : at + 24] == _C2PA_UUID for kind, at, _ in boxes)
    exif = xmp = None
    # Items lie anywhere in the file by offset tables; their own signatures are found faster than the tables are read.
    starts = [at for at in (data.find(b"II*\0\x08\0\0\0"), data.find(b"MM\0*\0\0\0\x08")) if at >= 0]
    if starts:
        exif = data[min(starts) : min(starts) + MAX_BLOCK_BYTES]
    at = data.find(b"<x:xmpmeta")
    if at >= 0:
        xmp = data[at : at + MAX_BLOCK_BYTES]
    return Metadata(exif, xmp, (), c2pa)


def _boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
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
        for kind, start, end in _boxes(data, *inside.pop()):
            count += 1
            if kind in _BOXES_OF_BOXES:
                inside.append((start + _BOXES_OF_BOXES[kind], end))
    return count
