"""What the application says of a revision that a model could not load: ``app.canary`` goes by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app import keys
from deployments.replica import Refusal
from tests.app.in_process import Service


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    made = Service(tmp_path, monkeypatch)
    yield made
    made.store.close()


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
