"""Pictures out of a request: an HTTP request in, the bytes of each picture out.

Takes the three shapes that `POST /v1/analyze` documents: multipart parts, a raw body, JSON with base64 or data URLs.
Limits hold while the body is read and not after: a request that is too large is refused at the first byte too many, and
of its rest no more is held than `app.access` reads ahead. Nothing is written to disk: Starlette's own form parser would
spool each file part to a temporary file, so multipart bodies go through `python-multipart` into memory here. File names
and declared types of the parts are not looked at.

Does not decode pictures. Knows no model and no graph.
"""

from __future__ import annotations

import asyncio
import binascii
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from app.problems import Problem

#: Names under which a multipart picture may come. `file` is the documented one.
_PICTURE_FIELDS = frozenset(("file", "files", "image", "images"))
_MAX_FIELDS = 64  # parts that are no pictures
_MAX_FIELD_BYTES = 4096
_DATA_URL = re.compile(r"data:[^,;]{0,128}(?:;[^,;]{1,128}){0,4},", re.ASCII | re.IGNORECASE)


class UploadLimits(BaseModel):
    """What one request may carry."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_pictures: int = Field(default=32, gt=0, description="pictures in one request")
    max_bytes: int = Field(default=20 * 1024 * 1024, gt=0, description="size of one picture's file")
    max_request_bytes: int = Field(default=64 * 1024 * 1024, gt=0, description="size of a whole request's body")
    max_id_chars: int = Field(default=128, gt=0, description="length of the caller's own id of a picture")

    @property
    def max_body_bytes(self) -> int:
        """The bound for any body: what all pictures may take in base64, or `max_request_bytes` if that is less."""
        return min(self.max_request_bytes, self.max_pictures * (self.max_bytes * 4 // 3 + 8192))


@dataclass(frozen=True)
class Upload:
    """One picture of a request: its bytes, or the problem that is this picture's own fault."""

    id: str | None
    data: bytes | None
    problem: Problem | None = None


@asynccontextmanager
async def in_time(seconds: float) -> AsyncIterator[None]:
    """Bounds the reading of a body, and whatever else stands in the block.

    Raises:
        Problem: `timeout`.
    """
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            yield
    except TimeoutError:
        raise Problem("timeout", "The request's body did not arrive in time.") from None


async def read_uploads(request: Request, limits: UploadLimits) -> list[Upload]:
    """The pictures of a request in their order, at least one.

    The caller's own ids come from the query (`id`, one picture), from multipart fields `id` (as many as pictures, in
    their order) or from the JSON items.

    Raises:
        Problem: the request as a whole is at fault (its form, an id, a name that is not known), or its only picture is.
            Among several pictures, the fault of one (no bytes, too large, not base64) becomes its `problem`.
    """
    kind, boundary = _content_type(request)
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise Problem("unsupported_media_type", "Compressed request bodies are not accepted.")
    if kind == "multipart/form-data":
        uploads = await _read_multipart(request, boundary, limits)
    elif kind == "application/json":
        uploads = await _read_json(request, limits)
    elif kind in ("", "application/octet-stream") or kind.startswith("image/"):
        uploads = [await _read_raw(request, limits)]
    else:
        raise Problem(
            "unsupported_media_type",
            "Send multipart/form-data, application/json, application/octet-stream or image/*.",
        )
    uploads = _with_query_id(request, uploads, limits)
    if len(uploads) == 1 and uploads[0].problem is not None:
        raise uploads[0].problem
    return uploads


def declared_bytes(request: Request) -> int | None:
    """Size of the body, as far as the request tells it; of more than 18 digits it is beyond any limit."""
    declared = request.headers.get("content-length", "")
    if not (declared.isascii() and declared.isdigit()):
        return None
    return int(declared) if len(declared) <= 18 else 10**18


def check_declared(request: Request, limit: int) -> int | None:
    """Size of the body, as far as the request tells it.

    Raises:
        Problem: `too_large`, more than ``limit``.
    """
    if (declared := declared_bytes(request)) is not None and declared > limit:
        raise _too_large(limit)
    return declared


def _content_type(request: Request) -> tuple[str, bytes]:
    """Media type in lower case, empty if none was sent, and the multipart boundary."""
    kind, parameters = parse_options_header(request.headers.get("content-type", "").encode("latin-1"))
    return kind.decode("latin-1").strip().lower(), parameters.get(b"boundary", b"")


