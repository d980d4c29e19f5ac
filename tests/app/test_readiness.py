"""Why a model does not answer: operators are told in full, everybody else in general, and the log has all of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import ray
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve.schema import DeploymentStatus

from app import analysis, ingress, keys
from app.config import CanaryShares
from app.store.settings import StoreSettings
from tests.app.in_process import Model, Service, picture

#: As the last line of what a replica died of may be.
INSIDE = "OSError: /srv/weights/detector-7 is not on db7.internal.example"


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """Its detector cannot be started."""
    message = f"The deployment failed to start 3 times in a row.\n{INSIDE}"
    status = SimpleNamespace(status=DeploymentStatus.DEPLOY_FAILED, message=message)
    applications = {"deeptrust": SimpleNamespace(deployments={"Detector": status})}
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=applications))
    made = Service(tmp_path, monkeypatch)
    made.models["detector"].is_gone = True
    yield made
    made.store.close()


def test_a_replicas_words_are_for_operators_and_stand_in_the_log(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.json"
    monkeypatch.setenv(keys.VARIABLE, str(file))
    scopes: tuple[Any, ...] = ("read", "admin")
    read, admin = (
        {"authorization": f"Bearer {keys.create(file, scope, frozenset({scope}), 500, 500)}"} for scope in scopes
    )

    async def work(client: httpx.AsyncClient) -> None:
        for headers in ({}, read, {"authorization": "Bearer nonsense"}, admin):
            ready = await client.get("/readyz", headers=headers)
            stage = ready.json()["stages"]["detector"]
            assert (ready.status_code, stage["status"]) == (503, "failed")
            assert (INSIDE in stage["message"]) == (headers is admin)
            assert stage["message"] and "deeptrust" not in stage["message"]
        for headers in (read, admin):
            models = (await client.get("/v1/models", headers=headers)).json()
            assert (INSIDE in models["detector"]["message"]) == (headers is admin)
        with monkeypatch.context() as patch:
            patch.setattr(service.store, "_message", f"no connection: {INSIDE}")
            for headers in (read, admin):
                store = (await client.get("/v1/store", headers=headers)).json()
                assert store["state"] == "unavailable" and store["message"]
                assert (INSIDE in store["message"]) == (headers is admin)
                refused = (await client.get("/v1/search", headers=headers)).json()
                assert refused["code"] == "unavailable" and "log says why" in refused["detail"]
                assert INSIDE not in refused["detail"]
        partial = await client.post("/v1/analyze", content=picture(1), headers=read)
        (error,) = partial.json()["errors"]
        assert (error["stage"], error["code"]) == ("detector", "unavailable")
        problem = await client.post("/v1/detect", content=picture(1), headers=read)
        assert (problem.status_code, problem.json()["code"]) == (503, "unavailable")
        for text in (partial.text, problem.text):
            assert "could not be started" in text and "weights" not in text and "internal" not in text

    service.run(work)
    (warning,) = (record for record in lines.records if record.levelno == logging.WARNING)
    assert INSIDE in warning.getMessage() and "detector" in warning.getMessage()
    noted = [record.why for record in lines.records if record.message == "picture"]  # type: ignore[attr-defined]
    assert len(noted) == 2 and all(INSIDE in why["detector"] for why in noted), "with the request's id"


@pytest.mark.parametrize(
    "death", [ActorDiedError(), AioRpcError(StatusCode.CANCELLED, Metadata(), Metadata())], ids=type
)
def test_a_picture_does_not_wait_for_a_model_that_has_died_and_is_known_to_be_gone(
    service: Service, monkeypatch: pytest.MonkeyPatch, death: Exception
) -> None:
    monkeypatch.delenv(keys.VARIABLE, raising=False)
    monkeypatch.setattr(analysis, "_REFRESH_STARTING_S", 0.05)
    tagger = service.models["tagger"]

    async def work(client: httpx.AsyncClient) -> None:
        tagger.fails = death
        running = asyncio.ensure_future(client.post("/v1/analyze", content=picture(3)))
        while tagger.asked < 1:
            await asyncio.sleep(0.01)
        tagger.fails, tagger.waits = None, True  # as Serve's router does without a replica
        while tagger.asked < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert not running.done(), "another may be started"
        tagger.is_gone = True
        await service.ingress.graph.refresh("tagger")
        record = (await asyncio.wait_for(running, 5)).json()
        errors = {error["stage"]: error["code"] for error in record["errors"]}
        assert errors["tagger"] == "unavailable" and record["caption"] is not None

    service.run(work)


def test_where_there_are_no_keys_whoever_asks_is_on_the_machine(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(keys.VARIABLE, raising=False)

    async def work(client: httpx.AsyncClient) -> None:
        stages = (await client.get("/readyz")).json()["stages"]
        assert INSIDE in stages["detector"]["message"]
        assert stages["captioner"] == {"status": "ready", "message": ""}

    service.run(work)


@pytest.mark.parametrize("status", [DeploymentStatus.UPDATING, DeploymentStatus.UNHEALTHY])
def test_a_start_that_is_tried_again_has_not_failed(
    service: Service, monkeypatch: pytest.MonkeyPatch, status: DeploymentStatus
) -> None:
    monkeypatch.delenv(keys.VARIABLE, raising=False)
    told = SimpleNamespace(status=status, message="Retrying.\nOSError: Temporary failure in name resolution")
    applications = {"deeptrust": SimpleNamespace(deployments={"Detector": told})}
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=applications))

    async def work(client: httpx.AsyncClient) -> None:
        assert (await client.get("/readyz")).json()["stages"]["detector"]["status"] == "starting"

    service.run(work)


@pytest.mark.parametrize("is_noticed", [True, False])
def test_production_answers_for_a_canary_that_is_gone_or_hangs(
    service: Service, monkeypatch: pytest.MonkeyPatch, is_noticed: bool
) -> None:
    monkeypatch.delenv(keys.VARIABLE, raising=False)
    monkeypatch.setattr(analysis, "_REFRESH_STARTING_S", 0.05)
    graph, canary = service.ingress.graph, Model("captioner", {"text": "a candidate's words"})
    canary.deployment_name = "CaptionerCanary"
    graph.routes["captioner"].canary, graph.shares = canary, CanaryShares(captioner=1.0)
    if not is_noticed:
        short = service.ingress.limits.model_copy(update={"request_timeout_s": 5.0})
        monkeypatch.setattr(service.ingress, "limits", short)

    async def ask(client: httpx.AsyncClient) -> dict[str, Any]:
        return (await asyncio.wait_for(client.post("/v1/caption", content=picture(5)), 30)).json()

    async def work(client: httpx.AsyncClient) -> None:
        assert (await ask(client))["caption"]["text"] == "a candidate's words"
        canary.waits = True  # as Serve's router does without a replica
        running = asyncio.ensure_future(ask(client))
        while canary.asked < 2:
            await asyncio.sleep(0.01)
        if is_noticed:
            canary.is_gone = True
            await graph.refresh("captioner")
        record = await running
        assert record["caption"]["text"] == "a brown dog" and not record["errors"]
        if is_noticed:
            assert (await ask(client))["caption"]["text"] == "a brown dog" and canary.asked == 2, (
                "it is not asked again"
            )
            canary.is_gone = canary.waits = False
            await graph.refresh("captioner")
            assert (await ask(client))["caption"]["text"] == "a candidate's words"

    service.run(work)


@pytest.mark.parametrize(
    ("url", "addresses", "is_usable"),
    [
        ("sqlite:////srv/store.db", ["10.0.0.11", "10.0.0.11"], True),
        ("sqlite:////srv/store.db", ["10.0.0.11", "10.0.0.12"], False),
        ("postgresql://db7/store", ["10.0.0.11", "10.0.0.12"], True),
    ],
)
def test_a_sqlite_store_is_for_one_node(
    monkeypatch: pytest.MonkeyPatch, url: str, addresses: list[str], is_usable: bool
) -> None:
    gone = {"Alive": False, "NodeManagerHostname": "c", "NodeManagerAddress": "10.0.0.13"}
    alive = [{"Alive": True, "NodeManagerHostname": at, "NodeManagerAddress": at} for at in addresses]
    monkeypatch.setattr(ray, "nodes", lambda: [gone, *alive])
    why = ingress._why_not(StoreSettings(url=url))
    assert (why == "") is is_usable and ("PostgreSQL" in why) is not is_usable
