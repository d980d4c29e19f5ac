"""The application as ``make serve`` starts it, for programs that measure it. Knows no benchmark."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import httpx

from app import cluster
from app.serve import ServeSettings, serving, wait_until_ready


@contextmanager
def application(config: Path | None = None, ready_s: float = 900.0) -> Iterator[cluster.Instance]:
    """The application with all stages ready, on a free port and with a store of its own: another application's queue
    is not to be worked on here. Every process of it is gone afterwards.

    Args:
        config: Serve configuration; None: that of ``make serve``.

    Raises:
        StartError, ClusterError: it did not start.
    """
    settings = ServeSettings() if config is None else ServeSettings(config=config)
    with tempfile.TemporaryDirectory() as folder:
        own = {"PORT": str(cluster.free_port(8312)), "DEEPTRUST_STORE_URL": f"sqlite:///{folder}/store.db"}
        with mock.patch.dict(os.environ, own), serving(settings) as instance:
            wait_until_ready(instance, ready_s)
            yield instance


def wait_for_replicas(
    instance: cluster.Instance, count: int, deployment: str | None = None, timeout_s: float = 600.0
) -> None:
    """Until that many replicas are running, of one deployment or of all.

    Raises:
        RuntimeError: they are not, after ``timeout_s``.
    """
    headers = {"Authorization": f"Bearer {cluster.token(instance.port)}"}
    limit = time.monotonic() + timeout_s
    while time.monotonic() < limit:
        answer = httpx.get(f"{instance.dashboard_url}/api/serve/applications/", headers=headers, timeout=60).json()
        deployments = answer["applications"]["deeptrust"]["deployments"]
        running = {name: sum(r["state"] == "RUNNING" for r in one["replicas"]) for name, one in deployments.items()}
        if (sum(running.values()) if deployment is None else running[deployment]) == count:
            return
        time.sleep(1.0)
    raise RuntimeError(
        f"not {count} replicas after {timeout_s:.0f} s but {running}: choose fewer with --replicas if it is memory"
    )
