"""Clients of the small service: pictures of their own, and many who post one after another."""

from __future__ import annotations

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.app.small_service import SmallService
from tests.train.small_models import noise

#: One for all threads: making a client takes longer than an answer does.
HTTP = httpx.Client(limits=httpx.Limits(max_connections=None))


def picture(number: int) -> bytes:
    """A picture of its own for every number."""
    buffer = io.BytesIO()
    noise(number, (64, 48)).save(buffer, "PNG")
    return buffer.getvalue()


def post(service: SmallService, number: int, path: str = "/v1/analyze", timeout: float = 120) -> httpx.Response:
    return HTTP.post(f"{service.url}{path}", content=picture(number), timeout=timeout)


class Load:
    """Clients that post one new picture after another until told to stop."""

    def __init__(self, service: SmallService, path: str, clients: int) -> None:
        self.service, self.path, self.clients = service, path, clients
        self.answers: list[httpx.Response] = []
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(clients)

    def __enter__(self) -> Load:
        self._running = [self._pool.submit(self._client, number) for number in range(self.clients)]
        return self

    def _client(self, number: int) -> None:
        turn = 0
        while not self._over.is_set():
            self.answers.append(post(self.service, number * 1_000_000 + turn, self.path))
            turn += 1

    def wait_for(self, condition: Any, timeout_s: float = 120) -> None:
        """Go on until an answer fulfils it."""
        limit, seen = time.monotonic() + timeout_s, 0
        while time.monotonic() < limit:
            for answer in self.answers[seen:]:
                seen += 1
                if condition(answer.json()):
                    return
            time.sleep(0.05)
        raise AssertionError(f"none of {seen} answers in {timeout_s} s was the one waited for")

    def __exit__(self, *failure: object) -> None:
        self._over.set()
        for client in self._running:
            client.result()
        self._pool.shutdown()
