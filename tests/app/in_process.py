"""The application in this process: the ingress's own routes, graph and store, without Ray.

Of the models only the handles are others': each is answered by a function here, which can be told to be out of
service. For what the ingress makes of their answers and failures; that they answer is shown by `small_service`.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image
from ray import serve
from sqlalchemy import select

from app import deferred, ingress
from app.callbacks import CallbackSettings
from app.config import Limits
from app.drift import DriftSampleSettings
from app.store.models import Prediction
from app.store.settings import StoreSettings
from app.store.store import Store
from deployments.annotation import Annotation
from deployments.replica import ModelInfo
from deployments.views import ViewSpec

#: The class behind Serve's wrapping of it.
_INGRESS: Any = ingress.Ingress.__mro__[1]


class Model:
    """Handle of a deployment whose one replica is this object."""

    def __init__(self, stage: str, answer: dict[str, Any]) -> None:
        self.deployment_name = stage.capitalize()
        self.revision, self.answer = f"{stage}#1", answer
        self.fails: Exception | None = None
        self.asked, self.is_gone, self.waits = 0, False, False
        for name in ("info", "detect", "caption", "tag"):
            setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name}")))

    def _info(self) -> asyncio.Task[dict[str, Any]]:
        async def told() -> dict[str, Any]:
            if self.is_gone:
                raise RuntimeError("no replica")
            return ModelInfo(uri="here", revision="1", card={}, views=ViewSpec(size_px=32)).model_dump()

        return asyncio.ensure_future(told())

    def _work(self, *_: Any) -> asyncio.Task[dict[str, Any]]:
        async def answered() -> dict[str, Any]:
            self.asked += 1
            if self.fails is not None:
                raise self.fails
            if self.waits:
                await asyncio.sleep(3600)
            return self.answer | {"model": self.revision}

        return asyncio.ensure_future(answered())

    _detect = _caption = _tag = _work


class Service:
    """The application in this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEEPTRUST_METRICS", "off")
        # it asks Ray for its nodes; Serve's pickling has given the class globals of its own
        monkeypatch.setitem(_INGRESS.__init__.__globals__, "_why_not", lambda settings: "")
        monkeypatch.setattr(deferred, "_LOOK_S", 0.05)  # nobody waits for a test's pictures to be looked for
        # whether there are keys is looked up when it is made
        monkeypatch.setattr(ingress.api, "middleware_stack", None)
        self.models = {
            "detector": Model("detector", {"label": "human", "ai_probability": 0.25}),
            "captioner": Model("captioner", {"text": "a brown dog"}),
            "tagger": Model("tagger", {"tags": ["dog"], "prompt": "tags-1"}),
        }
        store = StoreSettings(url=f"sqlite:///{folder}/store.db", timeout_s=60, search_timeout_s=60)
        self.ingress = _INGRESS(
            Limits(), self.models, {}, store, CallbackSettings(), DriftSampleSettings(per_s=0), self.models["detector"]
        )
        self.store: Store = self.ingress.store
        monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(servable_object=self.ingress))

    def run(self, work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]) -> None:
        """Do something with a client of the application, while it works on what waits."""

        async def running() -> None:
            for stage in self.models:
                await self.ingress.graph.refresh(stage)
            while self.store.status()["state"] != "ready":
                await asyncio.sleep(0.01)
            deferral = asyncio.ensure_future(self.ingress.deferral.run())
            transport = httpx.ASGITransport(ingress.api)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                await work(client)
            deferral.cancel()

        asyncio.run(running())

    async def kept(self, data: bytes) -> list[Any]:
        """The answers about a picture that are kept, all that were offered written."""
        await self.store.commit(lambda connection: None)  # answers are written before it
        wanted = select(Prediction.record).where(Prediction.sha256 == sha(data))
        records = await self.store.read(lambda connection: connection.execute(wanted).scalars().all())
        return [Annotation.model_validate_json(record).model_dump(mode="json") for record in records]


def picture(number: int) -> bytes:
    """A small PNG; each number another one."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def sha(data: bytes) -> str:
    """As answers have it."""
    return hashlib.sha256(data).hexdigest()
