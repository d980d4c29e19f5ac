"""Reading pictures out of requests: each documented shape, each limit, each fault, over real ASGI requests."""

from __future__ import annotations

import asyncio
import base64
import json
import tempfile
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx
import pytest
from starlette.requests import ClientDisconnect, Request

from app.problems import MEDIA_TYPE, Problem
from app.uploads import Upload, UploadLimits, declared_bytes, read_uploads
from tests.app.malformed import HOSTILE_NAMES, multipart, real_files
from tests.app.small_app import send, small_app

LIMITS = UploadLimits(max_pictures=3, max_bytes=1000, max_request_bytes=4000)


def read(
    content_type: str | None,
    body: bytes | Iterable[bytes],
    query: str = "",
    headers: dict[str, str] | None = None,
    limits: UploadLimits = LIMITS,
) -> list[Upload]:
    """What `read_uploads` makes of a request whose body comes in the given pieces."""
    pieces = [body] if isinstance(body, bytes) else list(body)
    fields = dict(headers or {})
    if content_type is not None:
        fields["content-type"] = content_type
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in fields.items()],
    }

    async def receive() -> dict[str, Any]:
        piece = pieces.pop(0) if pieces else b""
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    return asyncio.run(read_uploads(Request(scope, receive), limits))


def code_of(*arguments: Any, **options: Any) -> str:
    with pytest.raises(Problem) as caught:
        read(*arguments, **options)
    return caught.value.code


def form(*parts: tuple[str, bytes]) -> tuple[str, bytes]:
    """Content type and body of a multipart form; names that start with `file` are pictures."""
    lines = [
        (
            f'Content-Disposition: form-data; name="{name}"'.encode() + (b'; filename="f"' if "file" in name else b""),
            data,
        )
        for name, data in parts
    ]
    return "multipart/form-data; boundary=b", multipart(b"b", lines)


def document(value: object) -> tuple[str, bytes]:
    return "application/json", json.dumps(value).encode()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# ----------------------------------------------------------------------------------------------------------------- raw


@pytest.mark.parametrize("kind", [None, "", "application/octet-stream", "image/jpeg", "image/anything", "IMAGE/PNG"])
def test_a_raw_body_is_one_picture(kind: str | None) -> None:
    assert read(kind, [b"pic", b"", b"ture"]) == [Upload(None, b"picture")]


def test_the_query_names_a_single_picture() -> None:
    assert read(None, b"x", "id=holiday%2F1")[0].id == "holiday/1"


@pytest.mark.parametrize("query", ["id=", "id=" + "x" * 129, "id=%00", "id=a%0Ab", "id=%E2%80%AE", "id=a&id=b"])
def test_an_id_that_is_not_allowed_is_a_bad_parameter(query: str) -> None:
    assert code_of(None, b"x", query) == "bad_parameter"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/mixed", "video/mp4"])
def test_other_content_types_are_not_supported(kind: str) -> None:
    assert code_of(kind, b"x") == "unsupported_media_type"


def test_compressed_bodies_are_not_supported() -> None:
    assert code_of(None, b"x", headers={"content-encoding": "gzip"}) == "unsupported_media_type"
    assert read(None, b"x", headers={"content-encoding": "identity"})


@pytest.mark.parametrize("kind", [None, "application/json", "multipart/form-data; boundary=b"])
def test_an_empty_body(kind: str | None) -> None:
    assert code_of(kind, b"") == "empty_body"


# -------------------------------------------------------------------------------------------------------------- limits


def test_a_declared_length_is_refused_before_anything_is_read() -> None:
    def never() -> Iterable[bytes]:
        raise AssertionError("read")
        yield b""

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b""}

    async def receive() -> dict[str, Any]:
        raise AssertionError("read")

    for kind in (b"image/png", b"application/json", b"multipart/form-data; boundary=b"):
        for length in (b"4001", b"9" * 5000):
            headers = [(b"content-type", kind), (b"content-length", length)]
            with pytest.raises(Problem) as caught:
                asyncio.run(read_uploads(Request({**scope, "headers": headers}, receive), LIMITS))
            assert caught.value.code == "too_large"
            assert caught.value.headers["Connection"] == "close"


@pytest.mark.parametrize("kind", ["image/png", "application/json", "multipart/form-data; boundary=b"])
@pytest.mark.parametrize("length", [None, "10", "-1", "abc", "²"])
def test_a_body_without_end_is_refused_at_the_limit(kind: str, length: str | None) -> None:
    taken = 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 500
        return {"type": "http.request", "body": b"\r\n" * 250, "more_body": True}

    headers = [(b"content-type", kind.encode())]
    if length is not None:
        headers.append((b"content-length", length.encode("latin-1")))
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
    with pytest.raises(Problem) as caught:
        asyncio.run(read_uploads(Request(scope, receive), LIMITS))
    assert caught.value.code == "too_large"
    assert taken <= 4500


