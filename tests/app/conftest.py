"""What tests share: one PostgreSQL server for the session, databases that were never opened, and lines of log."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.app.postgres import Postgres, find_programs, postgres_server
from tests.app.stores import Held, Stores

if TYPE_CHECKING:
    from tests.app.in_process import Service


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server that forgets everything when the machine goes down, and is quick."""
    if find_programs() is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    with postgres_server("fsync=off") as server:
        yield server


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """What Serve's logger gets, which keeps it to itself once Ray has been imported."""
    logger = logging.getLogger("ray.serve")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "ray.serve"):
        yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """The application in this process, without keys unless a test gives it some."""
    from app import keys
    from tests.app.in_process import Service  # with Ray Serve, which most tests here do without

    monkeypatch.delenv(keys.VARIABLE, raising=False)
    made = Service(tmp_path, monkeypatch)
    yield made
    made.store.close()


@pytest.fixture(autouse=True)
def locks_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes of a running configuration wait for no command of the tests' user."""
    from app import canary_config

    monkeypatch.setattr(canary_config, "_LOCKS", tmp_path / "locks")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of the test's own, of either kind, that has never been opened."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/deep/store.db"
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]
    return str(request.getfixturevalue("postgres").url(f"test_{name}"))


@pytest.fixture
def stores(database_url: str, tmp_path: Path) -> Iterator[Stores]:
    """Opens stores on one database of either kind."""
    made = Stores(database_url, tmp_path)
    yield made
    for store in made.opened:
        store.close()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """Holds up work with files until it is told to let go."""
    made = Held(monkeypatch)
    yield made
    made.go_on.set()
