"""Ten thousand pictures at once from senders who can wait, and everything killed in the middle: each is answered, and
kept, once. The models are tiny; ingress, queue, graph and processes are those of production, the tagger's queue too.

What was measured goes to `benchmarks/results/burst.json`; with another `DEEPTRUST_BURST`, to the folder of quick runs.
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

from benchmarks.chaos import small_graph
from benchmarks.load import quantile
from benchmarks.report import QUICK, RESULTS, write_result
from tests.app.load import picture
from tests.app.small_service import small_service

pytestmark = [pytest.mark.proof, pytest.mark.slow, pytest.mark.timeout(10800)]

COUNT, SENDERS = int(os.environ.get("DEEPTRUST_BURST", "10000")), 32
#: For either half: two cores answer six a second, and are shared.
PATIENCE_S = 4800.0
#: Production's: a picture that can wait ends in part only where production's would.
LIMITS = {"request_timeout_s": 60.0}


def send(client: httpx.Client, url: str, number: int) -> tuple[str, float, int]:
    """Where the answer to a picture will be, sent again until it is taken, the seconds of the last attempt, and how
    many there were.
    """
    headers, attempts = {"prefer": "respond-async", "idempotency-key": f"burst-{number}"}, 0
    while True:
        started, attempts = time.monotonic(), attempts + 1
        try:
            answer = client.post(f"{url}/v1/analyze", content=picture(number), headers=headers, timeout=60)
        except httpx.TransportError:
            time.sleep(1)
            continue
        if answer.status_code == 202:
            return answer.headers["location"], time.monotonic() - started, attempts
        assert answer.status_code in (429, 503), answer.text
        time.sleep(float(answer.headers["retry-after"]))


def wait_for(database: Path, count: int) -> None:
    """Until so many are answered."""
    limit = time.monotonic() + PATIENCE_S
    while (done := answered(database)) < count:
        assert time.monotonic() < limit, f"{done} of {count} are answered"
        time.sleep(0.5)


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
    with small_service(tmp_path / "first", change=small_graph, **LIMITS) as service:
        began = time.monotonic()
        with ThreadPoolExecutor(SENDERS) as pool:
            taken = list(pool.map(lambda number: send(client, service.url, number), range(COUNT)))
        taken_s, meanwhile = time.monotonic() - began, answered(database)
        wait_for(database, COUNT // 2)
        service.kill_everything()
        first_s = time.monotonic() - began
    before = answered(database)
    assert before < COUNT
    away = time.monotonic()
    with small_service(tmp_path / "second", change=small_graph, **LIMITS) as service:
        began = time.monotonic()
        wait_for(database, COUNT)
        rest_s = time.monotonic() - began
        with ThreadPoolExecutor(SENDERS) as pool:
            answers = list(pool.map(lambda entry: client.get(f"{service.url}{entry[0]}", timeout=60), taken))
    statuses = Counter(answer.status_code for answer in answers)
    records = [answer.json() for answer in answers if answer.status_code == 200]
    errors = Counter(f"{error['stage']}: {error['code']}" for record in records for error in record["errors"])
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60) as connection:
        kept = connection.execute("SELECT count(*), count(DISTINCT sha256) FROM predictions").fetchone()
    seconds = [second for _, second, _ in taken]
    result = {
        "pictures": COUNT,
        "senders": SENDERS,
        "taken_s": round(taken_s, 1),
        "seconds_until_202_p50_p99_max": [round(quantile(seconds, share), 4) for share in (0.5, 0.99, 1)],
        "sent_more_than_once": sum(attempts > 1 for _, _, attempts in taken),
        "answered_while_they_came": meanwhile,
        "answered_when_all_was_killed": before,
        "seconds_until_the_kill": round(first_s, 1),
        "seconds_until_ready_again": round(began - away, 1),
        "seconds_for_the_rest": round(rest_s, 1),
        "seconds": round(first_s + began - away + rest_s, 1),
        "statuses": {str(status): count for status, count in statuses.items()},
        "answered_whole": sum(not record["errors"] for record in records),
        "errors": dict(errors),
        "kept": kept[0],
        "kept_pictures": kept[1],
    }
    print(result)
    assert statuses == {200: COUNT}
    assert len({record["sha256"] for record in records}) == COUNT
    assert not errors
    assert kept == (COUNT, COUNT), "each is kept once"
    write_result("burst", result, RESULTS if COUNT == 10_000 else QUICK)
