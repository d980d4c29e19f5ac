"""Requests sent again under an ``Idempotency-Key``: whose they are, what is worked on again, and what is kept.

The ingress's own routes, graph and store, in this process. Of the models only the handles are others': each is
answered by a function here, which can be told to be out of service.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image
from ray import serve
from sqlalchemy import select

from app import idempotency, ingress, keys
from app.callbacks import CallbackSettings
from app.config import Limits
from app.drift import DriftSampleSettings
from app.store.models import Prediction
from app.store.settings import StoreSettings
from app.store.store import Store
from deployments.replica import ModelInfo
from deployments.views import ViewSpec

#: The class behind Serve's wrapping of it.
INGRESS: Any = ingress.Ingress.__mro__[1]
ASYNC = {"prefer": "respond-async"}


class Model:
    """Handle of a deployment whose one replica is this object."""

    def __init__(self, stage: str, answer: dict[str, Any]) -> None:
        self.deployment_name = stage.capitalize()
        self.revision, self.answer = f"{stage}#1", answer
        self.fails: Exception | None = None
        self.asked = 0
        for name in ("info", "detect", "caption", "tag"):
            setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name}")))

    def _info(self) -> asyncio.Task[dict[str, Any]]:
        async def told() -> dict[str, Any]:
            return ModelInfo(uri="here", revision="1", card={}, views=ViewSpec(size_px=32)).model_dump()

        return asyncio.ensure_future(told())

    def _work(self, *_: Any) -> asyncio.Task[dict[str, Any]]:
        async def answered() -> dict[str, Any]:
            self.asked += 1
            if self.fails is not None:
                raise self.fails
            return self.answer | {"model": self.revision}

        return asyncio.ensure_future(answered())

    _detect = _caption = _tag = _work


class Service:
    """The application in this process."""

    def __init__(self, folder: Path) -> None:
        self.models = {
            "detector": Model("detector", {"label": "human", "ai_probability": 0.25}),
            "captioner": Model("captioner", {"text": "a brown dog"}),
            "tagger": Model("tagger", {"tags": ["dog"], "prompt": "tags-1"}),
        }
        store = StoreSettings(url=f"sqlite:///{folder}/store.db", timeout_s=60, search_timeout_s=60)
        self.ingress = INGRESS(
            Limits(), self.models, {}, store, CallbackSettings(), DriftSampleSettings(per_s=0), self.models["detector"]
        )
        self.store: Store = self.ingress.store

    def run(self, work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]) -> None:
        """Do something with a client of the application, while it works on what waits."""

        async def running() -> None:
            for stage in self.models:
                await self.ingress.graph.refresh(stage)
            while self.store.status()["state"] != "ready":
                await asyncio.sleep(0.01)
            deferral = asyncio.ensure_future(self.ingress.deferral.run())
            transport = httpx.ASGITransport(ingress.api)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                await work(client)
            deferral.cancel()

        asyncio.run(running())

    async def rows(self, data: bytes) -> list[tuple[str, str]]:
        """Ids and records of the answers about a picture, all that were offered written."""
        await self.store.commit(lambda connection: None)  # answers are written before it
        wanted = select(Prediction.answer_id, Prediction.record).where(Prediction.sha256 == sha(data))
        return await self.store.read(lambda connection: [tuple(row) for row in connection.execute(wanted)])


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the application looks for API keys."""
    monkeypatch.setenv(keys.VARIABLE, str(tmp_path / "keys.json"))
    return tmp_path / "keys.json"


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("DEEPTRUST_METRICS", "off")
    monkeypatch.setattr(ingress, "_why_not", lambda settings: "")  # it asks Ray for its nodes
    made = Service(tmp_path)
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(servable_object=made.ingress))
    monkeypatch.setattr(ingress.api, "middleware_stack", None)  # whether there are keys is looked up in making it
    yield made
    made.store.close()


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


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
    read: frozenset[Any] = frozenset({"read"})
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
            assert (await post(client, data, "sync-1", **headers)).json()["sha256"] == sha(data)
            assert len(await service.rows(data)) == 1
        again = await post(client, picture(5), "sync-1", **one)
        assert again.status_code == 409

    service.run(work)


def test_without_api_keys_everybody_is_the_same_sender(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(keys.VARIABLE, raising=False)

    async def work(client: httpx.AsyncClient) -> None:
        first, again = [await post(client, picture(1), "upload-1", **ASYNC) for _ in range(2)]
        assert first.headers["location"] == again.headers["location"]

    service.run(work)
    assert idempotency.own("", "upload-1") == "upload-1" and idempotency.own("one", None) is None
    assert idempotency.own("one", "x") not in (idempotency.own("two", "x"), idempotency.own("one", "y"))
