"""Requests sent again under an ``Idempotency-Key``: whose they are, what is worked on again, and what is kept.

The application in this process (`in_process`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.serve.exceptions import BackPressureError
from sqlalchemy import delete

from app import deferred, idempotency, keys
from app.store.models import Deferred
from deployments.annotation import Annotation, Provenance
from tests.app.in_process import Service, picture, sha

ASYNC = {"prefer": "respond-async"}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the application looks for API keys."""
    monkeypatch.setenv(keys.VARIABLE, str(tmp_path / "keys.json"))
    return tmp_path / "keys.json"


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Service]:
    if "file" not in request.fixturenames:
        monkeypatch.delenv(keys.VARIABLE, raising=False)
    made = Service(tmp_path, monkeypatch)
    yield made
    made.store.close()


async def post(client: httpx.AsyncClient, data: bytes, key: str, **headers: str) -> httpx.Response:
    return await client.post("/v1/analyze", content=data, headers={"idempotency-key": key} | headers)


async def fetched(client: httpx.AsyncClient, place: str, **headers: str) -> Any:
    """The answer at a place as soon as it is there."""
    limit = time.monotonic() + 60
    while (answer := await client.get(place, headers=headers)).status_code == 202 and time.monotonic() < limit:
        await asyncio.sleep(0.02)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_key_is_its_senders_own(file: Path, service: Service) -> None:
    read: frozenset[Any] = frozenset({"read", "feedback"})
    one, two = ({"authorization": f"Bearer {keys.create(file, name, read, 500, 500)}"} for name in ("one", "two"))

    async def work(client: httpx.AsyncClient) -> None:
        first = await post(client, picture(1), "upload-4711", **one, **ASYNC)
        other = await post(client, picture(2), "upload-4711", **two, **ASYNC)
        assert (first.status_code, other.status_code) == (202, 202), other.text
        place = first.headers["location"]
        assert other.headers["location"] != place
        assert (await post(client, picture(1), "upload-4711", **one, **ASYNC)).headers["location"] == place
        assert (await post(client, picture(3), "upload-4711", **one, **ASYNC)).status_code == 409
        # what somebody else can make of the key, and of the id that names the other's API key, leads nowhere
        identity = one["authorization"].split("_")[1]
        for guess in ("upload-4711", f"{identity}\0upload-4711", f"{identity}:\0upload-4711"):
            guessed = await client.get(f"/v1/results/{idempotency.place_of(guess)}", headers=two)
            assert guessed.status_code == 404
        assert (await fetched(client, place, **one))["sha256"] == sha(picture(1))

        for headers, data in ((one, picture(4)), (two, picture(5))):
            answer = (await post(client, data, "sync-1", **headers)).json()
            assert answer["sha256"] == sha(data) and len(await service.kept(data)) == 1
            event, named = {"id": answer["id"], "part": "tags", "right": True}, {"idempotency-key": "said-1"} | headers
            said = [(await client.post("/v1/feedback", json=event, headers=named)).status_code for _ in range(2)]
            assert said == [201, 200], "and so it is with what they say of answers"
        again = await post(client, picture(5), "sync-1", **one)
        assert again.status_code == 409

    service.run(work)


def test_without_api_keys_everybody_is_the_same_sender(service: Service) -> None:

    async def work(client: httpx.AsyncClient) -> None:
        first, again = [await post(client, picture(1), "upload-1", **ASYNC) for _ in range(2)]
        assert first.headers["location"] == again.headers["location"]

    service.run(work)
    assert idempotency.own("", "upload-1") == "upload-1" and idempotency.own("one", None) is None
    assert idempotency.own("one", "x") not in (idempotency.own("two", "x"), idempotency.own("one", "y"))


