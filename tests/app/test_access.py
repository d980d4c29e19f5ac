"""Lines of requests, headers that Serve can read, and bodies that it does not read too far."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import PlainTextResponse
from ray.serve._private.direct_ingress_http_util import ASGIDIReceiveProxy
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import access
from app.access import HeldBack, Lingering, RequestLines, SoundHeaders, Starting, Taken, middlewares
from app.authentication import RequireKey
from app.keys import VARIABLE, create
from app.problems import Problem
from app.uploads import UploadLimits, read_uploads
from deployments.metrics import METRICS, Metrics
from tests.app.small_app import send, small_app


@pytest.fixture
def app() -> FastAPI:
    app = small_app()
    app.add_middleware(RequestLines)

    @app.get("/counted")
    def counted(request: Request) -> None:
        request.state.pictures = 3

    @app.get("/healthz")
    def healthz() -> None:
        return None

    @app.get("/busy")
    def busy() -> None:
        raise Problem("overloaded", "Try again.")

    return app


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/counted", 200, "ok"),
        ("/busy", 429, "overloaded"),
        ("/nowhere", 404, "not_found"),
        ("/fail", 500, "internal_error"),
        ("/fail?number=x", 422, "bad_parameter"),
    ],
)
def test_each_request_is_a_line_with_its_code(
    app: FastAPI, lines: pytest.LogCaptureFixture, path: str, status: int, code: str
) -> None:
    answer = send(app, "GET", path, headers={"x-request-id": "mine-7"})
    line: Any
    (line,) = (record for record in lines.records if record.message == "request")
    assert (line.method, line.status, line.code) == ("GET", status, code) and line.duration_ms >= 0
    assert getattr(line, "pictures", None) == (3 if path == "/counted" else None)
    if status >= 400:
        assert answer.json()["request_id"] == "mine-7", "whoever asks about it can name it"


def test_a_problem_without_an_id_says_nothing_of_one(app: FastAPI) -> None:
    assert "request_id" not in send(app, "GET", "/nowhere").json()


class Counted:
    """What `RequestLines` has counted: labels of each request."""

    def __init__(self) -> None:
        self.labels: list[tuple[str, ...]] = []

    def record(self, name: str, value: float, *labels: str) -> None:
        assert name == "http_requests" and len(labels) == len(METRICS[name].labels)
        self.labels.append(labels)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(Metrics, "record", lambda self, *arguments: counted.record(*arguments))
    return counted


@pytest.mark.parametrize(
    ("method", "path", "labels"),
    [
        ("GET", "/counted", ("GET /counted", "2xx", "")),
        ("GET", "/things/4711?q=mine", ("GET /things/{number}", "2xx", "")),
        ("DELETE", "/things/4711", ("/things/{number}", "4xx", "")),
        ("GET", "/things/mine", ("GET /things/{number}", "4xx", "")),
        ("GET", "/busy", ("GET /busy", "429", "")),
        ("GET", "/fail", ("GET /fail", "5xx", "")),
        ("GET", "/healthz", ("GET /healthz", "2xx", "")),
        ("GET", "/somebody/made/this/up", ("other", "4xx", "")),
    ],
)
def test_every_request_is_counted_by_its_route_and_not_by_what_it_says(
    app: FastAPI, counted: Counted, method: str, path: str, labels: tuple[str, ...]
) -> None:
    router = APIRouter()

    @router.get("/things/{number}")
    def thing(number: int) -> None:
        return None

    app.include_router(router)
    send(app, method, path)
    assert counted.labels == [labels]


def test_who_is_refused_is_counted_with_the_keys_name(
    counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.json"
    monkeypatch.setenv(VARIABLE, str(file))
    key = create(file, "backend-1", frozenset({"read"}), 0.01, 2)
    app = small_app()
    app.add_middleware(RequireKey)
    app.add_middleware(RequestLines)
    bearer = {"authorization": f"Bearer {key}"}
    send(app, "POST", "/v1/analyze")
    send(app, "DELETE", "/fail", headers=bearer)
    for _ in range(3):
        send(app, "GET", "/fail?number=x", headers=bearer)
    assert counted.labels == [
        ("POST /v1/analyze", "401", ""),
        ("other", "403", "backend-1"),
        ("GET /fail", "4xx", ""),
        ("GET /fail", "4xx", ""),
        ("GET /fail", "429", "backend-1"),
    ]


def test_health_is_no_line(app: FastAPI, lines: pytest.LogCaptureFixture) -> None:
    assert send(app, "GET", "/healthz").status_code == 200
    assert [record for record in lines.records if record.message == "request"] == []


def test_a_proxy_without_an_application_says_that_it_is_starting(app: FastAPI) -> None:
    outside = FastAPI()
    outside.mount("/v1", app)
    outside.add_middleware(Starting)

    @outside.get("/{path:path}")
    def unknown(path: str) -> PlainTextResponse:
        return PlainTextResponse(f"Path '/{path}' not found. Ping http://.../-/routes", 404)

    answer = send(outside, "GET", "/analyze", headers={"x-request-id": "mine-8"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert answer.json()["code"] == "unavailable" and answer.json()["request_id"] == "mine-8"
    assert send(outside, "GET", "/-/routes").status_code == 404, "its own addresses are its own"
    of_the_application = send(outside, "GET", "/v1/nowhere")
    assert (of_the_application.status_code, of_the_application.json()["code"]) == (404, "not_found")
    assert send(outside, "GET", "/v1/counted").status_code == 200


def passed_on(*headers: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    found: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append(scope)

    asyncio.run(SoundHeaders(app)({"type": "http", "headers": list(headers)}, None, None))  # type: ignore[arg-type]
    return found[0]["headers"]


def test_ids_that_can_be_logged_are_passed_on_and_others_are_not() -> None:
    traced = (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    other = (b"x-anything", b"\xff \n")
    for sound in (b"upload-4711", b"0f8fad5b-d9cb-469f-a165-70867728950e", b"a" * 128):
        assert passed_on((b"x-request-id", sound), traced, other) == [(b"x-request-id", sound), traced, other]
    for unsound in (b"\xff\xfe", b"", b"a" * 129, b'x", "level": "x', b"a b", b"\x1b[31m", b"-x"):
        assert passed_on((b"x-request-id", unsound), (b"X-Request-Id", unsound), other) == [other]
        assert passed_on((b"serve_multiplexed_model_id", unsound), (b"serve-multiplexed-model-id", unsound)) == []


@pytest.mark.parametrize("value", [b"0", b"3600", b"?1", b"\xff"])
def test_no_sender_chooses_how_serve_watches_over_a_request(value: bytes) -> None:
    other = (b"x-request-id", b"upload-4711")
    for name in (b"x-request-timeout-seconds", b"X-Request-Disconnect-Disabled", b"x_request_timeout_seconds"):
        assert passed_on((name, value), other) == [other]


# ---- bodies --------------------------------------------------------------------------------------------------------

MIB = 2**20


class Sender:
    """A connection, as a server has it: its body comes as fast as it is read; then the sender stays, or goes away."""

    def __init__(self, pieces: Iterable[bytes], goes_away: bool = False, is_whole: bool = True) -> None:
        self._pieces, self._goes_away, self._is_whole = list(pieces), goes_away, is_whole
        self.bytes_read = self.pieces_read = 0
        self.is_over = asyncio.Event()

    async def receive(self) -> Message:
        if not self._pieces and not self._goes_away:
            await self.is_over.wait()
        if not self._pieces or self.is_over.is_set():
            return {"type": "http.disconnect"}
        piece = self._pieces.pop(0)
        self.bytes_read += len(piece)
        self.pieces_read += 1
        return {"type": "http.request", "body": piece, "more_body": bool(self._pieces) or not self._is_whole}


async def as_serve_does(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """An ingress replica's own server, as far as it is about bodies (``ray.serve._private.replica``)."""
    proxy = ASGIDIReceiveProxy(scope, receive, asyncio.get_running_loop())
    reading = proxy.fetch_until_disconnect_task()
    working = asyncio.ensure_future(app(scope, proxy, send))
    done, _ = await asyncio.wait((reading, working), return_when=asyncio.FIRST_COMPLETED)
    (reading if working in done else working).cancel()
    await working


