"""One that stands still must not hold up those who ask the same replica: see `RAY_SERVE_USE_GRPC_BY_DEFAULT` in
`app.cluster.environment`.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from app import cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_a_caller_that_stands_still_holds_up_no_other() -> None:
    port = cluster.free_port(8321)
    instance = cluster.start(port, 4, 100 * 2**20)
    try:
        command = [sys.executable, "-m", "tests.app.stuck_caller", f"127.0.0.1:{instance.gcs_port}"]
        done = subprocess.run(
            command, env=cluster.environment(port), capture_output=True, text=True, timeout=180, check=False
        )
    finally:
        cluster.stop(port)
    assert done.returncode == 0, done.stderr[-2000:]
    seconds = [float(line) for line in done.stdout.split()]
    assert len(seconds) == 5 and max(seconds) < 5, seconds
