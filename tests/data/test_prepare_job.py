"""Preparing as a submitted job of a cluster with token authentication: stopped, submitted again, the same version."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import cluster
from data.versions import open_version, versions
from tests.data.made import ROOT, make_flickr

pytestmark = [pytest.mark.proof, pytest.mark.slow]


@pytest.fixture(scope="module")
def instance() -> Iterator[cluster.Instance]:
    port = cluster.free_port()
    yield cluster.start(port, num_cpus=2, object_store_bytes=150 * 2**20)
    cluster.stop(port)


def job(
    instance: cluster.Instance, verb: str, *options: str, entry: tuple[str, ...] = (), token: bool = True
) -> subprocess.CompletedProcess[str]:
    """``ray job VERB``, with the instance's token or without any."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "job", verb, "--address", instance.dashboard_url, *options),
            *(("--", *entry) if entry else ()),
        ],
        cwd=ROOT,
        env=cluster.environment(instance.port) | ({} if token else {"RAY_AUTH_MODE": "disabled"}),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def submit(
    instance: cluster.Instance, raw: Path, output: str, *options: str, token: bool = True
) -> tuple[str, subprocess.CompletedProcess[str]]:
    name = f"prepare-{uuid.uuid4().hex[:8]}"
    entry = (sys.executable, "-m", "data.prepare", "flickr30k", "--input", str(raw), "--output", output)
    return name, job(
        instance, "submit", "--submission-id", name, "--working-dir", ".", *options, entry=entry, token=token
    )


def test_a_job_that_is_stopped_and_submitted_again_finishes(instance: cluster.Instance, tmp_path: Path) -> None:
    raw = make_flickr(tmp_path / "raw", range(1500))
    output = tmp_path / "out"
    name, submitted = submit(instance, raw, str(output), "--no-wait")
    assert submitted.returncode == 0, submitted.stderr
    deadline = time.monotonic() + 300
    while not list(output.glob("flickr30k/.work/particulars-*/*.parquet")):
        assert time.monotonic() < deadline, job(instance, "logs", name).stdout
        time.sleep(0.05)
    assert job(instance, "stop", name).returncode == 0
    assert "stopped" in job(instance, "status", name).stdout.lower()
    assert versions(output / "flickr30k") == []

    _, again = submit(instance, raw, str(output))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "were identified by an earlier run" in again.stdout
    made = open_version(output / "flickr30k").manifest

    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    plain = [
        sys.executable,
        "-m",
        "data.prepare",
        "flickr30k",
        "--input",
        str(raw),
        "--output",
        str(tmp_path / "plain"),
    ]
    subprocess.run(plain, cwd=ROOT, env=environment, check=True, timeout=400)
    assert made.version == open_version(tmp_path / "plain/flickr30k").manifest.version


def test_a_job_without_the_token_or_with_a_relative_path_is_refused(instance: cluster.Instance, tmp_path: Path) -> None:
    raw = make_flickr(tmp_path / "raw", range(8))
    _, refused = submit(instance, raw, str(tmp_path / "out"), token=False)
    assert refused.returncode != 0
    assert not (tmp_path / "out").exists()
    _, relative = submit(instance, raw, "out")
    assert relative.returncode != 0
    assert "'out' is a relative path" in relative.stdout + relative.stderr
