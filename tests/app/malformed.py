"""Requests that no honest client sends, by the thousand and from a seed.

`requests(seed, count)` yields them: real files of every format cut, flipped and spliced; headers that lie about
dimensions; decompression bombs; files that are no pictures; multipart, JSON and base64 that are broken in every way we
could think of; hostile names, ids, types and methods. Some mutations leave a picture sound: what an application owes
all of these is no 5xx and no fall, not a 4xx each.

Pictures are tiny, so that what happens to be sound is cheap to analyse. Knows no application: paths, headers and bodies
are all it yields, and no header lies about the transport itself, so any HTTP client can send them.
"""

from __future__ import annotations

import base64
import functools
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from urllib.parse import quote

import numpy as np
import pillow_heif
from PIL import Image, PngImagePlugin

_PATHS = ("/v1/analyze", "/v1/analyze", "/v1/analyze", "/v1/detect", "/v1/caption", "/v1/tag")
_MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/tiff", "image/avif", "image/heic")
_WRONG_MEDIA_TYPES = (
    "text/plain", "application/x-www-form-urlencoded", "application/pdf", "multipart/mixed; boundary=x", "image/", "/",
    "application/json; charset=utf-16", "video/mp4", "application/octet-stream; boundary", ";;;", "multipart/form-data",
    "IMAGE/JPEG", "application/xml", "a" * 2000,
)  # fmt: skip
HOSTILE_NAMES = (
    "../../etc/passwd", "..\\..\\windows\\win.ini", "/dev/null", "C:\\con.jpg", "a\x00b.png", "'; drop table x;--",
    "<script>alert(1)</script>.png", "x" * 4000, "\u202egpj.exe", "%2e%2e%2f", "💥.jpg", "$(reboot).png", "", " ", ".",
)  # fmt: skip


@dataclass(frozen=True)
class MalformedRequest:
    """One request, ready to be sent."""

    kind: str
    """What is wrong with it, for the message of a failing test."""
    method: str
    path: str
    """With its query."""
    headers: tuple[tuple[str, str], ...]
    body: bytes


def requests(seed: int, count: int) -> Iterator[MalformedRequest]:
    """`count` requests, the same ones for the same seed."""
    rng = random.Random(seed)
    kinds: list[tuple[int, Callable[[random.Random], MalformedRequest]]] = [
        (42, _raw_damaged),
        (6, _raw_bomb),
        (6, _raw_no_picture),
        (14, _multipart_pictures),
        (12, _multipart_broken),
        (14, _json_broken),
        (6, _json_pictures),
        (4, _hostile_parameters),
        (3, _wrong_method),
    ]
    weights = [weight for weight, _ in kinds]
    for _ in range(count):
        yield rng.choices(kinds, weights)[0][1](rng)


# ---------------------------------------------------------------------------------------------------------- real files


