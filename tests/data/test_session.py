"""An own Ray knows itself, whatever else runs on the machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from data.session import RaySettings, ray_session


@pytest.mark.slow
def test_an_own_rays_processes_ask_it_and_no_other_instance() -> None:
    # what Ray takes for the raylet of one
    looks = ["raylet", "-c", "import time; time.sleep(600)", "--gcs-address=127.0.0.1:1"]
    another = subprocess.Popen(looks, executable=sys.executable)
    try:
        with ray_session(RaySettings(num_cpus=1, object_store_bytes=100 * 2**20), state_api=True):
            import ray

            @ray.remote
            def nodes() -> list[str]:
                from ray.util.state import list_nodes

                return [node.state for node in list_nodes()]

            assert ray.get(nodes.remote(), timeout=60) == ["ALIVE"]
        assert "RAY_API_SERVER_ADDRESS" not in os.environ
    finally:
        another.kill()
        another.wait()
