"""Lines of requests, and headers that Serve can read."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from app.access import RequestLines, SoundHeaders, Starting
from app.keys import VARIABLE, RequireKey, create
from app.problems import Problem
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
