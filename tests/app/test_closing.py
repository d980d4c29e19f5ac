"""A closed gate refuses what comes, lets those inside finish, and goes on saying how many they are."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
from fastapi import FastAPI

from app.closing import Closing, Gate
from app.deferred import Deferral
from app.problems import install


def test_who_is_inside_is_answered_and_who_comes_is_refused() -> None:
    gate, app = Gate(), FastAPI()
    install(app)
    app.add_middleware(Closing, gate=lambda: gate)

    async def run() -> None:
        goes_on, is_in = asyncio.Event(), asyncio.Event()

        @app.post("/v1/analyze")
        async def analyze() -> str:
            is_in.set()
            await goes_on.wait()
            return "answered"

        @app.get("/readyz")
        async def readyz() -> int:
            return gate.inside

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            early = asyncio.create_task(client.post("/v1/analyze"))
            await is_in.wait()
            gate.closed = True
            late = await client.post("/v1/analyze")
            assert (late.status_code, late.json()["code"]) == (503, "unavailable") and "retry-after" in late.headers
            assert (await client.get("/readyz")).json() == 1
            goes_on.set()
            assert (await early).json() == "answered"
            assert (await client.get("/readyz")).json() == gate.inside == 0

    asyncio.run(run())


def test_a_replica_that_stops_begins_no_picture_that_can_wait() -> None:
    begun: list[bool] = []
    stopping = False

    class Watched(Deferral):
        is_possible = True  # type: ignore[assignment]

        async def _begin_some(self) -> float:
            begun.append(stopping)
            return 0.01

    graph: Any = SimpleNamespace(ready=True)
    queue: Any = None

    async def run() -> None:
        nonlocal stopping
        working = asyncio.create_task(Watched(queue, graph, queue, 1.0, lambda: stopping).run())
        while not begun:
            await asyncio.sleep(0.01)
        stopping = True
        await asyncio.sleep(0.1)
        working.cancel()

    asyncio.run(run())
    assert set(begun) == {False}


def test_every_deployment_may_finish_what_a_request_may_take() -> None:
    from app.config import AppArgs
    from app.main import build

    limits = AppArgs().limits
    seen, waiting = {}, [build(AppArgs(tagger_canary=AppArgs().tagger))._bound_deployment]
    while waiting:
        deployment = waiting.pop()
        seen[deployment.name] = deployment._deployment_config.graceful_shutdown_timeout_s
        for argument in deployment.init_args:
            inner = argument.values() if isinstance(argument, dict) else [argument]
            waiting += [one._bound_deployment for one in inner if hasattr(one, "_bound_deployment")]
    assert len(seen) == 8
    assert all(seconds > limits.request_timeout_s for seconds in seen.values()), seen
