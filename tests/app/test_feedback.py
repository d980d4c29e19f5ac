"""Feedback, search and deletion over HTTP, in a real server: what is answered, what is refused, and what of it is there
after the process was killed.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import random
import sqlite3
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image

from app import feedback
from app.problems import CODES, MEDIA_TYPE, install
from app.store.settings import StoreSettings
from app.store.store import Store
from tests.app.small_store import SmallStore, running_store


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallStore]:
    folder = tmp_path_factory.mktemp("store")
    settings = StoreSettings(url=f"sqlite:///{folder}/store.db", timeout_s=3.0, search_timeout_s=60)
    with running_store(settings) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: SmallStore) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def picture(number: int) -> bytes:
    """A picture of its own for every number."""
    buffer = io.BytesIO()
    Image.frombytes("L", (640, 480), random.Random(number).randbytes(640 * 480)).save(buffer, "PNG")
    return buffer.getvalue()


def analyze(http: httpx.Client, data: bytes, **query: Any) -> dict[str, Any]:
    answer = http.post("/v1/analyze", content=data, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def say(http: httpx.Client, answer: dict[str, Any], **event: Any) -> httpx.Response:
    return http.post("/v1/feedback", json={"id": answer["id"], "part": "verdict", "right": False} | event)


def test_each_part_of_an_answer_just_given_can_be_judged(http: httpx.Client) -> None:
    answer = analyze(http, picture(1))
    for event in (
        {"part": "verdict", "right": False, "value": "human"},
        {"part": "caption", "right": False, "value": "a <b>better</b> caption"},
        {"part": "tags", "right": False, "value": ["dog", "meadow"], "by": "moderator-4"},
        {"part": "tags", "right": True},
    ):
        said = say(http, answer, **event, sha256=answer["sha256"])
        assert said.status_code == 201, said.text
        assert said.json()["sha256"] == answer["sha256"] and said.json()["picture"] == "wanted"
    (item,) = http.get("/v1/search", params={"limit": 1}).json()["items"]
    assert item["annotation"] == answer and item["feedback"] == ["caption", "tags", "verdict"]


def test_the_same_event_twice_is_one(http: httpx.Client) -> None:
    answer, headers = analyze(http, picture(2)), {"Idempotency-Key": uuid.uuid4().hex}
    event = {"id": answer["id"], "part": "verdict", "right": True}
    answers = [http.post("/v1/feedback", json=event, headers=headers) for _ in range(3)]
    assert [each.status_code for each in answers] == [201, 200, 200]
    assert len({each.text for each in answers}) == 1
    other = http.post("/v1/feedback", json=event | {"right": False}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (409, "conflict")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"id": "nobody has this"}, "not_found"),
        ({"sha256": "0" * 64}, "not_found"),
        ({"part": "tags", "value": ["m" * 10_000]}, "bad_parameter"),
        ({"part": "tags", "value": ["m" * 33]}, "bad_parameter"),
        ({"part": "tags", "value": ["Upper"]}, "bad_parameter"),
        ({"part": "tags", "value": ["tag"] * 33}, "bad_parameter"),
        ({"part": "tags", "value": "tag"}, "bad_parameter"),
        ({"part": "caption", "value": "m" * 513}, "bad_parameter"),
        ({"part": "caption", "value": "a\0b"}, "bad_parameter"),
        ({"part": "verdict", "value": "uncertain"}, "bad_parameter"),
        ({"part": "colour"}, "bad_parameter"),
        ({"right": "perhaps"}, "bad_parameter"),
        ({"sha256": "ABC"}, "bad_parameter"),
        ({"surprise": 1}, "bad_parameter"),
        ({"by": "m" * 70_000}, "too_large"),
    ],
)
def test_what_cannot_be_kept_is_refused(http: httpx.Client, change: dict[str, Any], code: str) -> None:
    answer = analyze(http, picture(3))
    refused = say(http, answer, **change)
    assert (refused.status_code, refused.json()["code"]) == (CODES[code][0], code)
    assert refused.headers["content-type"] == MEDIA_TYPE
    assert len(refused.content) < 2000


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        (b"", "application/json", "empty_body"),
        (b"{", "application/json", "bad_request"),
        (b"[" * 10_000, "application/json", "bad_request"),
        (b'"\\ud800"', "application/json", "bad_request"),
        (b"[]", "application/json", "bad_parameter"),
        (b'{"id": "a"}', "text/plain", "unsupported_media_type"),
    ],
)
def test_what_is_no_event_is_refused(http: httpx.Client, body: bytes, kind: str, code: str) -> None:
    refused = http.post("/v1/feedback", content=body, headers={"content-type": kind})
    assert (refused.status_code, refused.json()["code"]) == (CODES[code][0], code)


def test_a_picture_is_taken_after_feedback_shown_and_deleted_everywhere(http: httpx.Client) -> None:
    data = picture(4)
    answer = analyze(http, data, caption="a secret zebra")
    address = f"/v1/pictures/{answer['sha256']}"
    assert http.put(address, content=data).json()["code"] == "not_found", "nobody said anything of it yet"
    assert http.get(address).status_code == 404
    say(http, answer)
    assert http.put(address, content=picture(5)).json()["code"] == "bad_parameter"
    assert http.put(address, content=data).status_code == 201
    shown, small = http.get(address), http.get(address, params={"size": "small"})
    assert (shown.content, shown.headers["content-type"]) == (data, "image/png")
    assert small.headers["content-type"] == "image/jpeg" and len(small.content) < len(data)
    for each in (shown, small):
        assert "sandbox" in each.headers["content-security-policy"] and each.headers["cache-control"] == "no-store"
        assert each.headers["x-content-type-options"] == "nosniff"
    (item,) = http.get("/v1/search", params={"q": "zebra"}).json()["items"]
    assert item["picture"]
    gone = http.delete(address)
    assert (gone.status_code, gone.json()) == (200, {"pictures": 1, "predictions": 1, "feedback": 1})
    assert http.delete(address).json() == {"pictures": 0, "predictions": 0, "feedback": 0}
    assert http.get(address).status_code == 404 and say(http, answer).status_code == 404
    assert http.get("/v1/search", params={"q": "zebra"}).json() == {"items": [], "next": None}


def test_search_by_words_verdict_tags_and_dates_in_pages(http: httpx.Client) -> None:
    wanted = [
        analyze(
            http,
            picture(10 + i),
            caption=f"giraffe number {i}",
            label="human" if i % 2 else "ai",
            tag=["tall", f"t{i}"],
        )
        for i in range(5)
    ]
    say(http, wanted[-1])  # answers are written behind the request, and before what is said of them
    seen: list[str] = []
    cursor = None
    while True:
        query = {"q": "giraffes", "limit": 2} | ({"cursor": cursor} if cursor else {})
        page = http.get("/v1/search", params=query).json()
        seen += [item["annotation"]["id"] for item in page["items"]]
        if (cursor := page["next"]) is None:
            break
    assert seen == [answer["id"] for answer in reversed(wanted)]

    def ids(**query: Any) -> list[str]:
        return [item["annotation"]["id"] for item in http.get("/v1/search", params=query).json()["items"]]

    assert ids(q="giraffe", verdict="human") == [wanted[3]["id"], wanted[1]["id"]]
    assert ids(tag=["tall", "t2"]) == [wanted[2]["id"]]
    assert len(ids(tag="tall", **{"from": "2020-01-01T00:00:00Z", "to": "9999-12-31T23:59:59Z"})) == 5
    assert ids(tag="tall", to="0001-01-01T00:00:00Z") == ids(tag="tall", **{"from": "2100-01-01T00:00:00+01:00"}) == []


@pytest.mark.parametrize(
    "query",
    [
        "verdict=robot",
        "limit=0",
        "limit=101",
        "cursor=x",
        "from=yesterday",
        "from=2026-01-01",
        "from=1767225600",
        "to=0.5",
        "to=-1e3",
        "tag=UPPER",
        f"q={'m' * 201}",
    ],
)
def test_a_search_that_is_none_is_refused(http: httpx.Client, query: str) -> None:
    refused = http.get(f"/v1/search?{query}")
    assert (refused.status_code, refused.json()["code"]) == (422, "bad_parameter")


def test_while_the_database_is_locked_feedback_is_told_when_to_come_back_and_analysis_goes_on(
    server: SmallStore, http: httpx.Client
) -> None:
    before = analyze(http, picture(20))
    assert say(http, before).status_code == 201
    lock = sqlite3.connect(server.settings.database_url.removeprefix("sqlite:///"), isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    try:
        refused = say(http, before, part="caption")
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) > 0
        assert "sqlite" not in refused.text and "/" not in refused.json()["detail"], "nothing of the inside"
        during = analyze(http, picture(21))
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    limit = time.monotonic() + 60
    while (said := say(http, during)).status_code != 201:
        assert said.status_code in (503, 404) and time.monotonic() < limit
        time.sleep(0.2)
    assert http.get("/v1/store").json()["dropped"] == 0


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [("POST", "/v1/feedback", "application/json"), ("PUT", f"/v1/pictures/{'0' * 64}", "image/png")],
)
def test_a_body_that_stalls_is_given_up_and_keeps_no_place(
    monkeypatch: pytest.MonkeyPatch, method: str, path: str, kind: str
) -> None:
    monkeypatch.setattr(feedback, "_BODY_S", 0.05)
    store, app = Store(StoreSettings(keep="off")), FastAPI()

    async def store_of() -> Store:
        return store

    install(app)
    app.include_router(feedback.router(store_of))

    async def stalls() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            async with asyncio.timeout(5):  # what this is about would take for ever
                return await client.request(method, path, content=stalls(), headers={"content-type": kind})

    answer = asyncio.run(run())
    assert (answer.status_code, answer.json()["code"]) == (504, "timeout")
    assert store.taking_in == 0


def test_the_routes_are_documented_with_examples(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    post = paths["/v1/feedback"]["post"]
    assert set(post["requestBody"]["content"]["application/json"]["examples"]) == {"verdict", "caption", "tags"}
    assert {"200", "201", "404", "409", "422", "503", "504"} <= set(post["responses"])
    assert {"get", "put", "delete"} <= set(paths["/v1/pictures/{sha256}"])
    assert {each["name"] for each in paths["/v1/search"]["get"]["parameters"]} == {
        *("q", "verdict", "tag", "from", "to", "limit", "cursor")
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_feedback_that_was_acknowledged_is_there_once_after_five_kills(tmp_path: Path) -> None:
    """1,000 events, each sent until it is acknowledged, some twice, while the process is killed five times."""
    server = SmallStore(StoreSettings(url=f"sqlite:///{tmp_path}/store.db"))
    server.start()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        answers = [analyze(client, f"picture {i}".encode()) for i in range(100)]
        # answers are written behind the request; one that is judged is on disk
        assert all(say(client, answer, part="tags").status_code == 201 for answer in answers)
    acknowledged: dict[str, str] = {}
    over = threading.Event()
    local = threading.local()

    def send(number: int) -> None:
        key = f"event-{number}"
        event = {
            "id": answers[number % 100]["id"],
            "part": "verdict",
            "right": bool(number % 2),
            "by": f"user {number}",
        }
        times = 2 if number % 10 == 0 else 1
        while times:
            if not hasattr(local, "client"):
                local.client = httpx.Client(base_url=server.url, timeout=10)
            try:
                answer = local.client.post("/v1/feedback", json=event, headers={"Idempotency-Key": key})
            except httpx.HTTPError:
                time.sleep(0.05)
                continue
            if answer.status_code == 503:
                time.sleep(0.05)
                continue
            assert answer.status_code in (200, 201), answer.text
            assert acknowledged.setdefault(key, answer.json()["id"]) == answer.json()["id"]
            times -= 1

    def kill() -> None:
        chance = random.Random(1)
        for goal in (100, 280, 460, 640, 820):
            while len(acknowledged) < goal:
                if over.wait(0.002):
                    return
            time.sleep(chance.random() * 0.05)
            server.kill()
            server.start()
            kills.append(len(acknowledged))

    kills: list[int] = []
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(send, range(1000)))
    finally:
        over.set()
        killer.join()
        server.kill()
    assert len(kills) == 5 and kills[-1] < 1000, "killed while events were sent"
    assert len(acknowledged) == 1000
    with sqlite3.connect(tmp_path / "store.db") as connection:
        kept = connection.execute("SELECT key, id FROM feedback WHERE part = 'verdict'").fetchall()
    assert sorted(kept) == sorted((f"key:{key}", int(row_id)) for key, row_id in acknowledged.items())
    assert hashlib.sha256(b"picture 7").hexdigest() == answers[7]["sha256"]
