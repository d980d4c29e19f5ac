"""One that stands still must not hold up those who ask the same replica: see `RAY_SERVE_USE_GRPC_BY_DEFAULT` in
`app.cluster.environment`.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Any

import pytest

from app import cluster

pytestmark = [pytest.mark.application, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_caller_that_stands_still_holds_up_no_other(application: Any) -> None:
    address = (cluster.instance_folder(application.port) / "ray" / "ray_current_cluster").read_text()
    done = subprocess.run(
        [sys.executable, "-m", "tests.app.stuck_caller", address],
        env=cluster.environment(application.port),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before, meanwhile = ([float(seconds) for seconds in line.split()] for line in done.stdout.splitlines())
    assert len(before) == len(meanwhile) > 0
    assert statistics.median(meanwhile) < 10 * statistics.median(before), (before, meanwhile)
