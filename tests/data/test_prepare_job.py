"""Preparing as a submitted job of a cluster with token authentication: stopped, submitted again, the same version."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import cluster
from data.versions import open_version, versions
from tests.data.made import ROOT, make_flickr
from tests.jobs import Jobs

pytestmark = [pytest.mark.proof, pytest.mark.slow]


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    port = cluster.free_port()
    yield Jobs(cluster.start(port, num_cpus=2, object_store_bytes=150 * 2**20))
    cluster.stop(port)


def submit(
    jobs: Jobs, raw: Path, output: str, wait: bool = True, token: bool = True
) -> tuple[str, subprocess.CompletedProcess[str]]:
    name = f"prepare-{uuid.uuid4().hex[:8]}"
    entry = ("data.prepare", "flickr30k", "--input", str(raw), "--output", output)
    return name, jobs.submit(name, *entry, wait=wait, token=token)


def test_a_job_that_is_stopped_and_submitted_again_finishes(jobs: Jobs, tmp_path: Path) -> None:
    raw = make_flickr(tmp_path / "raw", range(1500))
    output = tmp_path / "out"
    name, submitted = submit(jobs, raw, str(output), wait=False)
    assert submitted.returncode == 0, submitted.stderr
    jobs.stop_when(name, lambda: bool(list(output.glob("flickr30k/.work/particulars-*/*.parquet"))))
    assert versions(output / "flickr30k") == []

    _, again = submit(jobs, raw, str(output))
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


def test_a_job_without_the_token_or_with_a_relative_path_is_refused(jobs: Jobs, tmp_path: Path) -> None:
    raw = make_flickr(tmp_path / "raw", range(8))
    _, refused = submit(jobs, raw, str(tmp_path / "out"), token=False)
    assert refused.returncode != 0
    assert not (tmp_path / "out").exists()
    _, relative = submit(jobs, raw, "out")
    assert relative.returncode != 0
    assert "'out' is a relative path" in relative.stdout + relative.stderr
