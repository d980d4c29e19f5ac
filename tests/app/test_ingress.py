"""What the ingress makes of requests beside the pictures in them, with the application in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route

from app import keys
from app.access import route_of
from app.ingress import api
from app.receiving import Receiving
from deployments.replica import Refusal
from tests.app.in_process import Service, picture, sha


@pytest.mark.parametrize("headers", [{}, {"idempotency-key": "upload-1"}])
def test_a_picture_that_is_deleted_while_it_is_analysed_leaves_no_answer(
    service: Service, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    data, begun, go_on = picture(1), asyncio.Event(), asyncio.Event()
    detector: Any = service.models["detector"]

    def late(*asked: Any, at_once: Any = detector.detect.remote) -> asyncio.Future[Any]:
        async def answered() -> Any:
            begun.set()
            await go_on.wait()
            return await at_once(*asked)

        return asyncio.ensure_future(answered())

    monkeypatch.setattr(detector.detect, "remote", late)

    async def work(client: httpx.AsyncClient) -> None:
        asked = asyncio.ensure_future(client.post("/v1/analyze", content=data, headers=headers))
        await begun.wait()
        assert (await client.delete(f"/v1/pictures/{sha(data)}")).status_code == 200
        go_on.set()
        assert (await asked).json()["detection"]["label"] == "human", "whoever sent it is answered"
        assert await service.kept(data) == []
        again = (await client.post("/v1/analyze", content=data, headers=headers)).json()
        assert await service.kept(data) == [again], "sent again it is a picture like any other"

    service.run(work)


def test_who_can_wait_is_told_to_come_back_while_as_many_are_received_as_may(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.ingress, "receiving", Receiving(1, 2**20, max_waiting=4, max_wait_s=0.05))
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        begun.set()
        await go_on.wait()
        yield picture(1)

    async def work(client: httpx.AsyncClient) -> None:
        to, headers = "/v1/analyze", {"prefer": "respond-async"}
        slow = asyncio.ensure_future(client.post(to, content=slowly(), headers=headers))
        await begun.wait()
        refused = await client.post(to, content=picture(2), headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (429, "overloaded") and refused.headers["retry-after"]
        go_on.set()
        assert (await slow).status_code == 202
        assert (await client.post(to, content=picture(2), headers=headers)).status_code == 202

    service.run(work)


def test_an_address_with_another_slash_is_not_there_and_leads_nowhere(service: Service) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        answers = [await client.get(path) for path in ("/v1/models/", "/docs-files", "/docs/")]
        for answer in (await client.post("/v1/analyze/", content=picture(1)), *answers):
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
            assert "location" not in answer.headers

    service.run(work)


def test_no_page_may_be_framed_or_send_forms(service: Service) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        pages = set()
        for path in (route.path for route in api.routes if isinstance(route, Route | APIRoute)):
            answer = await client.get(path)
            if answer.headers["content-type"].startswith("text/html"):
                pages.add(path)
                policy = answer.headers["content-security-policy"].split("; ")
                for part in ("object-src", "base-uri", "frame-ancestors", "form-action"):
                    assert f"{part} 'none'" in policy, path
        assert {"/", "/docs"} <= pages

    service.run(work)


def test_drift_is_the_detectors_alone(service: Service) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        models = (await client.get("/v1/models")).json()
        assert [stage for stage, entry in models.items() if "drift" in entry] == ["detector"]
        assert models["detector"]["drift"]["watching"] is False and models["tagger"]["status"] == "ready"

    service.run(work)


def test_head_is_answered_as_get_without_the_body_to_whoever_may_ask(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(keys.VARIABLE, str(tmp_path / "keys.json"))
    key = keys.create(tmp_path / "keys.json", "one", frozenset({"read"}), 500, 500, per_day=5)
    headers = {"authorization": f"Bearer {key}"}

    async def work(client: httpx.AsyncClient) -> None:
        for path, allowed in (("/healthz", {}), ("/", headers), ("/v1/models", headers)):
            given = await client.get(path, headers=allowed)
            messages = await asked_for_head(path, allowed)
            assert messages[0]["status"] == given.status_code == 200
            assert dict(messages[0]["headers"])[b"content-length"] == str(len(given.content)).encode()
            assert b"".join(message["body"] for message in messages[1:]) == b"" and given.content
            assert messages[-1].get("more_body", False) is False
        assert [(await client.head(path)).status_code for path in ("/", "/v1/models", "/v1/analyze")] == [401] * 3
        refused = await client.head("/v1/analyze", headers=headers)
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        assert (await client.head("/v1/models", headers=headers)).status_code == 429, "they count for the quota"

    service.run(work)
    said = {(line.method, line.status) for line in lines.records if line.message == "request"}  # type: ignore[attr-defined]
    assert {("HEAD", 200), ("HEAD", 401), ("HEAD", 405), ("HEAD", 429)} <= said
    asked = {"type": "http", "app": api, "method": "HEAD", "path": "/v1/models", "root_path": "", "headers": []}
    assert route_of(asked) == "GET /v1/models"


async def asked_for_head(path: str, headers: dict[str, str]) -> list[Any]:
    """What the application sends to its server, which would drop a body of its own accord."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.sleep(0)
        return {"type": "http.disconnect" if sent else "http.request", "body": b"", "more_body": False}

    pairs = [(name.encode(), value.encode()) for name, value in ({"host": "localhost"} | headers).items()]
    scope = {"type": "http", "method": "HEAD", "path": path, "raw_path": path.encode(), "query_string": b""}
    await api(scope | {"root_path": "", "headers": pairs, "http_version": "1.1", "scheme": "http"}, receive, send)
    return sent


def test_operators_are_told_why_a_revision_is_refused_and_others_that_it_is(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(keys.VARIABLE, str(tmp_path / "keys.json"))
    read = keys.create(tmp_path / "keys.json", "one", frozenset({"read"}), 500, 500)
    admin = keys.create(tmp_path / "keys.json", "two", frozenset({"admin"}), 500, 500)
    refused = {"uri": "models:/captioner/2", "why": "OSError: /srv/weights/7 is not on db7.internal.example"}

    async def work(client: httpx.AsyncClient) -> None:
        info = service.ingress.graph.routes["captioner"].info
        assert info is not None
        service.ingress.graph.routes["captioner"].info = info.model_copy(update={"refused": Refusal(**refused)})
        for key, told in ((read, {"uri": refused["uri"]}), (admin, refused)):
            models = (await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})).json()
            assert models["captioner"]["refused"] == told and models["captioner"]["uri"] == "here"
            assert "refused" not in models["detector"] and "refused" not in models["tagger"]

    service.run(work)
