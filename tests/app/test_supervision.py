"""`python -m app.serve` starts Ray again when it dies, with what was deployed last and not with what it began with."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import httpx
import pytest

from app import cluster
from tests.app.load import HTTP, post
from tests.app.small_service import small_service
from tests.waiting import wait_for

pytestmark = [pytest.mark.proof, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_it_comes_back_as_it_was_deployed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPTRUST_STORE_URL", f"sqlite:///{tmp_path}/store.db")
    with small_service(tmp_path) as service:

        def served() -> str:
            with_models = HTTP.get(f"{service.url}/v1/models", timeout=60).json()
            return str(with_models["detector"].get("uri", "")).rsplit("/", 1)[-1]

        service.deployment("Detector")["user_config"]["uri"] = str(tmp_path / "detector-1")
        service.redeploy()
        wait_for(lambda: served() == "detector-1", 900, 0.5)
        time.sleep(20)  # it looks every fifteen seconds what is deployed
        (server,) = (one for one in cluster.daemons(service.port) if one.name() == "gcs_server")
        server.kill()
        seen = set()

        def is_back() -> bool:
            with contextlib.suppress(httpx.TransportError):
                seen.add(HTTP.get(f"{service.url}/v1/models", timeout=60).status_code)
            return "ready again" in service.log.read_text()

        wait_for(is_back, 900, 0.5)
        assert service.process.poll() is None
        assert 404 not in seen, "who asks too early is told to come again"
        assert served() == "detector-1"
        answer = post(service, 1)
        assert answer.status_code == 200 and answer.json()["models"]["detector"].split("#")[0].endswith("detector-1")
        folder = cluster.instance_folder(service.port)
        assert folder.with_name(f"{folder.name}-lost").is_dir(), "what Ray had logged"
    assert cluster.processes(service.port) == []