async def turns(count: int = 100) -> None:
    """All that can go on without the outside has gone on."""
    for _ in range(count):
        await asyncio.sleep(0)


def ask(sender: Sender, work: Callable[[Request], Coroutine[Any, Any, None]], serve: Any = as_serve_does) -> None:
    """One request, from the connection to the application. Nothing of it is left when it is over."""

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await work(Request(scope, receive))

    async def run() -> None:
        asked: Any = {"type": "http", "method": "POST", "headers": []}
        try:
            async with asyncio.timeout(10):
                await HeldBack(partial(serve, Taken(application)))(asked, sender.receive, None)  # type: ignore[arg-type]
        finally:
            sender.is_over.set()
            await turns()
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def pieces_of(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 1000, 2**16, 2**18])
def test_of_a_body_that_nobody_takes_little_is_read(size: int) -> None:
    sender = Sender([b"x" * size] * 4096, is_whole=False)

    async def refuses(request: Request) -> None:
        await turns()

    ask(sender, refuses)
    held = sender.bytes_read + 1024 * sender.pieces_read  # a byte that comes alone takes more than itself
    assert MIB <= held < MIB + size + 1024


@pytest.mark.parametrize("size", [1000, 2**16, 3 * MIB])
def test_a_body_that_is_taken_arrives_whole_and_who_goes_away_then_is_missed(size: int) -> None:
    data = random.Random(7).randbytes(4 * MIB + 1)
    sender, arrived, ahead = Sender(pieces_of(data, size)), bytearray(), [0]

    async def works(request: Request) -> None:
        async for piece in request.stream():
            arrived.extend(piece)
            await turns(3)
            ahead.append(sender.bytes_read - len(arrived))
        sender.is_over.set()
        await asyncio.Event().wait()

    with pytest.raises(asyncio.CancelledError):
        ask(sender, works)
    assert arrived == data and max(ahead) < MIB + size


