"""Whether a run stops for serving, and when it may go on. The whole way, on a cluster, is in ``test_train_jobs``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import SimpleNamespace

import pytest

from tests.waiting import wait_for
from train import giving_way
from train.giving_way import GiveWay, Resource, wait_for_room


class Cluster:
    """What Ray would tell: replicas that wait, and what is free."""

    def __init__(self, free: float = 1.0, **waiting: str) -> None:
        self.waiting: Mapping[str, str] = waiting
        self.free = free
        self.asked = 0
        self.fails = False

    def ask(self, resource: Resource) -> Mapping[str, str]:
        self.asked += 1
        if self.fails:
            raise ConnectionError("the dashboard is gone")
        return self.waiting

    def available_resources(self) -> dict[str, float]:
        return {"GPU": self.free}


def test_a_run_gives_way_only_to_a_replica_that_goes_on_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, clock = Cluster(a="Tagger"), SimpleNamespace(now=0.0)
    monkeypatch.setattr(giving_way, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with GiveWay("GPU", 60.0, cluster.ask, every_s=0.002) as way:

        def gives_way() -> str:
            """What it says once it has asked and thought about the answer."""
            before = cluster.asked
            wait_for(lambda: way.to or cluster.asked >= before + 2)
            return way.to

        assert not gives_way()
        clock.now = 59.0
        assert not gives_way()
        cluster.waiting = {"b": "Detector"}  # the first has started: the clock begins anew
        assert not gives_way()
        clock.now = 118.0
        assert not gives_way()
        clock.now = 119.0
        assert gives_way() == "Detector"


def test_a_dashboard_that_does_not_answer_stops_no_run() -> None:
    cluster = Cluster(a="Tagger")
    cluster.fails = True
    with GiveWay("GPU", 0.0, cluster.ask, every_s=0.02) as way:
        wait_for(lambda: cluster.asked > 3, 10)
        assert not way.to
        cluster.fails = False
        wait_for(lambda: way.to == "Tagger", 10)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr("ray.available_resources", cluster.available_resources)
    for name, value in {"_ASK_S": 0.02, "_SETTLED_S": 0.2, "_NO_HELP_S": 0.5, "_SAY_S": 0.1}.items():
        monkeypatch.setattr(giving_way, name, value)
    return cluster


def test_a_run_goes_on_when_there_has_been_room_for_a_while(quick: Cluster) -> None:
    began, lines = time.monotonic(), list[str]()
    assert wait_for_room("GPU", 1.0, time.time() + 10, quick.ask, lines.append) == "room"
    assert time.monotonic() - began >= 0.2
    quick.free, quick.waiting = 0.5, {"a": "Tagger"}
    lines.clear()
    assert wait_for_room("GPU", 1.0, time.time() + 1, quick.ask, lines.append) == "time"
    assert lines[0] == "serving comes first: waiting for 1 GPU, 0.5 free; before this run: Tagger"
    assert len(lines) >= 2, "people see that it still waits"


def test_a_replica_that_waits_for_something_else_does_not_keep_a_run_for_ever(quick: Cluster) -> None:
    quick.waiting = {"a": "Tagger"}
    assert wait_for_room("GPU", 1.0, time.time() + 10, quick.ask, lambda line: None) == "no help"
    quick.fails = True  # nobody knows: not before its time is over
    assert wait_for_room("GPU", 1.0, time.time() + 1, quick.ask, lambda line: None) == "time"