def test_each_picture_has_its_limit_in_every_shape() -> None:
    most, more = b"x" * 1000, b"x" * 1001
    assert read(None, most)[0].data == most
    assert read(*form(("file", most)))[0].data == most
    assert read(*document({"image": b64(most)}))[0].data == most
    assert code_of(None, more) == "too_large"
    assert code_of(*form(("file", more))) == "too_large"
    assert code_of(*document({"image": b64(more)})) == "too_large"


def test_among_several_one_that_is_too_large_is_the_only_one_refused() -> None:
    for request in (
        form(("file", b"x" * 1001), ("file", b"fine")),
        document({"images": [{"image": b64(b"x" * 1001)}, {"image": b64(b"fine")}]}),
    ):
        first, second = read(*request)
        assert first.data is None
        assert first.problem is not None
        assert first.problem.code == "too_large"
        assert second == Upload(None, b"fine")


def test_too_many_pictures() -> None:
    assert len(read(*form(*[("file", b"x")] * 3))) == 3
    assert code_of(*form(*[("file", b"x")] * 4)) == "too_many_pictures"
    assert len(read(*document({"images": [{"image": "eA=="}] * 3}))) == 3
    assert code_of(*document({"images": [{"image": "eA=="}] * 4})) == "too_many_pictures"


def test_the_bound_of_a_body_follows_from_the_limits() -> None:
    assert UploadLimits().max_body_bytes == 64 * 1024 * 1024
    assert UploadLimits(max_pictures=1, max_bytes=3000).max_body_bytes == 4000 + 8192


# ----------------------------------------------------------------------------------------------------------- multipart


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_multipart_pictures_in_order_however_the_body_is_cut(size: int) -> None:
    kind, body = form(("file", b"one\r\n--"), ("note", b"ignored"), ("file", b"two\r\n--c\r"), ("files", b"three"))
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    assert [upload.data for upload in read(kind, pieces)] == [b"one\r\n--", b"two\r\n--c\r", b"three"]


def test_multipart_ids_belong_to_the_pictures_in_their_order() -> None:
    uploads = read(*form(("id", b"a"), ("file", b"1"), ("file", b"2"), ("id", "é".encode())))
    assert uploads == [Upload("a", b"1"), Upload("é", b"2")]
    assert code_of(*form(("file", b"1"), ("file", b"2"), ("id", b"a"))) == "bad_parameter"
    assert code_of(*form(("id", b"\0"), ("file", b"1"), ("file", b"2"), ("id", b"b"))) == "bad_parameter"


def test_an_empty_part_is_that_pictures_problem() -> None:
    assert code_of(*form(("file", b""))) == "empty_body"
    first, second = read(*form(("file", b""), ("file", b"x")))
    assert first.problem is not None and first.problem.code == "empty_body"
    assert second.data == b"x"


def test_multipart_faults_are_bad_requests() -> None:
    kind, body = form(("file", b"x"))
    assert code_of("multipart/form-data", body) == "bad_request"
    assert code_of("multipart/form-data; boundary=" + "b" * 500, body) == "bad_request"
    assert code_of("multipart/form-data; boundary=c", body) == "bad_request"
    assert code_of(kind, body[:-4]) == "bad_request"
    assert code_of(kind, body[:20]) == "bad_request"
    assert code_of(*form(("note", b"x"))) == "bad_request"
    assert code_of(*form(("profile", b"x"))) == "bad_request"
    assert code_of(*form(*[("note", b"x")] * 65), limits=UploadLimits()) == "bad_request"
    assert code_of(*form(("note", b"x" * 5000)), limits=UploadLimits()) == "bad_request"
    assert code_of(kind, multipart(b"b", [(b"Content-Disposition: form-data", b"x")])) == "bad_request"


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_file_names_are_never_used_and_nothing_is_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a file was written")

    for function in ("SpooledTemporaryFile", "TemporaryFile", "NamedTemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, function, refuse)
    limits = UploadLimits()
    data = bytes(3_000_000)
    quoted = name.replace('"', "%22").encode()
    body = multipart(b"b", [(b'Content-Disposition: form-data; name="file"; filename="' + quoted + b'"', data)])
    if b"\0" in quoted:
        assert read("multipart/form-data; boundary=b", body, limits=limits)[0].data == data
    else:
        assert read("multipart/form-data; boundary=b", body, limits=limits) == [Upload(None, data)]


# ---------------------------------------------------------------------------------------------------------------- JSON


def test_json_with_one_and_with_several_pictures() -> None:
    assert read(*document({"image": "eA==", "id": "a"})) == [Upload("a", b"x")]
    assert read(*document({"images": [{"image": "eA=="}, {"image": "eQ==", "id": "b"}]})) == [
        Upload(None, b"x"),
        Upload("b", b"y"),
    ]


@pytest.mark.parametrize(
    "text",
    ["eHk=", " eH\nk=\r\n", "data:image/png;base64,eHk=", "data:;base64,eHk=", "DATA:image/png;BASE64,eHk=",
     "data:image/svg+xml;charset=utf-8;base64,eHk="],
)  # fmt: skip
def test_base64_and_data_urls(text: str) -> None:
    assert read(*document({"image": text}))[0].data == b"xy"


@pytest.mark.parametrize(
    "text",
    ["eHk", "e", "eHk=eHk=", "====", "e-_=", "%%%", "é", "http://host/a.png", "data:image/png,eHk=", "data:", "\ud800"],
)
def test_base64_is_strict(text: str) -> None:
    assert code_of(*document({"image": text})) == "bad_base64"


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b"1", b"null", b"{}", b'{"image": 1}', b'{"image": null}', b'{"images": []}', b'{"images": {}}',
     b'{"image": "eA==", "images": []}', b"\xff", b"[" * 10_000, b'{"image": ' + b"9" * 3_000 + b"}",
     '{"image": "eA=="}'.encode("utf-16"), b'{"images": [7]}', b'{"images": [{}]}'],
)  # fmt: skip
def test_json_faults_are_bad_requests(body: bytes) -> None:
    assert code_of("application/json", body, limits=UploadLimits()) == "bad_request"