@pytest.mark.parametrize("size", [MIB // 2, MIB, 2 * MIB])
def test_who_goes_away_is_missed_at_once_where_the_body_is_small_and_else_when_more_is_taken(size: int) -> None:
    sender, taken = Sender(pieces_of(b"x" * size, 2**16), goes_away=True), 0

    async def waits(request: Request) -> None:
        nonlocal taken
        await turns()
        async for _ in request.stream():
            taken += 1
            await turns()

    with pytest.raises(asyncio.CancelledError):
        ask(sender, waits)
    assert taken == max(0, sender.pieces_read - 16)


def test_what_reads_on_after_the_answer_is_not_kept_waiting() -> None:
    async def forgets(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        ASGIDIReceiveProxy(scope, receive, asyncio.get_running_loop()).fetch_until_disconnect_task()
        await turns()

    async def nothing(request: Request) -> None: ...

    sender = Sender([b"x" * 2**16] * 64)
    ask(sender, nothing, forgets)
    assert sender.pieces_read < 20


def test_where_nobody_counts_what_is_taken_nothing_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    sender, arrived = Sender(pieces_of(b"x" * 3 * MIB, 2**16)), bytearray()

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        async for piece in Request(scope, receive).stream():
            arrived.extend(piece)

    monkeypatch.setattr(Taken, "is_counted", False)
    asyncio.run(HeldBack(proxy)({"type": "http"}, sender.receive, None))  # type: ignore[arg-type]
    assert len(arrived) == 3 * MIB


def test_the_real_application_counts_and_serve_is_told_to_hold_back() -> None:
    from app.ingress import api

    assert HeldBack in {each.cls for each in middlewares()}
    assert api.user_middleware[0].cls is Taken, "outside of all that might read a body"


# ------------------------------------------------------------------------------------- answers in the midst of a body


@contextmanager
def serving(app: ASGIApp) -> Iterator[int]:
    """The port of a server of the kind that an ingress replica has."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


async def takes_little(scope: Scope, receive: Receive, send: Send) -> None:
    try:
        await read_uploads(Request(scope, receive), UploadLimits(max_bytes=1000))
    except Problem as problem:
        await problem.to_response(scope)(scope, receive, send)


def sent(port: int, size: int, head: bytes = b"") -> bytes:
    """What a sender hears who reads nothing until all is sent."""
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n" + (head or b"Content-Length: %d\r\n" % size) + b"\r\n")
        for _ in range(size // MIB):
            connection.sendall(b"\xff" * MIB)
        answer = b""
        while piece := connection.recv(MIB):
            answer += piece
        return answer


@pytest.mark.parametrize("head", [b"", b"Transfer-Encoding: chunked\r\n"])
def test_who_sends_too_much_and_reads_afterwards_hears_why(head: bytes) -> None:
    chunked = b"4000000\r\n" if head else b""  # one chunk of 64 MiB
    with serving(Lingering(takes_little)) as port:
        answer = sent(port, 64 * MIB, head and head + b"\r\n" + chunked[:-2])
    assert answer.startswith(b"HTTP/1.1 413 ") and b'"code":"too_large"' in answer.replace(b" ", b"")


def test_who_never_ends_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_LINGER_S", 0.2)
    with serving(Lingering(takes_little)) as port:
        assert sent(port, 0, b"Content-Length: 1000000\r\n").startswith(b"HTTP/1.1 413 ")


def test_a_connection_that_stays_open_is_answered_at_once() -> None:
    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("early")(scope, receive, send)

    told: list[Message] = []

    async def send(message: Message) -> None:
        told.append(message)

    asyncio.run(Lingering(answers)({"type": "http"}, Sender([b"x"], is_whole=False).receive, send))
    assert [message.get("more_body", False) for message in told] == [False, False]
