"""The supervisor: a Ray that dies is noticed, also while it starts, and started again until it serves; told to stop, it
waits for what was accepted. Ray's part is played by small processes; the real one is in test_supervision.py.
"""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from app import cluster, serve

PORT = 8995
INSTANCE = cluster.Instance(PORT, 0, 0)


class Daemon(psutil.Process):
    """A process under a name of Ray's."""

    def __init__(self, pid: int, name: str) -> None:
        super().__init__(pid)
        self._called = name

    def name(self) -> str:
        return self._called


@pytest.fixture
def daemons(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Processes that stand for Ray's own, by name."""
    program = [sys.executable, "-c", "import time; time.sleep(60)"]
    processes = {name: subprocess.Popen(program) for name in ("gcs_server", "raylet")}

    def living(port: int) -> list[Daemon]:
        return [Daemon(one.pid, name) for name, one in processes.items() if one.poll() is None]

    monkeypatch.setattr(cluster, "daemons", living)
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


def test_a_daemon_that_dies_or_was_never_there_is_named(
    daemons: dict[str, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    life = serve.Life(PORT)
    assert life.why_dead() == ""
    daemons["gcs_server"].kill()
    daemons["gcs_server"].wait()
    assert life.why_dead() == "gcs_server ended"
    monkeypatch.setattr(cluster, "daemons", lambda port: [])
    assert serve.Life(PORT).why_dead() == "gcs_server and raylet ended"


def test_a_death_while_models_load_ends_the_wait_for_them(
    daemons: dict[str, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "token", lambda port: "token")
    killer = threading.Timer(0.3, daemons["gcs_server"].kill)
    killer.start()
    with pytest.raises(serve.StartError, match=r"Ray died while the models were loaded \(gcs_server ended\)"):
        serve.wait_until_ready(INSTANCE, timeout_s=60)
    killer.join()


def test_pauses_grow_to_a_bound_and_begin_anew_after_a_start_that_lasted() -> None:
    pauses = serve.Pauses(first_s=5, most_s=300)
    assert [pauses.next() for _ in range(9)] == [0, 5, 10, 20, 40, 80, 160, 300, 300]
    assert {pauses.next() for _ in range(2000)} == {300}
    pauses.reset()
    assert [pauses.next(), pauses.next()] == [0, 5]


def test_it_is_started_again_until_it_serves_and_each_failure_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures: list[Exception | None] = [
        cluster.ClusterError("Ray did not start (exit 1)"),
        serve.StartError("Ray died while the models were loaded"),
        OSError(28, "No space left on device"),
        None,
    ]
    deployed: list[Any] = []

    def wait(instance: cluster.Instance, timeout_s: float) -> float:
        if (failure := failures.pop(0)) is not None:
            raise failure
        return 1.0

    monkeypatch.setattr(cluster, "stop_ray", lambda port: 0)
    monkeypatch.setattr(cluster, "keep_logs", lambda port, name="lost": None)
    monkeypatch.setattr(cluster, "token", lambda port: "token")
    monkeypatch.setattr(cluster, "start", lambda port, cpus, size: INSTANCE)
    monkeypatch.setattr(serve, "prepare", lambda settings: {"applications": ["as at first"]})
    monkeypatch.setattr(serve, "deploy", lambda instance, config: deployed.append(config["applications"]))
    monkeypatch.setattr(serve, "wait_until_ready", wait)
    pauses = serve.Pauses(first_s=0.01, most_s=0.02)
    serve._start_again(INSTANCE, serve.ServeSettings(), [{"name": "as last"}], "raylet ended", pauses)
    told = capsys.readouterr().out
    assert deployed == [[{"name": "as last"}]] * 4
    assert told.count("not started: ") == 3 and "No space left" in told and "ready again" in told


class FakeServe(http.server.BaseHTTPRequestHandler):
    """Ray's REST interface and the application's `/readyz`, as far as a stop asks them."""

    protocol_version = "HTTP/1.1"
    inside: list[int]
    """Requests inside, from look to look."""
    config: dict[str, Any]
    asked: list[str]

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/readyz":
            self.asked.append("ready")
            left = self.inside.pop(0) if len(self.inside) > 1 else self.inside[0]
            self._answer({"ready": False, "stages": {}, "stopping": {"replica": "one", "inside": left}})
            return
        replicas = [{"replica_id": "one", "state": "RUNNING"}, {"replica_id": "two", "state": "STOPPING"}]
        application = {"deployed_app_config": self.config, "deployments": {"Ingress": {"replicas": replicas}}}
        self._answer({"applications": {"deeptrust": application}})

    def do_PUT(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        type(self).config = body["applications"][0]
        self.asked.append("put")
        self._answer({})

    def do_DELETE(self) -> None:
        self.asked.append("delete")
        self._answer({})


@pytest.fixture
def instance(daemons: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[cluster.Instance]:
    FakeServe.asked, FakeServe.inside = [], [0]
    FakeServe.config = {
        "name": "deeptrust",
        "args": {"limits": {"request_timeout_s": 1}},
        "deployments": [{"name": "Ingress", "user_config": {"canary": {"detector": 0.5}}}],
    }
    monkeypatch.setattr(cluster, "token", lambda port: "token")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeServe) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield cluster.Instance(server.server_port, 0, server.server_port)
        server.shutdown()
        thread.join()


def test_a_stop_lets_nobody_in_waits_for_those_inside_and_then_ends_serve(instance: cluster.Instance) -> None:
    FakeServe.inside = [2, 1, 0]
    serve.finish_accepted(instance)
    assert FakeServe.config["deployments"][0]["user_config"] == {"canary": {"detector": 0.5}, "stopping": True}
    assert FakeServe.asked == ["put", "ready", "ready", "ready", "delete"]


def test_a_stop_waits_no_longer_than_a_request_may_take(
    instance: cluster.Instance, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "_MARGIN_S", -0.7)
    FakeServe.inside = [3]
    serve.finish_accepted(instance)
    assert FakeServe.asked[-1] == "delete"
    assert "requests were not finished: 3" in capsys.readouterr().out


def test_a_stop_of_a_ray_that_is_dead_asks_nothing(
    instance: cluster.Instance, daemons: dict[str, subprocess.Popen[bytes]]
) -> None:
    daemons["raylet"].kill()
    daemons["raylet"].wait()
    serve.finish_accepted(instance)
    assert FakeServe.asked == []


def test_told_again_it_stops_at_once(instance: cluster.Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[float] = []

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    monkeypatch.setattr(serve, "_deployed", interrupt)
    monkeypatch.setattr(serve, "_wait_until_left", interrupt)
    monkeypatch.setattr(cluster, "stop", lambda port, patience_s: stopped.append(patience_s))
    serve.supervise(instance, serve.ServeSettings())
    assert stopped == [0.0] and "delete" not in FakeServe.asked
