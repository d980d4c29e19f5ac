"""The application as ``make serve`` starts it, for programs that measure it. Knows no benchmark."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

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
