"""The graph by itself: what a picture is not worth any more, and what a trial writes down of one."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from app import analysis
from app.config import CanaryShares
from app.problems import Problem
from deployments.pixels import ViewMismatch
from deployments.replica import ModelInfo
from deployments.views import ViewSpec
from tests.app.in_process import Model, Service, picture


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What has been decoded."""
    seen: list[bytes] = []
    decode = analysis.decode
    monkeypatch.setattr(analysis, "decode", lambda data, limits: seen.append(data) or decode(data, limits))
    return seen


def test_a_picture_whose_time_is_over_when_a_thread_is_free_is_not_decoded(
    service: Service, decoded: list[bytes]
) -> None:
    graph = service.ingress.graph

    async def work(_: httpx.AsyncClient) -> None:
        with pytest.raises(Problem) as late:
            await graph.analyze(picture(1), None, frozenset(analysis.TASKS), None, time.time())
        assert late.value.code == "timeout" and not decoded
        await graph.analyze(picture(2), None, frozenset(analysis.TASKS), None, time.time() + 60)
        assert decoded == [picture(2)]

    service.run(work)


def test_a_picture_that_has_to_be_decoded_again_and_has_no_time_left_is_late(
    service: Service, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, captioner = service.ingress.graph, service.models["captioner"]
    other = ModelInfo(uri="here", revision="2", card={}, views=ViewSpec(size_px=48))

    async def exchanged(_: Any) -> None:
        graph.routes["captioner"].info = other
        now = time.time() + 3600
        monkeypatch.setattr(analysis, "time", SimpleNamespace(time=lambda: now, perf_counter=time.perf_counter))

    async def work(_: httpx.AsyncClient) -> None:
        captioner.fails = ViewMismatch("another revision has come into service")
        monkeypatch.setattr(graph, "refresh", exchanged)
        record = await graph.analyze(picture(1), None, frozenset({"detect", "caption"}), None, time.time() + 60)
        assert [(error.stage, error.code) for error in record.errors] == [("captioner", "timeout")]
        assert decoded == [picture(1)]

    service.run(work)


@pytest.mark.parametrize("mode", ["shares", "shadow"])
def test_of_a_trial_s_times_those_for_heat_maps_are_none(
    service: Service, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    clock = [0.0]
    monkeypatch.setattr(analysis, "time", SimpleNamespace(time=time.time, perf_counter=lambda: clock[0]))
    graph, candidate = service.ingress.graph, Model("detector", {"label": "human", "ai_probability": 0.25})
    graph.routes["detector"].canary = candidate
    setattr(graph, mode, CanaryShares(detector=1.0))

    def takes(model: Model, seconds: float) -> None:
        """Its answers take so long, and a heat map a hundred times that."""

        def remote(*_: Any) -> asyncio.Task[Any]:
            clock[0] += seconds
            return model._work()

        def explain(*_: Any) -> asyncio.Future[Any]:
            clock[0] += 100 * seconds
            maps: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            maps.set_result([[[0.0, 1.0], [1.0, 0.0]]])
            return maps

        model.detect, model.explain = SimpleNamespace(remote=remote), SimpleNamespace(remote=explain)  # type: ignore[attr-defined]

    takes(service.models["detector"], 1.0)
    takes(candidate, 2.0)

    async def work(_: httpx.AsyncClient) -> None:
        record = await graph.analyze(picture(1), None, frozenset({"detect"}), "grid", time.time() + 60)
        assert record.detection is not None and record.detection.heat_map is not None
        await asyncio.gather(*graph._comparing)

    service.run(work)
    rows = {row["role"]: row for row in graph.take_tried()}
    assert {row["role"] for row in rows.values() if row["returned"]} == {
        "candidate" if mode == "shares" else "production"
    }
    assert {role: (row["code"], row["seconds"]) for role, row in rows.items()} == {
        "production": ("ok", 1.0),
        "candidate": ("ok", 2.0),
    }