async def _bounded_stream(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body, piece by piece, as long as it stays within `limit` bytes."""
    check_declared(request, limit)
    total = 0
    async for piece in request.stream():
        total += len(piece)
        if total > limit:
            raise _too_large(limit)
        if piece:
            yield piece


def _too_large(limit: int) -> Problem:
    # The rest of the body is not read, so the connection is of no further use.
    return Problem("too_large", f"At most {limit} bytes are accepted.", {"Connection": "close"})


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises Problem (`too_large`) at the first byte beyond ``limit``."""
    body = bytearray()
    async for piece in _bounded_stream(request, limit):
        body += piece
    return bytes(body)


async def _read_raw(request: Request, limits: UploadLimits) -> Upload:
    data = await read_body(request, min(limits.max_bytes, limits.max_request_bytes))
    return _upload(None, data)


def _upload(picture_id: str | None, data: bytes) -> Upload:
    if not data:
        return Upload(picture_id, None, Problem("empty_body", "The picture has no bytes."))
    return Upload(picture_id, data)


# ----------------------------------------------------------------------------------------------------------------- ids


def _check_id(value: object, limits: UploadLimits) -> str:
    """Raises Problem (`bad_parameter`) unless it is a string of printable characters of allowed length."""
    if not isinstance(value, str) or not 0 < len(value) <= limits.max_id_chars or not value.isprintable():
        raise Problem("bad_parameter", f"An id has 1 to {limits.max_id_chars} printable characters.")
    return value


def _with_query_id(request: Request, uploads: list[Upload], limits: UploadLimits) -> list[Upload]:
    ids = request.query_params.getlist("id")
    if not ids:
        return uploads
    if len(ids) > 1 or len(uploads) > 1:
        raise Problem("bad_parameter", "The query parameter id is for one picture; send ids in the body for several.")
    picture_id = _check_id(ids[0], limits)
    return [Upload(uploads[0].id or picture_id, uploads[0].data, uploads[0].problem)]


# ----------------------------------------------------------------------------------------------------------- multipart


class _Parts:
    """The callbacks of the multipart parser: pictures and ids as they come in, each bounded."""

    def __init__(self, limits: UploadLimits) -> None:
        self._limits = limits
        self.pictures: list[Upload] = []
        self.ids: list[str] = []
        self.complete = False
        self._fields = 0
        self._header = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._name = ""
        self._part = bytearray()
        self._overflowed = False

    def on_part_begin(self) -> None:
        self._disposition = b""
        self._part = bytearray()
        self._overflowed = False

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise Problem("bad_request", "A part of the multipart body has no name.")
        self._name = options[b"name"].decode("utf-8", "replace")
        if self._name in _PICTURE_FIELDS:
            if len(self.pictures) == self._limits.max_pictures:
                raise Problem("too_many_pictures", f"At most {self._limits.max_pictures} pictures are accepted.")
            return
        if b"filename" in options:
            raise Problem("bad_request", "A picture's part must be named file.")
        self._fields += 1
        if self._fields > _MAX_FIELDS:
            raise Problem("bad_request", "The multipart body has too many fields.")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        is_picture = self._name in _PICTURE_FIELDS
        if self._overflowed:
            return
        if len(self._part) + end - start > (self._limits.max_bytes if is_picture else _MAX_FIELD_BYTES):
            if not is_picture:
                raise Problem("bad_request", "A field of the multipart body is too long.")
            self._overflowed = True
            self._part = bytearray()
            return
        self._part += data[start:end]

    def on_part_end(self) -> None:
        part, self._part = self._part, bytearray()
        if self._overflowed:
            self.pictures.append(Upload(None, None, _too_large(self._limits.max_bytes)))
        elif self._name in _PICTURE_FIELDS:
            self.pictures.append(_upload(None, bytes(part)))
        elif self._name == "id":
            self.ids.append(part.decode("utf-8", "replace"))

    def on_end(self) -> None:
        self.complete = True


async def _read_multipart(request: Request, boundary: bytes, limits: UploadLimits) -> list[Upload]:
    parts = _Parts(limits)
    names = ("on_part_begin", "on_part_data", "on_part_end", "on_header_field", "on_header_value", "on_header_end")
    callbacks: Any = {name: getattr(parts, name) for name in (*names, "on_headers_finished", "on_end")}
    if not boundary:
        raise Problem("bad_request", "The content type names no multipart boundary.")
    received = False
    try:
        parser = MultipartParser(boundary, callbacks)
        async for piece in _bounded_stream(request, limits.max_body_bytes):
            received = True
            parser.write(piece)
    except FormParserError:
        raise Problem("bad_request", "The multipart body is malformed.") from None
    if not received:
        raise Problem("empty_body", "The request has no body.")
    if not parts.complete:
        raise Problem("bad_request", "The multipart body ends before its last boundary.")
    if not parts.pictures:
        raise Problem("bad_request", "The multipart body has no part named file.")
    if not parts.ids:
        return parts.pictures
    if len(parts.ids) != len(parts.pictures):
        raise Problem("bad_parameter", "Send as many fields id as pictures, or none.")
    return [
        Upload(_check_id(value, limits), upload.data, upload.problem)
        for value, upload in zip(parts.ids, parts.pictures, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------- JSON


async def _read_json(request: Request, limits: UploadLimits) -> list[Upload]:
    body = await read_body(request, limits.max_body_bytes)
    if not body:
        raise Problem("empty_body", "The request has no body.")
    # Tens of megabytes of base64 take a while: not on the event loop.
    return await asyncio.to_thread(_parse_json, body, limits)


def _parse_json(body: bytes, limits: UploadLimits) -> list[Upload]:
    # Structure takes far more memory than text: 64 MB of `[[],[],...` would become gigabytes. Base64 has none of it.
    if sum(body.count(mark) for mark in (b",", b"[", b"{", b":")) > 1024 + 512 * limits.max_pictures:
        raise Problem("bad_request", "The JSON body has too many values.")
    try:
        document = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise Problem("bad_request", "The body is not valid JSON.") from None
    if not isinstance(document, dict):
        raise Problem("bad_request", "The JSON body must be an object with image or images.")
    if ("image" in document) == ("images" in document):
        raise Problem("bad_request", "The JSON body must have either image or images.")
    if "images" in document:
        _known_names(document, frozenset({"images"}))
    items = [document] if "image" in document else document["images"]
    if not isinstance(items, list) or not items:
        raise Problem("bad_request", "images must be a list of at least one object.")
    if len(items) > limits.max_pictures:
        raise Problem("too_many_pictures", f"At most {limits.max_pictures} pictures are accepted.")
    return [_json_upload(item, limits) for item in items]


def _known_names(document: dict[str, Any], known: frozenset[str]) -> None:
    """A name that nobody reads is a mistake of the caller's: `tasks` in the body, say, which belongs into the query."""
    if unknown := set(document) - known:
        raise Problem("bad_parameter", f"{len(unknown)} unknown names in the JSON; known: {', '.join(sorted(known))}.")


def _json_upload(item: object, limits: UploadLimits) -> Upload:
    if not isinstance(item, dict) or not isinstance(item.get("image"), str):
        raise Problem("bad_request", "A picture is an object whose image is a string.")
    _known_names(item, frozenset({"image", "id"}))
    picture_id = None if item.get("id") is None else _check_id(item["id"], limits)
    try:
        return _upload(picture_id, _decode_base64(item["image"], limits))
    except Problem as fault:
        return Upload(picture_id, None, fault)


def _decode_base64(text: str, limits: UploadLimits) -> bytes:
    """The bytes of a base64 text or data URL. Strict but for white space, which many encoders break lines with."""
    prefix = _DATA_URL.match(text)
    if prefix:
        if not prefix[0].lower().endswith(";base64,"):
            raise Problem("bad_base64", "A data URL must be of the kind ;base64.")
        text = text[prefix.end() :]
    # With more than a fifth of white space it is no encoding of anything: no need to decode it to know it is too large.
    if len(text) > limits.max_bytes * 5 // 3 + 1024:
        raise _too_large(limits.max_bytes)
    try:
        data = binascii.a2b_base64(text.encode("ascii").translate(None, b" \t\r\n"), strict_mode=True)
    except ValueError:
        raise Problem("bad_base64", "The picture is not valid base64.") from None
    if len(data) > limits.max_bytes:
        raise _too_large(limits.max_bytes)
    return data
