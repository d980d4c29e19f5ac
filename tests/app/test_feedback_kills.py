"""Feedback, and every process of the application killed at once, Ray's and the database's writer included, five times:
what was acknowledged is there, once.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.app.load import HTTP, post
from tests.app.small_service import SmallService, small_service

pytestmark = [pytest.mark.proof, pytest.mark.slow, pytest.mark.timeout(3600)]

EVENTS, PICTURES, KILLS = 1000, 100, 5


class Senders:
    """Clients that send each event until it is acknowledged, one in ten of them twice, to whichever service runs."""

    def __init__(self, ids: list[str]) -> None:
        self.ids = ids
        self.service: SmallService | None = None
        self.acknowledged: dict[str, str] = {}
        self.failed = 0
        self._failing = threading.Lock()

    def send(self, number: int) -> None:
        event = {
            "id": self.ids[number % len(self.ids)],
            "part": "verdict",
            "right": bool(number % 2),
            "by": f"u{number}",
        }
        for _ in range(2 if number % 10 == 0 else 1):
            self._until_acknowledged(f"event-{number}", event)

    def _until_acknowledged(self, key: str, event: dict[str, object]) -> None:
        while True:
            service = self.service
            if service is None:
                time.sleep(0.2)
                continue
            try:
                answer = HTTP.post(
                    f"{service.url}/v1/feedback", json=event, headers={"Idempotency-Key": key}, timeout=30
                )
            except httpx.TransportError:
                answer = None
            if answer is None or answer.status_code >= 500:
                with self._failing:
                    self.failed += 1
                time.sleep(0.2)
                continue
            assert answer.status_code in (200, 201), answer.text
            kept = answer.json()["id"]
            assert self.acknowledged.setdefault(key, kept) == kept, "one event has one id, however often it is sent"
            return


def test_acknowledged_feedback_outlives_five_deaths_of_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "store.db"
    monkeypatch.setenv("DEEPTRUST_STORE_URL", f"sqlite:///{database}")
    senders = Senders([])
    killed_at: list[int] = []
    with ThreadPoolExecutor(16) as pool:
        running: list[object] = []
        for life in range(KILLS + 1):
            folder = tmp_path / str(life)
            folder.mkdir()
            with small_service(folder) as service:
                if life == 0:
                    answers = list(pool.map(lambda number: post(service, number), range(PICTURES)))
                    assert {answer.status_code for answer in answers} == {200}
                    senders.ids = [answer.json()["id"] for answer in answers]
                    # answers are written behind the request; one that is judged is on disk
                    for name in senders.ids:
                        told = HTTP.post(f"{service.url}/v1/feedback", json={"id": name, "part": "tags", "right": True})
                        assert told.status_code == 201, told.text
                senders.service = service
                if not running:
                    running = [pool.submit(senders.send, number) for number in range(EVENTS)]
                if life < KILLS:
                    goal = EVENTS * (life + 1) // (KILLS + 1)
                    while len(senders.acknowledged) < goal:
                        time.sleep(0.01)
                    killed_at.append(len(senders.acknowledged))
                    service.kill_everything()
                    senders.service = None
                else:
                    for each in running:
                        each.result()  # type: ignore[attr-defined]
    print(f"killed at {killed_at} of {EVENTS} acknowledged; {senders.failed} attempts failed and were repeated")
    assert len(killed_at) == KILLS and killed_at[-1] < EVENTS, "killed while events were sent"
    assert senders.failed > 0 and len(senders.acknowledged) == EVENTS
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60) as connection:
        kept = connection.execute("SELECT key, id FROM feedback WHERE part = 'verdict'").fetchall()
    assert sorted(kept) == sorted((f"key:{key}", int(name)) for key, name in senders.acknowledged.items())
