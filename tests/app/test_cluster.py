"""A local instance: what belongs to it is found and ended, what does not is left alone."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from app import cluster
from tests.serving import served, starting

SLEEPER = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of the instance here. It is held: nothing of the instance listens, and who asks for a free one meanwhile, as
    another checkout's tests do, gets another.
    """
    with socket.create_server(("127.0.0.1", 0)) as held:
        yield held.getsockname()[1]


@pytest.fixture
def folder(port: int) -> Iterator[Path]:
    path = cluster.instance_folder(port)
    path.mkdir(mode=0o700, exist_ok=True)
    yield path
    cluster.stop(port, patience_s=0.5)


def test_stop_ends_what_bears_the_mark_even_if_it_will_not_listen_and_nothing_else(folder: Path, port: int) -> None:
    marked = subprocess.Popen(SLEEPER, env=os.environ | {"DEEPTRUST_INSTANCE": str(port)})
    other = subprocess.Popen(SLEEPER, env=os.environ | {"DEEPTRUST_INSTANCE": f"{port}9"})
    try:
        time.sleep(0.3)
        assert cluster.stop(port, patience_s=1.0) == 1
        assert marked.wait(5) is not None  # stop has reaped it: the code is lost, the end is not
        assert other.poll() is None
        assert not folder.exists()
    finally:
        other.kill()
        other.wait()


def test_stop_ends_what_has_lost_the_mark_and_then_its_parent(folder: Path, port: int) -> None:
    """As Ray's agents do: their title stands where the mark was, and they outlive the raylet."""
    program = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], env={}, start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    environment = os.environ | {"DEEPTRUST_INSTANCE": str(port)}
    command = [sys.executable, "-c", program, SLEEPER[2]]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.3)  # until it ignores SIGTERM: it must be found again when its parent is gone
        assert cluster.stop(port, patience_s=1.0) == 2
    assert not cluster.runs(child)
    assert not folder.exists()


def test_what_runs_beside_ray_goes_on_with_its_data_until_everything_is_stopped(folder: Path, port: int) -> None:
    from app.monitoring import environment

    ray = subprocess.Popen(SLEEPER, env=os.environ | {"DEEPTRUST_INSTANCE": str(port)})
    prometheus = subprocess.Popen(SLEEPER, env=environment(port))
    history = cluster.metrics_folder(port) / "tsdb"
    history.mkdir(parents=True)
    (folder / "ray").mkdir()
    (folder / "owner.pid").write_text("1")
    try:
        time.sleep(0.3)
        assert cluster.stop_ray(port, patience_s=0.2) == 1
        assert ray.wait(5) is not None and prometheus.poll() is None
        assert history.is_dir() and (folder / "owner.pid").exists() and not (folder / "ray").exists()
        assert cluster.stop(port, patience_s=0.2) == 1
        assert prometheus.wait(5) is not None and not folder.exists()
    finally:
        for process in (ray, prometheus):
            process.kill()
            process.wait()


def test_it_is_told_to_stop_once_and_then_again(folder: Path, port: int) -> None:
    assert cluster.ask_to_stop(port)
    assert not cluster.ask_to_stop(port)


def test_the_process_in_the_foreground_is_part_of_the_instance(folder: Path, port: int) -> None:
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)  # app.serve"])
    (folder / "owner.pid").write_text(str(owner.pid))
    assert [process.pid for process in cluster.processes(port)] == [owner.pid]
    cluster.stop(port, patience_s=2.0)
    assert owner.wait(5) is not None


def test_stop_asks_the_process_in_the_foreground_first_and_the_second_time_ends_all(folder: Path, port: int) -> None:
    """It takes its time, to finish what was accepted: a second `app.stop` does not give it that."""
    program = (
        "import signal, time  # app.serve\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60); time.sleep(60)"
    )
    stop = [sys.executable, "-m", "app.stop"]
    environment = os.environ | {"PORT": str(port)}
    with (
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as owner,
        subprocess.Popen(SLEEPER, env=environment | {"DEEPTRUST_INSTANCE": str(port)}) as ray,
    ):
        assert owner.stdout is not None and owner.stdout.readline()
        (folder / "owner.pid").write_text(str(owner.pid))
        with subprocess.Popen(stop, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as first:
            assert first.stderr is not None and b"finished first" in first.stderr.readline()
            time.sleep(0.5)
            assert owner.poll() is None and ray.poll() is None and first.poll() is None
            again = subprocess.run(stop, env=environment, capture_output=True, text=True, check=False)
            assert again.returncode == 0 and again.stdout.startswith("stopped "), again
        assert owner.wait(20) is not None and ray.wait(20) is not None


def test_a_recycled_process_id_is_not_mistaken_for_the_owner(folder: Path, port: int) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "owner.pid").write_text(str(stranger.pid))
    assert cluster.processes(port) == []
    stranger.kill()
    stranger.wait()


def test_of_an_application_that_dies_while_it_starts_nothing_is_left(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, log = tmp_path / "python", tmp_path / "serve.log"
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, subprocess, sys\n"
        "environment = os.environ | {'DEEPTRUST_INSTANCE': os.environ['PORT']}\n"
        "ray = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], env=environment)\n"
        "sys.exit(f'no room beside {ray.pid}')"
    )
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(AssertionError, match=r"ended with 1:\nno room"), served(port, log) as process:
        for _ in starting(process, log):
            pass
    assert log.read_text().startswith("no room beside ") and cluster.processes(port) == []


def test_a_port_in_use_is_refused_with_what_to_do() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(cluster.ClusterError, match=r"in use.*PORT="):
            cluster.start(port, num_cpus=1, object_store_bytes=2**27)


def test_a_port_is_free_as_soon_as_its_server_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # as servers do, for others to follow them
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            accepted.close()  # it ends the connection first: the kernel remembers that for a minute
            assert client.recv(1) == b""
    assert cluster.free_port(port) == port


def test_logs_are_kept_beside_the_instance_for_its_owner_alone(folder: Path, port: int) -> None:
    logs = folder / "ray" / "session_latest" / "logs"
    logs.mkdir(parents=True)
    for text in ("first", "second"):
        (logs / "gcs_server.out").write_text(text)
        kept = cluster.keep_logs(port)
        assert kept is not None and (kept / "gcs_server.out").read_text() == text
    assert kept.parent.stat().st_mode & 0o777 == 0o700 and kept.parent != folder
    shutil.rmtree(kept.parent)
    kept.parent.write_text("somebody else's")
    assert cluster.keep_logs(port) is None
    kept.parent.unlink()


def test_everything_in_an_instance_asks_for_rays_token_and_calls_nobody(port: int) -> None:
    environment = cluster.environment(port)
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