def test_json_structure_is_bounded_before_it_is_built() -> None:
    assert code_of("application/json", b"[" + b"[]," * 1_000_000 + b"[]]", limits=UploadLimits()) == "bad_request"


def test_among_several_json_pictures_one_fault_is_its_own() -> None:
    sound, bad, empty = read(*document({"images": [{"image": "eA=="}, {"image": "%", "id": "b"}, {"image": ""}]}))
    assert sound == Upload(None, b"x")
    assert bad.id == "b" and bad.problem is not None and bad.problem.code == "bad_base64"
    assert empty.problem is not None and empty.problem.code == "empty_body"


@pytest.mark.parametrize(
    ("fault", "code"),
    [({"image": "eA==", "id": "\n"}, "bad_parameter"), ({"image": 1}, "bad_request"), ([], "bad_request"),
     ({"image": "eA==", "tasks": ["tag"]}, "bad_parameter")],
)  # fmt: skip
def test_among_several_a_fault_of_form_is_the_whole_request_s(fault: object, code: str) -> None:
    assert code_of(*document({"images": [{"image": "eA=="}, fault]})) == code


@pytest.mark.parametrize("body", [{"image": "eA==", "tasks": "tag"}, {"images": [{"image": "eA=="}], "explain": True}])
def test_a_name_that_nobody_reads_is_refused_and_not_ignored(body: object) -> None:
    assert code_of(*document(body)) == "bad_parameter"


@pytest.mark.parametrize("value", ["", "a\nb", "x" * 129, 1, [], True, "\ud800", "\u202e"])
def test_json_ids_are_checked(value: object) -> None:
    assert code_of(*document({"image": "eA==", "id": value})) == "bad_parameter"


def test_the_query_id_is_for_one_picture() -> None:
    several = form(("file", b"1"), ("file", b"2"))
    assert code_of(*several, "id=a") == "bad_parameter"
    assert read(*form(("file", b"1"), ("id", b"own")), "id=a")[0].id == "own"


# ------------------------------------------------------------------------------------------------------------ the whole


@pytest.mark.parametrize(
    ("told", "size"),
    [("", None), ("-1", None), ("1e3", None), ("0", 0), ("67", 67), ("9" * 18, 10**18 - 1), ("0" * 18 + "67", 10**18)],
)
def test_a_size_is_what_the_request_tells_and_never_less(told: str, size: int | None) -> None:
    headers = [(b"content-length", told.encode())]
    assert declared_bytes(Request({"type": "http", "headers": headers})) == size
    assert declared_bytes(Request({"type": "http", "headers": []})) is None


def test_a_client_that_goes_away_is_not_our_error() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
    with pytest.raises(ClientDisconnect):
        asyncio.run(read_uploads(Request(scope, receive), LIMITS))


def test_all_shapes_lead_to_the_same_picture() -> None:
    data = real_files()["jpeg"]
    app = small_app()
    answers = [
        send(app, "POST", "/v1/analyze?id=a", content=data),
        send(app, "POST", "/v1/analyze", files={"file": ("x.txt", data, "text/plain")}, data={"id": "a"}),
        send(app, "POST", "/v1/analyze", json={"image": b64(data), "id": "a"}),
        send(app, "POST", "/v1/analyze", json={"image": "data:image/gif;base64," + b64(data), "id": "a"}),
    ]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.text for answer in answers}) == 1


def test_several_pictures_answer_in_order_with_their_own_problems() -> None:
    files = [
        ("file", ("a", real_files()["png"])),
        ("file", ("b", b"no picture")),
        ("file", ("c", real_files()["heic"])),
    ]
    answer = send(small_app(), "POST", "/v1/analyze", files=files)
    assert answer.status_code == 200
    first, second, third = answer.json()["items"]
    assert (first["width"], third["width"]) == (48, 48)
    assert (second["code"], second["status"]) == ("not_an_image", 415)


def test_a_chunked_upload_that_is_too_large_is_refused() -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(10_000):
            yield bytes(10_000)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(small_app(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/analyze", content=endless())

    answer = asyncio.run(run())
    assert answer.status_code == 413
    assert answer.headers["content-type"] == MEDIA_TYPE
