"""The box structure that AVIF and HEIC share (ISO/IEC 14496-12), as far as metadata and sizes go.

In: the bytes of a file. Out: its metadata, a copy whose EXIF no decoder reads, or the sizes that the AV1 streams in an
AVIF state themselves. Knows no pixels, and of codecs the first fields of AV1's sequence header.
"""

from __future__ import annotations

from collections.abc import Iterator

from deployments.metadata import MAX_BLOCK_BYTES, ContainerError, Metadata

_MAX_BOXES = 2048  # of an AVIF or HEIC; a picture of 48 megapixels in tiles has some 300
#: Boxes made of boxes, and how many bytes come before the first of these.
_BOXES_OF_BOXES = dict.fromkeys(
    b"moov trak edts mdia minf dinf stbl mvex moof traf mfra schi sinf udta iprp ipco".split(), 8
) | {b"meta": 12, b"iinf": 14, b"dref": 16, b"stsd": 16, b"iref": 12}
_MAX_EXTENTS = 8192  # of all items; each of an honest file has one or two
_MAX_OBUS = 10_000  # units of all AV1 streams; a picture or tile has three, and a few more for each layer
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


def av1_sizes(data: bytes) -> list[tuple[int, int]]:
    """Largest width and height that each AV1 stream of an AVIF announces: of its items, and of a film's first sample.

    The container states a size as well, but a decoder decodes what is in the stream and only then brings it to that.

    Raises:
        ContainerError: a stream cannot be followed, or has more parts than an honest one has.
    """
    streams: list[_Extents] = []
    for start, end in _inside(data, (0, len(data)), b"meta"):
        streams += _av1_items(data, start + 4, end)
    for moov in _inside(data, (0, len(data)), b"moov"):
        streams += _first_samples(data, moov)
    # Equal tiles of a grid share their bytes, and a film's first picture those of an item: no more than that overlaps.
    sizes = dict.fromkeys(streams, (0, 0))
    if sum(end - start for extents in sizes for start, end in extents) > 2 * len(data):
        raise ContainerError("items larger than the file")
    obus = 0
    for extents in sizes:
        stream = b"".join(data[start:end] for start, end in extents)
        for kind, start, end in _obus(stream):
            obus += 1
            if obus > _MAX_OBUS:
                raise ContainerError("more parts than an honest AV1 picture has")
            if kind == 1:
                width, height = _sequence_size(_Reader(stream[start : min(end, start + 1024)]))
                sizes[extents] = max(width, sizes[extents][0]), max(height, sizes[extents][1])
    if not any(width for width, _ in sizes.values()):
        raise ContainerError("no AV1 stream")
    return [sizes[extents] for extents in streams]


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


#: (start, end) of the pieces of a file that make up an item.
_Extents = tuple[tuple[int, int], ...]


def _inside(data: bytes, place: tuple[int, int], wanted: bytes) -> list[tuple[int, int]]:
    """(start, end) of what the boxes of one type between two positions hold."""
    return [
        (start + (16 if data[start : start + 4] == b"\0\0\0\1" else 8), end)  # a size of 1: the size comes later
        for kind, start, end in _boxes(data, *place)
        if kind == wanted
    ]


def _first_samples(data: bytes, moov: tuple[int, int]) -> list[_Extents]:
    """Where the first sample of each AV1 track of a film lies."""
    places = [moov]
    for kind in (b"trak", b"mdia", b"minf", b"stbl"):
        places = [inner for place in places for inner in _inside(data, place, kind)]
    samples: list[_Extents] = []
    for place in places:
        if not any(b"av01" in data[start:end] for start, end in _inside(data, place, b"stsd")):
            continue
        for at, _ in _inside(data, place, b"stsz"):
            # one size for all samples, or 0, their number, and each one's own
            size = int.from_bytes(data[at + 4 : at + 8], "big") or int.from_bytes(data[at + 12 : at + 16], "big")
            for kind, width in ((b"stco", 4), (b"co64", 8)):
                for table, _ in _inside(data, place, kind):
                    offset = int.from_bytes(data[table + 8 : table + 8 + width], "big")
                    samples.append(((min(offset, len(data)), min(offset + size, len(data))),))
    return samples