def test_what_a_stage_left_out_is_worked_on_when_the_request_comes_again(service: Service) -> None:
    models, data, key = service.models, picture(1), "after-an-outage"

    async def work(client: httpx.AsyncClient) -> None:
        models["tagger"].fails = BackPressureError(num_queued_requests=1, max_queued_requests=1)
        first = (await post(client, data, key)).json()
        assert (first["tags"], [error["code"] for error in first["errors"]]) == (None, ["overloaded"])
        assert first["caption"] and first["detection"] and await service.kept(data) == [first]
        models["captioner"].fails = TimeoutError()  # nothing that is missing can be had: then it is what there was
        assert (await post(client, data, key)).json() == first
        event = {"id": first["id"], "part": "caption", "right": True}
        assert (await client.post("/v1/feedback", json=event)).status_code == 201

        models["tagger"].fails = models["captioner"].fails = None
        asked = models["detector"].asked
        second = (await post(client, data, key)).json()
        assert (second["tags"], second["errors"], second["id"]) == (["dog"], [], first["id"])
        assert second["detection"] == first["detection"] and models["detector"].asked == asked, "that was there"
        assert set(second["models"]) == {"detector", "captioner", "tagger", "prompt"}
        assert await service.kept(data) == [second], "the row was completed"
        (found,) = (await client.get("/v1/search", params={"q": "dog", "tag": "dog"})).json()["items"]
        assert found["annotation"] == second and found["feedback"] == ["caption"]
        asked = models["tagger"].asked
        assert (await post(client, data, key)).json() == second and models["tagger"].asked == asked

    service.run(work)


def test_the_same_key_is_one_answer_whether_its_sender_waits_or_not(service: Service) -> None:
    models = service.models

    async def work(client: httpx.AsyncClient) -> None:
        at_once = (await post(client, picture(1), "at once first")).json()
        assert await service.kept(picture(1)) == [at_once]
        later = await post(client, picture(1), "at once first", **ASYNC)
        assert await fetched(client, later.headers["location"]) == at_once

        later = await post(client, picture(2), "later first", **ASYNC)
        record = await fetched(client, later.headers["location"])
        assert (await post(client, picture(2), "later first")).json() == record
        # what was at the place is gone after some hours
        await service.store.commit(lambda connection: connection.execute(delete(Deferred)).rowcount)
        again = await post(client, picture(2), "later first", **ASYNC)
        assert again.headers["location"] == later.headers["location"]
        assert await fetched(client, again.headers["location"]) == record
        assert (await post(client, picture(3), "at once first", **ASYNC)).status_code == 409
        for data in (picture(1), picture(2)):
            assert len(await service.kept(data)) == 1
        assert models["detector"].asked == 2

    service.run(work)


def test_a_place_with_an_answer_that_lacks_something_is_worked_on_when_its_sender_asks_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "_MAX_ATTEMPTS", 1)  # the pauses between them last a minute

    async def work(client: httpx.AsyncClient) -> None:
        service.models["tagger"].fails = BackPressureError(num_queued_requests=1, max_queued_requests=1)
        place = (await post(client, picture(1), "later", **ASYNC)).headers["location"]
        assert (await fetched(client, place))["tags"] is None
        service.models["tagger"].fails = None
        assert (await post(client, picture(1), "later", **ASYNC)).headers["location"] == place
        record = await fetched(client, place)
        assert record["tags"] == ["dog"]
        assert await service.kept(picture(1)) == [record]

    service.run(work)


def test_an_answer_is_completed_by_an_earlier_one_and_says_what_is_still_missing() -> None:
    provenance = Provenance(c2pa="absent", declared_ai=None)
    earlier, again = (Annotation(id="a", sha256="0" * 64) for _ in range(2))
    earlier.captioned({"text": "a dog", "model": "captioner#1"})
    earlier.failed("detector", "timeout", "late")
    earlier.failed("tagger", "overloaded", "full")
    again.detected({"label": "ai", "ai_probability": 0.9, "model": "detector#2"}, provenance)
    again.failed("captioner", "unavailable", "gone")
    again.failed("tagger", "skipped", "there is no caption to tag")
    both = again.completed(earlier)
    assert both.caption == earlier.caption and both.detection == again.detection and not both.is_whole
    assert both.models == {"captioner": "captioner#1", "detector": "detector#2"}
    assert [(error.stage, error.code) for error in both.errors] == [("tagger", "overloaded")]
    assert [error.stage for error in again.errors] == ["captioner", "tagger"], "what it was made of is as it was"
