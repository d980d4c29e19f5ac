"""Somebody who is called back: a server on loopback that remembers what came."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hook:
    """Somebody who is told: what came, and what it is answered with."""

    def __init__(self) -> None:
        self.came: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: Callable[[int], int] = lambda number: 204
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                hook.came.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
                status = hook.answers(len(hook.came))
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("location", f"{hook.url}/elsewhere")
                self.end_headers()
                with contextlib.suppress(OSError):  # more than anybody would want to read
                    self.wfile.write(b"x" * 2**20)

            def log_message(self, *_: Any) -> None:
                return None

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@contextlib.contextmanager
def listening() -> Iterator[Hook]:
    """One of them, ended afterwards."""
    made = Hook()
    yield made
    made.server.shutdown()
    made.server.server_close()