@functools.cache
def real_files() -> dict[str, bytes]:
    """Small sound pictures: every format, mode and oddity that the application accepts, by name."""
    grain = np.random.default_rng(7)
    smooth = Image.fromarray(grain.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(
        (64, 48), Image.Resampling.BICUBIC
    )
    frames = [smooth.rotate(angle) for angle in (10, 20)]
    exif = Image.Exif()
    exif[0x0112], exif[0x0131], exif[0x010E] = 6, "Midjourney", "a dog"
    xmp = b'<x:xmpmeta><rdf:Description Iptc4xmpExt:DigitalSourceType="digitalCapture"/></x:xmpmeta>'
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a dog\nSteps: 20, Sampler: Euler a", zip=True)
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    deep = Image.fromarray(np.asarray(smooth.convert("L")).astype(np.uint16) * 257)
    alpha = smooth.convert("RGBA")
    alpha.putalpha(smooth.convert("L"))
    files: dict[str, bytes] = {}

    def add(name: str, image: Image.Image, picture_format: str, **options: object) -> None:
        buffer = BytesIO()
        image.save(buffer, picture_format, **options)
        files[name] = buffer.getvalue()

    add("jpeg", smooth, "JPEG", exif=exif, xmp=xmp)
    add("jpeg-progressive", smooth, "JPEG", progressive=True)
    add("jpeg-cmyk", smooth.convert("CMYK"), "JPEG")
    add("jpeg-grey", smooth.convert("L"), "JPEG")
    add("png", smooth, "PNG", pnginfo=text, exif=exif)
    add("png-16", deep, "PNG")
    add("png-alpha", alpha, "PNG")
    add("png-palette", alpha.quantize(16), "PNG")
    add("png-bits", smooth.convert("1"), "PNG")
    add("png-animated", smooth, "PNG", save_all=True, append_images=frames)
    add("gif", smooth, "GIF", comment=b"a comment")
    add("gif-animated", smooth, "GIF", save_all=True, append_images=frames, disposal=2)
    add("webp", smooth, "WEBP", exif=exif, xmp=xmp)
    add("webp-lossless", alpha, "WEBP", lossless=True)
    add("webp-animated", smooth, "WEBP", save_all=True, append_images=frames)
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        add(f"tiff-{compression}", smooth, "TIFF", compression=compression, exif=exif)
    add("tiff-16", deep, "TIFF")
    add("tiff-big", smooth, "TIFF", big_tiff=True)
    add("tiff-pages", smooth, "TIFF", save_all=True, append_images=frames)
    heic = BytesIO()
    pillow_heif.from_pillow(smooth).save(heic, format="HEIF", exif=exif.tobytes())
    add("avif", smooth, "AVIF", exif=exif)  # last: it takes the orientation out of the object that it is given
    files["heic"] = heic.getvalue()
    return files


# ------------------------------------------------------------------------------------------------------------ mutations


def damage(rng: random.Random, data: bytes) -> bytes:
    """A file with one to three faults, at least one of which most decoders notice."""
    faults = (_cut, _flip, _flip_header, _overwrite, _splice, _stretch_length, _cut, _zero, _lie)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if data:
            data = rng.choice(faults)(rng, data)
    return data


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def _flip(rng: random.Random, data: bytes) -> bytes:
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 4, 32, 128))):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _flip_header(rng: random.Random, data: bytes) -> bytes:
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        flipped[rng.randrange(min(len(data), 96))] = rng.randrange(256)
    return bytes(flipped)


def _overwrite(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.choice((1, 4, 64))) + data[at + 4 :]


def _zero(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes(len(data) - at)


def _splice(rng: random.Random, data: bytes) -> bytes:
    other = rng.choice(list(real_files().values()))
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def _stretch_length(rng: random.Random, data: bytes) -> bytes:
    """Some aligned number becomes the largest or a negative one."""
    at = rng.randrange(max(1, min(len(data) - 4, 400)))
    return (
        data[:at] + rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0")) + data[at + 4 :]
    )


def _lie(rng: random.Random, data: bytes) -> bytes:
    """The dimensions in the header become giant, and nothing else changes."""
    width, height = rng.choice(((65535, 65535), (30000, 30000), (65535, 1), (1, 65535), (0, 0), (16383, 16383), (8, 8)))
    if data.startswith(b"\x89PNG"):
        header = struct.pack(">II", width * 1000, height * 1000) + data[24:29]
        return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]
    if data.startswith(b"GIF8"):
        return data[:6] + struct.pack("<HH", width, height) + data[10:]
    if data[8:16] == b"WEBPVP8X":
        return data[:24] + struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3] + data[30:]
    if data.startswith(b"\xff\xd8"):
        for marker in (b"\xff\xc0", b"\xff\xc2"):
            at = data.find(marker)
            if at > 0:
                return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]
    at = data.find(b"ispe")
    if at > 0:
        return data[: at + 8] + struct.pack(">II", width, height) + data[at + 16 :]
    at = data.find(b"\0\1\4\0\1\0\0\0")  # TIFF: tag 256, one LONG
    if at > 0:
        return data[: at + 8] + struct.pack("<I", width) + data[at + 12 :]
    return data


