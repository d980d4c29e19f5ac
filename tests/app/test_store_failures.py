"""A database that fails, goes away or is shared, and a store that is closed: what becomes of answers."""

from __future__ import annotations

import asyncio
import multiprocessing
import sqlite3
import time
from functools import partial
from pathlib import Path
from threading import Event as Signal
from typing import Any

import pytest
from sqlalchemy import Connection, insert, text

from app.store import events, key_uses, models, writer
from app.store.database import Collided, Database, StoreUnavailable
from app.store.events import Event, UnknownAnswer
from app.store.models import Feedback, KeyUse, Prediction
from app.store.search import Query
from app.store.settings import StoreSettings
from app.store.store import Store
from app.store.writer import Writer
from deployments.annotation import Annotation
from tests.app.postgres import Postgres
from tests.app.stores import PATIENT, PICTURE, Held, Stores, annotation, count, files, hits, keep, run
from tests.waiting import wait_for


def test_while_it_is_locked_feedback_is_told_so_answers_wait_and_nothing_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    store = Store(StoreSettings(url=f"sqlite:///{file}", timeout_s=0.3, search_timeout_s=60))
    store.start()
    keep(store, annotation("before"))
    lock = sqlite3.connect(file, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    try:
        started = time.monotonic()
        for i in range(100):
            store.offer(annotation(f"a{i}"), PICTURE)
        # who waits for it waits for `timeout_s`
        assert time.monotonic() - started < 100 * 0.3 / 2, "nobody waits for the lock to offer an answer"
        with pytest.raises(StoreUnavailable):
            run(store.feedback(Event("before", "verdict", True, key="k")))
        wait_for(lambda: store.status()["state"] == "unavailable")
        assert "locked" in store.status()["message"]
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    wait_for(lambda: store.status()["state"] == "ready")
    assert run(store.feedback(Event("before", "verdict", True, key="k"))).id
    wait_for(lambda: store.status()["queued"] == 0)
    assert len(hits(store, limit=200)) == 101 and store.status()["dropped"] == 0
    assert count(store, Feedback) == 1
    store.close()


def test_what_the_queue_cannot_hold_is_counted(tmp_path: Path) -> None:
    blocked = tmp_path / "no folder"
    blocked.write_text("a file where the folder should be")
    store = Store(StoreSettings(url=f"sqlite:///{blocked}/store.db", max_queue=10))
    store.start()
    wait_for(lambda: store.status()["state"] == "unavailable")
    for i in range(25):
        store.offer(annotation(f"a{i}"), PICTURE)
    wait_for(lambda: (store.status()["queued"], store.status()["dropped"]) == (10, 15))
    blocked.unlink()
    wait_for(lambda: store.status()["written"] == 10)
    store.close()


def test_while_it_is_gone_retention_waits_for_the_next_attempt_to_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = Writer(Database(f"sqlite:///{tmp_path}/store.db", 60, 60), 10, 10, lambda _: 60.0)
    waits: list[float] = []

    def wait(timeout: float) -> None:
        waits.append(timeout)
        thread._stopping = True

    monkeypatch.setattr(thread._wake, "wait", wait)
    thread._tidy_at = 0.0
    thread._failed(StoreUnavailable("gone"))
    assert thread._take() == ([], [], True)
    assert len(waits) == 1 and 0 < waits[0] <= 2.0


def test_an_answer_that_makes_no_row_is_counted_and_keeps_the_others_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row_of(record: Annotation, *rest: Any) -> dict[str, object]:
        if record.id == "bad":
            raise ValueError
        return models.row_of(record, *rest)

    monkeypatch.setattr(writer, "row_of", row_of)
    store = Store(StoreSettings(url=f"sqlite:///{tmp_path}/store.db", **PATIENT))
    for name in ("a", "bad", "b"):
        store.offer(annotation(name), PICTURE)
    job = store.submit(lambda connection: None)
    store.start()
    assert job.result(10) is None
    wait_for(lambda: (store.status()["written"], store.status()["dropped"]) == (2, 1))
    assert set(hits(store)) == {"a", "b"}
    store.close()


def test_a_job_that_the_database_refuses_keeps_no_other_from_being_done(stores: Stores) -> None:
    store = Store(StoreSettings(url=stores.url, **PATIENT))
    stores.opened.append(store)

    def twice(connection: Connection) -> None:
        connection.execute(insert(KeyUse), {"key_id": "a", "day": 1, "used": 1})
        connection.execute(insert(KeyUse), {"key_id": "a", "day": 1, "used": 1})

    def unknown(connection: Connection) -> None:
        raise UnknownAnswer("a")

    store.offer(annotation("a"), PICTURE)
    bad, good, other = (store.submit(run) for run in (twice, partial(key_uses.add, day=1, uses={"a": 2}), unknown))
    found = store.submit(partial(events.add_feedback, event=Event("a", "verdict", True)))
    store.start()
    with pytest.raises(StoreUnavailable, match="IntegrityError"):
        bad.result(60)
    assert good.result(60) == {"a": 2} and found.result(60).is_new
    with pytest.raises(UnknownAnswer):
        other.result(60)
    wait_for(lambda: store.status()["state"] == "ready")
    assert (store.status()["written"], store.status()["dropped"]) == (1, 0)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_transactions_of_two_replicas_that_wait_for_each_other_are_both_done(stores: Stores) -> None:
    replicas = [stores(), stores()]
    add = partial(key_uses.add, day=1)
    assert run(replicas[0].commit(partial(add, uses={"a": 1, "b": 1}))) == {"a": 1, "b": 1}
    wait_for(lambda: replicas[1].status()["state"] == "ready")
    has_one = [Signal(), Signal()]

    def both(connection: Connection, number: int) -> None:
        connection.execute(text("SET LOCAL deadlock_timeout = '10ms'"))
        one, other = ("a", "b") if number == 0 else ("b", "a")
        add(connection, uses={one: 1})
        has_one[number].set()
        assert has_one[1 - number].wait(60)
        add(connection, uses={other: 1})

    jobs = [replica.submit(partial(both, number=number)) for number, replica in enumerate(replicas)]
    assert [job.result(60) for job in jobs] == [None, None]
    assert [replica.status()["state"] for replica in replicas] == ["ready", "ready"]
    assert run(replicas[0].commit(partial(add, uses={"a": 0, "b": 0}))) == {"a": 3, "b": 3}


def test_tidying_that_met_another_transaction_is_done_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met, failed = Signal(), list[StoreUnavailable]()

    def tidy(_: Database) -> float:
        met.set()
        raise Collided("deadlock detected")

    thread = Writer(Database(f"sqlite:///{tmp_path}/store.db", 60, 60), 10, 10, tidy)
    monkeypatch.setattr(thread, "_failed", failed.append)
    thread._tidy_at = 0.0
    thread.start()
    assert met.wait(60)
    assert thread.submit(lambda connection: "done").result(60) == "done" and failed == []
    thread.close(60)


@pytest.mark.parametrize("damage", ["removed", "garbage"])
def test_a_file_that_is_taken_away_is_noticed(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "store.db"
    store = Store(StoreSettings(url=f"sqlite:///{file}", timeout_s=10, search_timeout_s=60))
    store.start()
    keep(store, annotation("lost"))
    other = tmp_path / "other"
    if damage == "garbage":
        other.write_bytes(b"this is no database" * 1000)
    for path in tmp_path.glob("store.db*"):
        path.unlink()
    if damage == "garbage":
        other.rename(file)
    store.offer(annotation("a"), PICTURE)
    if damage == "garbage":
        with pytest.raises(StoreUnavailable):
            run(store.feedback(Event("a", "verdict", True)))
        file.unlink()
    wait_for(lambda: store.status()["state"] == "ready")
    assert run(store.feedback(Event("a", "verdict", True))).is_new
    # what was acknowledged lies in the file that is there
    with sqlite3.connect(file) as connection:
        assert connection.execute("SELECT count(*) FROM feedback").fetchone() == (1,)
    store.close()


def test_postgres_that_goes_away_and_comes_back(postgres: Postgres, tmp_path: Path) -> None:
    store = Stores(postgres.url("restarted"), tmp_path)(timeout_s=10.0)
    keep(store, annotation("before"))
    postgres.stop()
    try:
        store.offer(annotation("meanwhile"), PICTURE)
        with pytest.raises(StoreUnavailable):
            run(store.feedback(Event("before", "verdict", True, key="k")))
        with pytest.raises(StoreUnavailable):
            run(store.search(Query()))
    finally:
        postgres.start("fsync=off")
    wait_for(lambda: store.status()["state"] == "ready")
    assert run(store.feedback(Event("meanwhile", "verdict", True))).is_new
    assert hits(store) == ["meanwhile", "before"]
    store.close()


def test_closing_writes_what_waits(stores: Stores) -> None:
    store = stores()
    wait_for(lambda: store.status()["state"] == "ready")
    for i in range(700):
        store.offer(annotation(f"a{i}"), PICTURE)
    store.close(patience_s=60)
    assert count(stores(), Prediction) == 700


def test_closing_keeps_the_pictures_that_wait(stores: Stores) -> None:
    place = str(stores.folder / "pictures")
    store = Store(StoreSettings(url=stores.url, pictures="all", pictures_url=place, **PATIENT))
    for i in range(20):
        store.offer(annotation(f"a{i}"), PICTURE)
    store.start()
    store.close(patience_s=60)
    assert len(files(store)) == count(stores(), models.Picture) == 20 and store.status()["pictures_dropped"] == 0


def test_pictures_that_cannot_be_kept_before_it_is_closed_are_counted(stores: Stores, held: Held) -> None:
    store = stores(pictures="all")
    held(store, "write")
    keep(store, *(annotation(f"a{i}") for i in range(3)))
    wait_for(lambda: held.there)
    store.close(patience_s=0.1)
    assert store.status()["pictures_dropped"] == 2, "and one is being written"
    held.go_on.set()
    wait_for(lambda: store.status()["pictures_dropped"] == 3)


def test_it_may_be_closed_while_it_starts(stores: Stores) -> None:
    for _ in range(10):
        stores().close()
    assert count(stores(), Prediction) == 0


def _write(url: str, start: int) -> None:
    store = Store(StoreSettings(url=url, **PATIENT))
    store.start()
    for i in range(start, start + 200):
        store.offer(annotation(f"a{i}"), PICTURE)
    for i in range(start, start + 200, 10):
        asyncio.run(store.feedback(Event(f"a{i}", "verdict", True)))
    store.close(patience_s=60)


def test_processes_of_one_node_share_it(stores: Stores) -> None:
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_write, args=(stores.url, start)) for start in (0, 200)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    store = stores()
    wait_for(lambda: store.status()["state"] == "ready")
    assert (count(store, Prediction), count(store, Feedback)) == (400, 40)
