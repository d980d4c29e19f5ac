"""Ten thousand pictures at once from senders who can wait, and everything killed in the middle: each is answered, and
kept, once. The models are tiny; ingress, queue, graph and processes are those of production.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.app.load import picture
from tests.app.small_service import small_service

pytestmark = [pytest.mark.proof, pytest.mark.slow, pytest.mark.timeout(3600)]

COUNT, SENDERS = int(os.environ.get("DEEPTRUST_BURST", "10000")), 32


def send(client: httpx.Client, url: str, number: int) -> tuple[str, float]:
    """Where the answer to a picture will be, sent again until it is taken, and the seconds of the last attempt."""
    headers = {"prefer": "respond-async", "idempotency-key": f"burst-{number}"}
    while True:
        started = time.monotonic()
        try:
            answer = client.post(f"{url}/v1/analyze", content=picture(number), headers=headers, timeout=60)
        except httpx.TransportError:
            time.sleep(1)
            continue
        if answer.status_code == 202:
            return answer.headers["location"], time.monotonic() - started
        assert answer.status_code in (429, 503), answer.text
        time.sleep(float(answer.headers["retry-after"]))


def answered(database: Path) -> int:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60) as connection:
        return int(connection.execute("SELECT count(*) FROM deferred WHERE status > 0").fetchone()[0])


def test_ten_thousand_in_a_burst_and_everything_killed_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "store.db"
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("DEEPTRUST_STORE_URL", f"sqlite:///{database}")
    client = httpx.Client(limits=httpx.Limits(max_connections=None))
    with small_service(tmp_path / "first") as service:
        began = time.monotonic()
        with ThreadPoolExecutor(SENDERS) as pool:
            taken = list(pool.map(lambda number: send(client, service.url, number), range(COUNT)))
        seconds = sorted(second for _, second in taken)
        print(f"{COUNT} taken in {time.monotonic() - began:.0f} s, p50 {seconds[COUNT // 2]:.3f} s, "
              f"p99 {seconds[COUNT * 99 // 100]:.3f} s, {answered(database)} answered meanwhile")  # fmt: skip
        while answered(database) < COUNT // 2:
            time.sleep(0.5)
        service.kill_everything()
    before = answered(database)
    assert before < COUNT
    with small_service(tmp_path / "second") as service:
        began = time.monotonic()
        while (done := answered(database)) < COUNT:
            assert time.monotonic() - began < 3000, f"{done} of {COUNT} are answered"
            time.sleep(1)
        print(f"killed at {before}; the rest in {time.monotonic() - began:.0f} s after it was ready again")
        with ThreadPoolExecutor(SENDERS) as pool:
            answers = list(pool.map(lambda entry: client.get(f"{service.url}{entry[0]}", timeout=60), taken))
    assert Counter(answer.status_code for answer in answers) == {200: COUNT}
    records = [answer.json() for answer in answers]
    assert len({record["sha256"] for record in records}) == COUNT
    assert [record["errors"] for record in records if record["errors"]] == []
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60) as connection:
        kept = connection.execute("SELECT count(*), count(DISTINCT sha256) FROM predictions").fetchone()
    assert kept == (COUNT, COUNT), "each is kept once"