@functools.cache
def bombs() -> dict[str, bytes]:
    """Files of at most a few hundred kilobytes that would cost gigabytes or minutes to decode naively, by name."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def png(width: int, height: int, *chunks: bytes, bits: int = 1, colour: int = 0) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")

    zeros = zlib.compress(bytes(20_000_000), 9)
    sound = real_files()
    colours = 13 + (3 << ((sound["gif"][10] & 7) + 1))  # where a GIF's blocks begin
    found = {
        "png-huge": png(40_000, 40_000, chunk(b"IDAT", zeros)),
        "png-wide": png(2**31 - 1, 16, chunk(b"IDAT", zeros)),
        "png-text": png(64, 64, chunk(b"zTXt", b"parameters\0\0" + zeros), chunk(b"IDAT", zlib.compress(bytes(64 * 9)))),  # noqa: E501
        "png-texts": png(64, 64, *[chunk(b"zTXt", b"k\0\0" + zeros)] * 40),
        "png-chunks": png(64, 64, chunk(b"tEXt", b"a\0b") * 20_000, chunk(b"IDAT", b"") * 20_000),
        "gif-huge": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
        + b"\x21\xf9\4\x08\0\0\0\0" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\2L\1\0;",
        "gif-offset": b"GIF89a" + struct.pack("<HHBBB", 32, 32, 0, 0, 0)
        + b"\x21\xf9\4\x0c\0\0\0\0" + b"\x2c" + struct.pack("<HHHHB", 65535, 65535, 65535, 65535, 0) + b"\2\2L\1\0;",
        "gif-comments": sound["gif"][:colours] + b"\x21\xfe" + (b"\xff" + b"a" * 255) * 1500 + b"\0" + sound["gif"][colours:],  # noqa: E501
        "webp-huge": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xfe\x3f\0\xfe\x3f\0VP8L\0\0\0\0",
        "webp-lossless-huge": b"RIFF\x1e\0\0\0WEBPVP8L\x10\0\0\0\x2f" + b"\xff" * 4 + bytes(11),
        "jpeg-huge": _lie_jpeg(sound["jpeg"], 65500, 65500),
        "jpeg-scans": _repeat_last_scan(sound["jpeg-progressive"], 3000),
        "jpeg-segments": sound["jpeg"][:2] + (b"\xff\xe1\0\x10Exif\0\0II*\0\x08\0\0\0") * 20_000 + sound["jpeg"][2:],
    }  # fmt: skip
    pixels = zlib.compress(bytes(64 * 64), 9)
    shape = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1)]
    found["tiff-tiles"] = _tiff(
        [*shape, (322, 4, 1, 60_000), (323, 4, 1, 60_000), (324, 4, 1, 8), (325, 4, 1, 99)], pixels
    )
    found["tiff-huge"] = _tiff(
        [(256, 4, 1, 2**31), (257, 4, 1, 2**31), *shape[2:], (273, 4, 1, 8), (279, 4, 1, 99)], pixels
    )
    found["tiff-tags"] = _tiff([*shape, *((tag, 7, 200_000, 8) for tag in range(40_000, 60_000))], bytes(200_000))
    found["tiff-many-strips"] = _tiff([*shape, (273, 4, 2**30, 8), (278, 4, 1, 1), (279, 4, 2**30, 8)], pixels)
    return found


def _tiff(entries: list[tuple[int, int, int, int]], body: bytes) -> bytes:
    offset = 8 + len(body) + (len(body) & 1)
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    ifd = struct.pack("<H", len(entries)) + packed + b"\0\0\0\0"
    return b"II*\0" + struct.pack("<I", offset) + body + b"\0" * (len(body) & 1) + ifd


def _lie_jpeg(data: bytes, width: int, height: int) -> bytes:
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def _repeat_last_scan(data: bytes, times: int) -> bytes:
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * times + b"\xff\xd9"


NO_PICTURES = (
    b"", b"\0", b"hello", b"<html><body>x</body></html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n",
    b"PK\3\4" + bytes(64), b"MZ" + bytes(64), b"BM" + bytes(64), b"8BPS\0\1" + bytes(64), b"%!PS-Adobe-3.0 EPSF-3.0\n",
    b"SIMPLE  =                    T", b"\0\0\1\0\1\0", b"icns" + bytes(64), b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n",
    b"GIF89a", b"RIFF\0\0\0\0WEBP", b"II*\0", b"MM\0*", b"\0\0\0\x18ftypavif", b"\0\0\0\x18ftypheic" + bytes(64),
    b"\0\0\0\x18ftypmp42" + bytes(64), b"P6 99999 99999 255\n", b"\0" * 5000, b"\xff" * 5000, b"data:image/png;base64,AAAA",  # noqa: E501
)  # fmt: skip


def _tiny(rng: random.Random) -> bytes:
    size = rng.choice(((1, 1), (15, 64), (64, 15), (1, 3000)))
    buffer = BytesIO()
    Image.new("RGB", size).save(buffer, rng.choice(("JPEG", "PNG", "GIF", "WEBP", "TIFF")))
    return buffer.getvalue()


def _some_file(rng: random.Random) -> bytes:
    """A file that is nearly always at fault."""
    choice = rng.random()
    if choice < 0.6:
        return damage(rng, rng.choice(list(real_files().values())))
    if choice < 0.75:
        return rng.choice(NO_PICTURES)
    if choice < 0.9:
        return _tiny(rng)
    return rng.choice(list(bombs().values()))


# ------------------------------------------------------------------------------------------------------------- requests


def _request(
    rng: random.Random, kind: str, body: bytes, content_type: str | None, query: str = "", method: str = "POST"
) -> MalformedRequest:
    headers = () if content_type is None else (("content-type", content_type),)
    return MalformedRequest(kind, method, rng.choice(_PATHS) + query, headers, body)


def _any_type(rng: random.Random) -> str | None:
    return rng.choice((*_MEDIA_TYPES, "application/octet-stream", None))


def _raw_damaged(rng: random.Random) -> MalformedRequest:
    name = rng.choice(list(real_files()))
    return _request(rng, f"raw damaged {name}", damage(rng, real_files()[name]), _any_type(rng))


def _raw_bomb(rng: random.Random) -> MalformedRequest:
    name = rng.choice(list(bombs()))
    return _request(rng, f"raw bomb {name}", bombs()[name], _any_type(rng))


def _raw_no_picture(rng: random.Random) -> MalformedRequest:
    choice = rng.random()
    if choice < 0.5:
        return _request(rng, "raw no picture", rng.choice(NO_PICTURES), _any_type(rng))
    if choice < 0.7:
        return _request(rng, "raw too small", _tiny(rng), _any_type(rng))
    if choice < 0.8:
        return _request(rng, "raw noise", rng.randbytes(rng.choice((1, 100, 10_000))), _any_type(rng))
    return _request(rng, "raw wrong type", real_files()["png"], rng.choice(_WRONG_MEDIA_TYPES))


def multipart(boundary: bytes, parts: list[tuple[bytes, bytes]]) -> bytes:
    """A sound multipart body of (header lines, content)."""
    return b"".join(b"--%s\r\n%s\r\n\r\n%s\r\n" % (boundary, *part) for part in parts) + b"--%s--\r\n" % boundary


def _file_part(name: str, data: bytes, field: str = "file") -> tuple[bytes, bytes]:
    quoted = name.replace('"', "%22").replace("\r", "").replace("\n", "")
    return f'Content-Disposition: form-data; name="{field}"; filename="{quoted}"'.encode(), data


def _multipart_pictures(rng: random.Random) -> MalformedRequest:
    count = rng.choice((1, 1, 1, 2, 3, 5, 33, 40))
    empty = count > 5
    files = [_file_part(rng.choice(HOSTILE_NAMES), b"x" if empty else _some_file(rng)) for _ in range(count)]
    for _ in range(rng.choice((0, 0, 1, count))):
        value = rng.choice(("a", "", "\0", "x" * 129, "é", "../..", "\u202e"))
        files.append((b'Content-Disposition: form-data; name="id"', value.encode()))
    boundary = b"%032x" % rng.getrandbits(128)
    kind = f"multipart of {count}"
    return _request(rng, kind, multipart(boundary, files), f"multipart/form-data; boundary={boundary.decode()}")


def _multipart_broken(rng: random.Random) -> MalformedRequest:
    boundary = b"b%d" % rng.randrange(1000)
    sound = multipart(boundary, [_file_part("a.png", real_files()["png"])])
    content_type = f"multipart/form-data; boundary={boundary.decode()}"
    disposition = b'Content-Disposition: form-data; name="file"; filename="a.png"'
    many = [(b'Content-Disposition: form-data; name="f%d"' % number, b"v") for number in range(2000)]
    faults: dict[str, tuple[bytes, str]] = {
        "empty": (b"", content_type),
        "cut": (_cut(rng, sound), content_type),
        "flipped": (_flip(rng, sound[:120]) + sound[120:], content_type),
        "no boundary": (sound, "multipart/form-data"),
        "empty boundary": (sound, "multipart/form-data; boundary="),
        "other boundary": (sound, "multipart/form-data; boundary=other"),
        "long boundary": (sound, "multipart/form-data; boundary=" + "b" * 3000),
        "no end": (sound[: sound.rindex(b"--" + boundary)], content_type),
        "only end": (b"--" + boundary + b"--\r\n", content_type),
        "no name": (multipart(boundary, [(b"Content-Disposition: form-data", b"x")]), content_type),
        "no disposition": (multipart(boundary, [(b"Content-Type: image/png", b"x")]), content_type),
        "no headers": (b"--" + boundary + b"\r\n\r\nx\r\n--" + boundary + b"--\r\n", content_type),
        "other field": (multipart(boundary, [_file_part("a", real_files()["png"], "avatar")]), content_type),
        "no file": (multipart(boundary, [(b'Content-Disposition: form-data; name="id"', b"1")]), content_type),
        "many fields": (multipart(boundary, many), content_type),
        "many headers": (multipart(boundary, [(disposition + b"\r\nX: y" * 500, b"x")]), content_type),
        "long header": (multipart(boundary, [(disposition + b"; x=" + b"y" * 100_000, b"x")]), content_type),
        "long field": (
            multipart(boundary, [(b'Content-Disposition: form-data; name="id"', b"1" * 99_999)]),
            content_type,
        ),
        "binary header": (multipart(boundary, [(rng.randbytes(60), b"x")]), content_type),
        "binary name": (
            multipart(boundary, [(b'Content-Disposition: form-data; name="\xff\xfe"', b"x")]),
            content_type,
        ),
        "star name": (
            multipart(boundary, [(b"Content-Disposition: form-data; name*=UTF-8''fi%6ce; filename*=x", b"x")]),
            content_type,
        ),
        "nested": (
            multipart(boundary, [(disposition + b"\r\nContent-Type: " + content_type.encode(), sound)]),
            content_type,
        ),
        "line feeds": (sound.replace(b"\r\n", b"\n"), content_type),
        "near boundaries": ((b"\r\n--" + boundary[:-1]) * 5000, content_type),
        "noise": (rng.randbytes(2000), content_type),
    }
    kind = rng.choice(list(faults))
    return _request(rng, f"multipart {kind}", *faults[kind])


def _json_broken(rng: random.Random) -> MalformedRequest:
    good = base64.b64encode(real_files()["png"]).decode()
    faults: dict[str, bytes] = {
        "empty": b"",
        "cut": _cut(rng, json.dumps({"image": good}).encode()),
        "not utf-8": b'{"image": "\xff\xfe"}',
        "utf-16": json.dumps({"image": good}).encode("utf-16"),
        "deep": b"[" * 100_000,
        "deep object": b'{"image":' * 3000 + b"1" + b"}" * 3000,
        "wide": b"[" + b"[]," * 200_000 + b"[]]",
        "number": b"1",
        "null": b"null",
        "nan": b'{"image": NaN}',
        "huge number": b'{"image": ' + b"9" * 10_000 + b"}",
        "string": b'"image"',
        "list": b"[]",
        "no image": b"{}",
        "both": json.dumps({"image": good, "images": [{"image": good}]}).encode(),
        "images empty": b'{"images": []}',
        "images object": b'{"images": {"image": "x"}}',
        "images of wrong types": b'{"images": [1, null, "x", [], {}, {"image": 1}, {"image": null}, {"image": ["x"]}]}',
        "too many": json.dumps({"images": [{"image": "x"}] * rng.choice((33, 500))}).encode(),
        "image number": b'{"image": 5}',
        "image empty": b'{"image": ""}',
        "image blank": b'{"image": "  \\n "}',
        "bad base64": json.dumps({"image": rng.choice(("%%%", "abc", "a=bc", "====", "aGVsbG8", good[:-1], "é" * 9))}).encode(),  # noqa: E501
        "url-safe base64": json.dumps({"image": base64.urlsafe_b64encode(b"\xff\xfb\xef" * 30).decode()}).encode(),
        "data url": json.dumps({"image": rng.choice(("data:", "data:,", "data:image/png," + good, "data:;base64,"))}).encode(),  # noqa: E501
        "remote url": b'{"image": "http://169.254.169.254/latest/meta-data"}',
        "file url": b'{"image": "file:///etc/passwd"}',
        "surrogate id": b'{"image": "eA==", "id": "\\ud800"}',
        "id of wrong type": json.dumps({"image": good, "id": rng.choice((1, [], {}, True, "", "x" * 129, "a\nb", 1.5))}).encode(),  # noqa: E501
        "duplicate keys": b'{"image": "eA==", "image": 1, "id": "a", "id": 2}',
        "prototype": b'{"__proto__": {"image": "x"}, "constructor": 1}',
    }  # fmt: skip
    kind = rng.choice(list(faults))
    return _request(
        rng, f"json {kind}", faults[kind], rng.choice(("application/json", "application/json; charset=utf-8"))
    )


def _json_pictures(rng: random.Random) -> MalformedRequest:
    def image() -> str:
        text = base64.b64encode(_some_file(rng)).decode()
        return rng.choice(("", "data:image/png;base64,", "data:;base64,", "data:text/html;charset=x;base64,")) + text

    if rng.random() < 0.6:
        document: object = {"image": image(), "id": rng.choice(("a", "x" * 128, "é"))}
    else:
        document = {"images": [{"image": image(), "id": str(number)} for number in range(rng.choice((1, 2, 4)))]}
    return _request(rng, "json pictures", json.dumps(document).encode(), "application/json")


def _hostile_parameters(rng: random.Random) -> MalformedRequest:
    value = quote(
        rng.choice(("", "\0", "x" * 200, "é\n", "../..", "bogus", "detect,bogus", "1 or 1=1", "{{7*7}}", "💥"))
    )
    name = rng.choice(("id", "tasks", "explain", "id=a&id", "tasks=detect&tasks", "unknown"))
    # The picture is at fault as well, so that a parameter that is ignored costs no analysis.
    return _request(rng, f"parameter {name}", rng.choice(NO_PICTURES), "image/png", f"?{name}={value}")


def _wrong_method(rng: random.Random) -> MalformedRequest:
    method = rng.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS"))
    return _request(rng, f"method {method}", b"", None, method=method)
