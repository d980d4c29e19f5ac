"""The store, on SQLite and on PostgreSQL alike: its tables, what is kept, found by name and judged."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sqlite3
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from fastapi import FastAPI
from pydantic import ValidationError
from sqlalchemy import delete, inspect, select, text, update
from sqlalchemy.event import listen

from app import idempotency
from app.feedback import router
from app.problems import Problem
from app.store import deferred, events, key_uses, models
from app.store.database import Database, StoreUnavailable, migrate
from app.store.deferred import Accepted
from app.store.events import Event, KeyConflict, UnknownAnswer
from app.store.models import Base, Feedback, KeyUse, Prediction, first_id, new_id, time_of
from app.store.search import Query
from app.store.settings import StoreSettings
from app.store.store import Store, StoreOff
from deployments.annotation import Annotation
from deployments.metrics import Metrics
from tests.app.small_app import send
from tests.app.stores import PATIENT, PICTURE, SHA, Stores, annotation, count, files, hits, keep, run, tidy
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]

# ---- tables ---------------------------------------------------------------------------------------------------------


def test_uses_of_keys_are_summed_over_replicas(stores: Stores) -> None:
    replicas, calls = [stores() for _ in range(2)], 20

    async def work() -> list[dict[str, int]]:
        count = partial(key_uses.add, day=20000, uses={"b": 2, "a": 1})
        return await asyncio.gather(*(replica.commit(count) for replica in replicas for _ in range(calls)))

    totals = run(work())
    assert sorted(total["a"] for total in totals) == list(range(1, 2 * calls + 1)), "nobody's were lost"
    assert max(total["b"] for total in totals) == 4 * calls
    assert run(replicas[0].commit(partial(key_uses.add, day=20008, uses={"a": 3}))) == {"a": 3}
    assert count(replicas[1], KeyUse) == 1, "days of a week ago are gone"


def test_migrations_make_the_tables_that_the_code_has_and_take_them_away_again(database_url: str) -> None:
    database = Database(database_url, 60, 60)
    database.open()
    database.open()
    extra = {"tags_text", "all_text"}  # full text is the databases' own and not in the models

    def differences(connection: Any) -> list[Any]:
        found = compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), Base.metadata)
        return [
            change
            for change in found
            if not (isinstance(change, tuple) and change[0] == "remove_column" and change[3].name in extra)
            and not (isinstance(change, tuple) and change[0] == "remove_index" and "_text" in change[1].name)
            and not (isinstance(change, tuple) and change[0] == "remove_table")
        ]

    with database.writing() as connection:
        assert differences(connection) == []
        migrate(connection, "base")
    with database.writing() as connection:
        assert set(inspect(connection).get_table_names()) <= {"deeptrust_store_version", "alembic_version"}
    database.close()


def test_a_database_of_a_newer_program_is_left_alone(database_url: str) -> None:
    database = Database(database_url, 60, 60)
    database.open()
    with database.writing() as connection:
        connection.execute(text("UPDATE deeptrust_store_version SET version_num = '9999'"))
    with pytest.raises(StoreUnavailable, match="9999"):
        database.open()
    database.close()


#: A program that says that it is there, and opens a database when it is told to.
_OPEN = """
import sys
from app.store.database import Database
database = Database(sys.argv[1], 60, 60)
print("there", flush=True)
sys.stdin.read()
database.open()
database.close()
"""


def test_several_processes_open_a_new_database_at_once(database_url: str) -> None:
    command = [sys.executable, "-c", _OPEN, database_url]
    with contextlib.ExitStack() as ended:
        several = [
            ended.enter_context(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            for _ in range(4)
        ]
        assert [one.stdout.readline() for one in several if one.stdout] == [b"there\n"] * 4
        for one in several:
            assert one.stdin is not None
            one.stdin.close()
    assert [one.returncode for one in several] == [0] * 4


def test_a_new_file_that_another_is_about_to_write_to_is_waited_for(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    late = threading.Timer(0.3, lambda: other.execute("ROLLBACK"))
    late.start()
    database = Database(f"sqlite:///{tmp_path}/store.db", 60, 60)
    database.open()
    database.close()
    late.join()
    assert other.execute("SELECT count(*) FROM predictions").fetchone() == (0,)


@pytest.mark.parametrize("bad", ["mysql://x/y", "nonsense", "sqlite://"])
def test_a_url_that_is_none_is_said_and_nothing_fails(bad: str) -> None:
    store = Store(StoreSettings(url=bad))
    store.start()
    store.offer(annotation("a"), PICTURE)
    assert store.status()["state"] == "unavailable" and "sqlite:////FILE" in store.status()["message"]
    with pytest.raises(StoreUnavailable):
        run(store.feedback(Event("a", "verdict", True)))


def test_off_keeps_nothing(tmp_path: Path) -> None:
    store = Store(StoreSettings.model_validate({"keep": False, "url": f"sqlite:///{tmp_path}/store.db"}))
    store.start()
    store.offer(annotation("a"), PICTURE)
    for ask in (store.feedback(Event("a", "verdict", True)), store.search(Query()), store.keep_picture(SHA, PICTURE)):
        with pytest.raises(StoreOff):
            run(ask)
    assert store.status()["state"] == "off" and list(tmp_path.iterdir()) == []


def test_where_it_must_not_be_used_it_is_not(tmp_path: Path) -> None:
    store = Store(StoreSettings(url=f"sqlite:///{tmp_path}/store.db"), unusable=lambda: "two nodes")
    store.start()
    wait_for(lambda: store.status()["message"] == "two nodes")
    with pytest.raises(StoreUnavailable, match="two nodes"):
        run(store.feedback(Event("a", "verdict", True)))


def test_what_comes_to_be_unusable_is_used_no_more_and_keeps_what_it_has(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("app.store.store._ASK_S", 0.01)
    why, pictures = "", str(stores.folder / "pictures")
    settings = StoreSettings(url=stores.url, pictures="all", pictures_url=pictures, **PATIENT)
    store = Store(settings, unusable=lambda: why)
    stores.opened.append(store)
    store.start()
    wait_for(lambda: store.status()["state"] == "ready")
    waiting = [Accepted("later", SHA, PICTURE)]
    put = partial(deferred.put, place="p", tasks="detect", explain="", pictures=waiting, max_count=9, max_bytes=2**20)
    run(store.commit(put))
    record = annotation("a").model_copy(update={"sha256": SHA})
    store.offer(record, PICTURE)
    why = "two nodes"
    wait_for(lambda: "1 pictures that wait" in store.status()["message"])
    said = store.status()["message"]
    assert said.startswith("two nodes; ") and said in lines.text and store.status()["state"] == "unavailable"
    if stores.url.startswith("sqlite"):
        assert str(tmp_path / "deep" / "store.db") in said
    store.offer(annotation("b"), PICTURE)
    for ask in (store.feedback(Event("a", "verdict", True)), store.read(deferred.count), store.commit(put)):
        with pytest.raises(StoreUnavailable, match="two nodes"):
            run(ask)
    other = stores()
    wait_for(lambda: other.status()["state"] == "ready")
    assert hits(other) == ["a"] and run(other.read(deferred.count)) == 1
    assert run(other.picture(SHA)) == (PICTURE, "image/jpeg"), "what was taken was written"


def test_whether_the_store_can_be_used_is_a_metric_where_one_is_wanted(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[float] = []
    monkeypatch.setattr(Metrics, "record", lambda _, *told: shown.extend(told[1:2] if told[0] == "store_ready" else ()))
    off, store, away = Store(StoreSettings(keep="off")), stores(), Store(StoreSettings(url="nonsense"))
    wait_for(lambda: store.status()["state"] == "ready")
    for each in (off, store, away):
        Metrics().store(each.status())
    assert shown == [1.0, 0.0]


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_an_answer_comes_back_as_it_was_given(stores: Stores) -> None:
    store = stores()
    given = annotation("a\N{SNOWMAN}", "ai", 'a <i>"dog"</i>\0 \N{DOG}', "dog", "golden retriever")
    keep(store, given)
    (found,), following = run(store.search(Query()))
    assert found.annotation == given and following is None
    assert abs(found.at.timestamp() - time.time()) < 60 and not found.has_picture and found.judged == ()


def test_an_answer_with_a_name_is_kept_once_and_found_by_it(stores: Stores) -> None:
    store, other = stores(), stores()
    first, again = annotation("first", caption="a dog"), annotation("first", caption="a cat")
    for holder, record in ((store, first), (other, again)):
        holder.offer(record, PICTURE, "name")
        wait_for(lambda holder=holder: holder.status()["written"] == 1)
    keep(store, annotation("nameless"), annotation("nameless"))
    assert count(store, Prediction) == 3
    found = run(other.read(partial(events.answered, name="name")))
    assert found is not None and found[0] == first.sha256 and Annotation.model_validate_json(found[1]) == first
    assert run(other.read(partial(events.answered, name="another"))) is None


def test_answers_with_names_are_written_in_one_order_everywhere(tmp_path: Path) -> None:
    database, given = Database(f"sqlite:///{tmp_path}/store.db", 60, 60), list[str | None]()
    database.open()

    def note(_: Any, __: Any, statement: str, values: Any, *___: Any) -> None:
        if statement.startswith("INSERT INTO predictions "):
            given.extend(row[-1] for row in values)

    listen(database._writer, "before_cursor_execute", note)
    rows = [models.row_of(annotation(str(name)), time.time(), None, name) for name in ("b", None, "c", "a")]
    with database.writing() as connection:
        events.write_predictions(connection, rows)
    database.close()
    assert given == [None, "a", "b", "c"]


def test_an_answer_that_lacks_a_stage_gives_way_to_one_that_lacks_fewer_and_to_no_other(stores: Stores) -> None:
    store = stores()

    def offered(identity: str, caption: str | None, *missing: Any) -> Annotation:
        record = annotation(identity, caption=caption).model_copy(update={"sha256": SHA})
        for stage in missing:
            record.failed(stage, "overloaded", "full")
        store.offer(record, PICTURE, "name")
        return record

    def kept() -> Annotation:
        run(store.commit(lambda connection: None))  # answers are written before it
        found = run(store.read(partial(events.answered, name="name")))
        return Annotation.model_validate_json(found[1])

    first = offered("first", None, "captioner", "tagger")
    assert kept() == first
    run(store.feedback(Event("first", "verdict", True)))
    offered("second", "a cat", "tagger")
    third = offered("third", "a dog")  # in one batch with the second
    offered("fourth", "a bird", "tagger")
    assert kept() == third and count(store, Prediction) == 1
    offered("fifth", "a horse")
    assert kept() == third
    (found,), _ = run(store.search(Query(words="dog")))
    assert found.annotation == third and found.judged == ("verdict",)
    assert hits(store, words="cat") == []
    store.offer(annotation("other picture", caption="a fish"), PICTURE, "name")
    assert kept() == third


def test_a_request_sent_again_gets_its_answer_and_another_picture_is_refused(stores: Stores, tmp_path: Path) -> None:
    store = stores()
    name = idempotency.name_of("upload-1", frozenset({"detect", "tag"}), 0)
    assert name != idempotency.name_of("upload-1", frozenset({"detect", "tag"}), 1)
    assert name != idempotency.name_of("upload-1", frozenset({"detect"}), 0)
    assert run(idempotency.earlier(store, name, PICTURE)) is None
    sha256 = hashlib.sha256(PICTURE).hexdigest()
    record = annotation(idempotency.answer_id(name), caption="a dog").model_copy(update={"sha256": sha256})
    store.offer(record, PICTURE, name)
    assert wait_for(lambda: run(idempotency.earlier(store, name, PICTURE))) == record
    with pytest.raises(Problem, match="another picture") as refused:
        run(idempotency.earlier(store, name, b"another"))
    assert refused.value.status == 409
    assert run(idempotency.earlier(Store(StoreSettings(keep="off")), name, PICTURE)) is None


def test_ids_grow_with_time_and_tell_it() -> None:
    assert new_id(1_700_000_000.001) > new_id(1_700_000_000.0)
    assert first_id(1_700_000_000) <= new_id(1_700_000_000) < first_id(1_700_000_000.001) < 2**63
    assert time_of(new_id(1_700_000_000)).timestamp() == 1_700_000_000
    many = [new_id(1_700_000_000) for _ in range(50_000)]  # drawn one by one, hundreds would come twice
    assert len(set(many)) == len(many) and {time_of(some) for some in many} == {time_of(many[0])}


def test_sampled_keeps_a_share_of_the_pictures_and_what_gets_feedback(stores: Stores) -> None:
    store = stores(keep="sampled", sample_share=0.5, feedback_window_h=1e-9)
    records = [annotation(f"picture {i}") for i in range(40)]
    keep(store, *records)
    judged = next(record for record in records if int(record.sha256[:8], 16) / 2**32 >= 0.5)
    run(store.feedback(Event(judged.id, "verdict", True)))
    tidy(store)
    expected = {record.id for record in records if int(record.sha256[:8], 16) / 2**32 < 0.5} | {judged.id}
    assert set(hits(store, limit=100)) == expected and 5 < len(expected) < 35


def test_flagged_keeps_only_what_gets_feedback_in_time(stores: Stores) -> None:
    store = stores(keep="flagged", feedback_window_h=1.0)
    keep(store, annotation("a"), annotation("b"))
    run(store.feedback(Event("a", "verdict", False, "ai")))
    tidy(store)
    assert set(hits(store)) == {"a", "b"}, "feedback may still come"
    expired = update(Prediction).where(Prediction.expires_id.is_not(None)).values(expires_id=1)
    run(store.commit(lambda connection: connection.execute(expired)))
    tidy(store)
    assert hits(store) == ["a"]


def test_what_is_too_old_goes_with_its_feedback_and_picture(stores: Stores) -> None:
    store = stores(keep_days=1.0)
    keep(store, annotation("new"))
    old = annotation("old").model_copy(update={"sha256": SHA})
    keep(store, old)
    run(store.feedback(Event("old", "verdict", True)))
    assert run(store.keep_picture(SHA, PICTURE))
    database = store._database
    assert database is not None
    two_days_ago = first_id(time.time() - 2 * 86400)
    with database.writing() as connection:
        events.remove_old(connection, time.time() + 2 * 86400, 1.0, most=0)
        row = connection.execute(select(Prediction.__table__).where(Prediction.answer_id == "old")).mappings().one()
        connection.execute(Prediction.__table__.insert().values(**{**row, "id": two_days_ago}))
        connection.execute(update(Feedback).values(prediction_id=two_days_ago))
        connection.execute(delete(Prediction).where(Prediction.id == row["id"]))
        connection.execute(update(models.Picture).values(id=two_days_ago))
    tidy(store)
    assert hits(store) == ["new"]
    assert (count(store, Feedback), count(store, models.Picture)) == (0, 0)
    assert files(store) == []


def test_beyond_the_count_the_oldest_without_feedback_go(stores: Stores) -> None:
    store = stores(keep_count=3)
    keep(store, *(annotation(str(i)) for i in range(6)))
    run(store.feedback(Event("0", "verdict", True)))
    tidy(store)
    assert hits(store) == ["5", "4", "0"]


def test_times_that_no_id_tells_are_refused_and_the_longest_that_are_not_can_be_told(stores: Stores) -> None:
    longest: dict[str, Any] = {"keep_days": 36525, "results_hours": 438_300, "feedback_window_h": 438_300}
    for name, most in longest.items():
        for more in (most + 1, float("inf")):
            with pytest.raises(ValidationError, match=name):
                StoreSettings(**{name: more})
    store = stores(keep="flagged", **longest)
    keep(store, annotation("a"))
    tidy(store)
    assert hits(store) == ["a"]


# ---- feedback -------------------------------------------------------------------------------------------------------


def test_feedback_finds_an_answer_that_was_given_a_moment_before(stores: Stores) -> None:
    store = stores()

    async def all_at_once() -> list[Any]:
        for i in range(1500):  # more than one batch
            store.offer(annotation(f"a{i}"), PICTURE)
        return await asyncio.gather(*(store.feedback(Event(f"a{i}", "verdict", True)) for i in range(1450, 1500)))

    receipts = run(all_at_once())
    assert len({receipt.id for receipt in receipts}) == 50 and count(store, Feedback) == 50


def test_feedback_is_counted_once_with_the_verdict_that_was_given_and_its_revision(stores: Stores) -> None:
    store, told, app = stores(), list[tuple[Any, ...]](), FastAPI()

    async def store_of() -> Store:
        return store

    app.include_router(router(store_of, lambda *event: told.append(event)))
    keep(store, annotation("a", "ai", "a dog", "dog"))
    for event in ({"part": "verdict", "right": False, "value": "human"}, {"part": "tags", "right": True}):
        sent = [send(app, "POST", "/v1/feedback", json={"id": "a"} | event).status_code for _ in range(2)]
        assert sent == [201, 200]
    assert told == [("verdict", "ai", False, "1"), ("tags", "", True, "")]


def test_feedback_finds_an_answer_that_another_replica_gave_a_moment_before(stores: Stores) -> None:
    one, other = stores(), stores()
    for store in (one, other):
        wait_for(lambda store=store: store.status()["state"] == "ready")
    for i in range(5):
        one.offer(annotation(f"a{i}"), PICTURE)
        assert run(other.feedback(Event(f"a{i}", "verdict", True))).is_new


def test_feedback_on_an_unknown_answer_is_refused(stores: Stores) -> None:
    store = stores()
    keep(store, annotation("a"))
    for event in (Event("b", "verdict", True), Event("a", "verdict", True, sha256="0" * 64)):
        with pytest.raises(UnknownAnswer):
            run(store.feedback(event))
    assert count(store, Feedback) == 0


def test_an_id_that_was_given_twice_means_the_last_or_the_picture_that_is_named(stores: Stores) -> None:
    store = stores()
    first, second = annotation("a"), annotation("a").model_copy(update={"sha256": SHA})
    keep(store, first)
    keep(store, second)
    assert run(store.feedback(Event("a", "verdict", True))).sha256 == SHA
    assert run(store.feedback(Event("a", "verdict", True, sha256=first.sha256))).sha256 == first.sha256


def test_the_same_event_is_kept_once_and_its_key_means_nothing_else(stores: Stores) -> None:
    store, other = stores(), stores()
    keep(store, annotation("a"))
    event = Event("a", "verdict", False, "ai", key="k1")

    async def many_times() -> list[Any]:
        return await asyncio.gather(*(each.feedback(event) for each in (store, other) * 20))

    receipts = run(many_times())
    assert sum(receipt.is_new for receipt in receipts) == 1 and len({receipt.id for receipt in receipts}) == 1
    with pytest.raises(KeyConflict):
        run(store.feedback(Event("a", "verdict", True, key="k1")))
    unnamed = [run(store.feedback(Event("a", "tags", False, ["cat"]))) for _ in range(2)]
    assert [receipt.is_new for receipt in unnamed] == [True, False]
    assert run(store.feedback(Event("a", "verdict", False, "ai", key="k2"))).is_new, "said again, by another name"
    assert count(store, Feedback) == 3
    assert run(store.search(Query()))[0][0].judged == ("tags", "verdict")
