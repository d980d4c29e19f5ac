"""What tests share: the shared data folder, and the one real application that all end-to-end tests talk to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
#: How reasons begin for which a test need not run: what another processor can do and this one cannot.
_MAY_BE_LEFT_OUT = ("without VNNI, ",)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of research data that is not part of the project."""
    folder = os.environ.get("DEEPTRUST_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DEEPTRUST_TEST_DATA names no folder")
    return Path(folder)


@pytest.fixture(scope="session", autouse=True)
def store_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What applications under test keep does not come among what their user's own application keeps."""
    os.environ["DEEPTRUST_STORE_URL"] = f"sqlite:///{tmp_path_factory.mktemp('store')}/store.db"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from tests.app.browser import chromium

    with chromium() as running:
        yield running


@dataclass(frozen=True)
class RunningApplication:
    """The application under test."""

    url: str
    port: int
    log: Path


@pytest.fixture(scope="session")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApplication]:
    """`python -m app.serve` with the starter models, on a port of its own; `DEEPTRUST_TEST_URL` names one that runs
    already.
    """
    import httpx

    from app import cluster
    from tests.serving import served, starting

    if url := os.environ.get("DEEPTRUST_TEST_URL"):
        yield RunningApplication(url.rstrip("/"), int(url.rstrip("/").rsplit(":", 1)[1]), Path("/dev/null"))
        return
    port = cluster.free_port(8123)
    log = tmp_path_factory.mktemp("application") / "serve.log"
    with served(port, log) as process:
        for _ in starting(process, log):
            pass
        assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
        yield RunningApplication(f"http://127.0.0.1:{port}", port, log)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With `DEEPTRUST_TEST_ALL` nothing may be left out but `_MAY_BE_LEFT_OUT`: a proof that did not run is none."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("DEEPTRUST_TEST_ALL") or reporter is None:
        return
    reasons = {str(report.longrepr[2]).removeprefix("Skipped: ") for report in reporter.stats.get("skipped", ())}
    if missing := sorted(reason for reason in reasons if not reason.startswith(_MAY_BE_LEFT_OUT)):
        reporter.write_line(f"\nleft out, and DEEPTRUST_TEST_ALL is set: {'; '.join(missing)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
