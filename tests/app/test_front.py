"""`app/front/haproxy`: what Ray writes for HAProxy, as it is after the script: run by the real HAProxy."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import psutil
import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from app import cluster
from app.problems import CODES, MEDIA_TYPE

FRONT = Path(cluster.__file__).parent / "front"


class Server(BaseHTTPRequestHandler):
    """An ingress that hangs up on a request without an answer, if the address says so."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/gone":
            self.close_connection = True
            self.connection.close()
            return
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.send_header("X-Request-ID", "the-application's")
        self.end_headers()
        self.wfile.write(b"ok")

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def backend() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


class Front:
    """HAProxy as Ray's manager starts it."""

    def __init__(self, folder: Path, servers: dict[str, int], program: Path = FRONT / "haproxy") -> None:
        self.port = cluster.free_port()
        config = HAProxyConfig(http_options=HTTPOptions(host="127.0.0.1", port=self.port), is_head=True)
        config.socket_path = str(folder / "a.sock")
        config.metrics_socket_path = str(folder / "m.sock")
        config.server_state_base, config.server_state_file = str(folder), str(folder / "server-state")
        self.file = folder / "haproxy.cfg"
        api = HAProxyApi(config, config_file_path=str(self.file))
        backends = {
            name: BackendConfig(name, "/", servers=[ServerConfig("one", "127.0.0.1", port)])
            for name, port in servers.items()
        }
        api.set_backend_configs(backends)
        api._generate_config_file_internal()
        self.manager = subprocess.Popen(
            # a parent of its own, as Ray's actor is: it starts HAProxy and waits
            [
                *(sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])"),
                *(str(program), "-db", "-f", str(self.file), "-dR"),
            ],
            env=os.environ | {cluster.HAPROXY: cluster.haproxy_program()},
            stderr=(folder / "log").open("w"),
        )
        self.url = f"http://127.0.0.1:{self.port}"
        limit = time.monotonic() + 20
        while True:
            with suppress(httpx.TransportError):
                httpx.get(f"{self.url}/-/healthz")
                return
            assert time.monotonic() < limit and self.manager.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)

    def haproxies(self) -> list[psutil.Process]:
        found = []
        for one in psutil.Process(self.manager.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # the old one of a reload ends by itself
                if one.name() == "haproxy":
                    found.append(one)
        return found

    def close(self) -> None:
        for one in [*self.haproxies(), psutil.Process(self.manager.pid)]:
            one.kill()
        self.manager.wait()


@pytest.fixture
def front(tmp_path: Path, backend: int) -> Iterator[Front]:
    running = Front(tmp_path, {"app": backend})
    yield running
    if running.manager.poll() is None:
        running.close()


def is_unavailable(answer: httpx.Response) -> bool:
    assert answer.status_code == 503 and answer.headers["content-type"] == MEDIA_TYPE
    assert int(answer.headers["retry-after"]) > 0 and len(answer.headers.get_list("x-request-id")) == 1
    return answer.json()["code"] == "unavailable"


def test_the_application_answers_and_nothing_else_is_listened_on(front: Front) -> None:
    assert httpx.get(f"{front.url}/anything").text == "ok"
    (process,) = front.haproxies()
    listening = {one.laddr[:2] for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    assert listening == {("127.0.0.1", front.port)}
    assert not process.net_connections("udp"), "no syslog"
    (socket,) = [path for path in front.file.parent.iterdir() if path.name == "a.sock"]
    assert socket.stat().st_mode & 0o077 == 0


def test_a_server_that_goes_away_is_a_503_that_is_tried_again(front: Front) -> None:
    assert is_unavailable(httpx.get(f"{front.url}/gone"))


def test_what_it_answers_itself_has_the_requests_id_or_one_that_is_made(front: Front) -> None:
    def told(path: str, own: str) -> str:
        (one,) = httpx.get(f"{front.url}{path}", headers={"x-request-id": own}).headers.get_list("x-request-id")
        return one

    for own in ("UPLOAD-4711", "a" * 128):
        assert told("/gone", own) == own
    made = [told("/gone", own) for own in ("a" * 129, "a b", "-a", "")]
    assert len(set(made)) == 4 and all(re.fullmatch("[0-9a-f-]{36}", one) for one in made)
    assert told("/here", "UPLOAD-4711") == "the-application's"


def test_no_server_is_a_503(tmp_path: Path) -> None:
    alone = Front(tmp_path, {"app": cluster.free_port()})
    try:
        assert is_unavailable(httpx.get(f"{alone.url}/v1/analyze"))
    finally:
        alone.close()


def test_no_application_is_a_503(tmp_path: Path) -> None:
    empty = Front(tmp_path, {})
    try:
        assert is_unavailable(httpx.get(f"{empty.url}/v1/analyze"))
    finally:
        empty.close()


GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def asking(front: Front, data: bytes) -> socket.socket:
    """A connection that has sent this."""
    connection = socket.create_connection(("127.0.0.1", front.port), timeout=20)
    connection.sendall(data)
    return connection


def answer(connection: socket.socket) -> bytes:
    """What comes, to the end of the body that `Server` sends."""
    came = b""
    while not came.endswith(b"\r\n\r\nok"):
        piece = connection.recv(2**16)
        assert piece, came
        came += piece
    return came


def test_headers_have_their_time_and_bodies_and_idle_connections_have_another(tmp_path: Path, backend: int) -> None:
    program = tmp_path / "front" / "haproxy"
    shutil.copytree(FRONT, program.parent)
    text = program.read_text()
    assert text.count("timeout http-request 10s") == 1
    program.write_text(text.replace("timeout http-request 10s", "timeout http-request 500ms"))
    impatient = Front(tmp_path, {"app": backend}, program)
    try:
        with asking(impatient, GET) as idle:
            assert answer(idle).startswith(b"HTTP/1.1 200 ")
            post = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"
            with asking(impatient, post) as slow, asking(impatient, GET[:-2]) as stuck:
                assert stuck.recv(2**16).startswith(b"HTTP/1.1 408 ")
                # by then it would be over for these as well, if it were theirs
                slow.sendall(b"ab")
                assert answer(slow).startswith(b"HTTP/1.1 200 ")
            idle.sendall(GET)
            assert answer(idle).startswith(b"HTTP/1.1 200 ")
    finally:
        impatient.close()


def test_it_ends_with_what_manages_it(front: Front) -> None:
    (process,) = front.haproxies()
    front.manager.send_signal(signal.SIGKILL)
    front.manager.wait()
    psutil.wait_procs([process], timeout=5)
    assert not process.is_running()


@pytest.mark.parametrize("file", sorted(FRONT.glob("*.http")), ids=lambda file: file.name)
def test_the_texts_are_problems_as_the_application_has_them(file: Path) -> None:
    head, body = file.read_bytes().decode().split("\r\n\r\n")
    problem = json.loads(body)
    assert CODES[problem["code"]] == (problem["status"], problem["title"])
    assert head.startswith(f"HTTP/1.1 {problem['status']} ") and file.stem == str(problem["status"])
    (length,) = re.findall(r"Content-Length: (\d+)", head)
    assert int(length) == len(body.encode())