def _av1_items(data: bytes, start: int, end: int) -> list[_Extents]:
    """Where the AV1 items of a `meta` box lie; its boxes are those between the two positions."""
    wanted: set[int] = set()
    for at, stop in _inside(data, (start, end), b"iinf"):
        for infe, _ in _inside(data, (at + (6 if data[at : at + 1] == b"\0" else 8), stop), b"infe"):
            id_bytes = 2 if data[infe : infe + 1] == b"\2" else 4
            if data[infe + 6 + id_bytes : infe + 10 + id_bytes] == b"av01":
                wanted.add(int.from_bytes(data[infe + 4 : infe + 4 + id_bytes], "big"))
    idat = next(iter(_inside(data, (start, end), b"idat")), (0, 0))
    items: list[_Extents] = []
    for at, stop in _inside(data, (start, end), b"iloc"):
        items += _located(data, _Reader(data[at:stop]), wanted, idat)
    return items


def _located(data: bytes, iloc: _Reader, wanted: set[int], idat: tuple[int, int]) -> list[_Extents]:
    """Where the wanted items lie, by an item location box (ISO/IEC 14496-12, 8.11.3)."""
    version = iloc.take(8)
    iloc.take(24)
    offset_bits, length_bits, base_bits, index_bits = (8 * iloc.take(4) for _ in range(4))
    id_bits = 32 if version == 2 else 16
    items: list[_Extents] = []
    left = _MAX_EXTENTS
    for _ in range(iloc.take(id_bits)):
        item = iloc.take(id_bits)
        method = iloc.take(16) & 15 if version else 0
        iloc.take(16)
        base = iloc.take(base_bits)
        start, end = idat if method == 1 else (0, len(data))
        extents = []
        count = iloc.take(16)
        left -= 1 + count
        if left < 0:
            raise ContainerError("more items than an honest file has")
        for _ in range(count):
            iloc.take(index_bits if version else 0)
            first = start + base + iloc.take(offset_bits)
            length = iloc.take(length_bits) or end  # 0 means all that is left
            extents.append((min(first, end), min(first + length, end)))
        if item in wanted and method < 2:
            items.append(tuple(extents))
    return items


def _obus(stream: bytes) -> Iterator[tuple[int, int, int]]:
    """(type, start, end) of what the units of an AV1 stream hold (AV1 specification, 5.3)."""
    at = 0
    while at < len(stream):
        header = stream[at]
        at += 2 if header & 4 else 1
        size = len(stream) - at
        if header & 2:
            size = 0
            for shift in range(0, 56, 7):
                byte = stream[at] if at < len(stream) else 0
                at += 1
                size |= (byte & 127) << shift
                if byte < 128:
                    break
        yield header >> 3 & 15, at, at + size
        at += size


def _sequence_size(bits: _Reader) -> tuple[int, int]:
    """Width and height at most of the pictures after an AV1 sequence header (AV1 specification, 5.5.1)."""
    bits.take(4)  # profile, still picture
    if bits.take(1):  # reduced header of a still picture
        bits.take(5)
    else:
        delay_bits = 0
        if bits.take(1):  # timing
            bits.take(64)
            if bits.take(1):
                zeros = next((zeros for zeros in range(32) if bits.take(1)), 32)
                if zeros == 32:
                    raise ContainerError("a time that no honest file has")
                bits.take(zeros)
            if bits.take(1):  # decoder model
                delay_bits = 1 + bits.take(5)
                bits.take(42)
        display_delay = bits.take(1)
        for _ in range(1 + bits.take(5)):  # operating points
            bits.take(12)
            if bits.take(5) > 7:
                bits.take(1)
            if delay_bits and bits.take(1):
                bits.take(2 * delay_bits + 1)
            if display_delay and bits.take(1):
                bits.take(4)
    width_bits, height_bits = 1 + bits.take(4), 1 + bits.take(4)
    return 1 + bits.take(width_bits), 1 + bits.take(height_bits)


class _Reader:
    """Numbers of any number of bits, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, bits: int) -> int:
        end = self._at + bits
        first, last = self._at // 8, -(-end // 8)
        if last > len(self._data):
            raise ContainerError("cut off in its headers")
        self._at = end
        return int.from_bytes(self._data[first:last], "big") >> (8 * last - end) & ((1 << bits) - 1)
