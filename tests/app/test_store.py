"""The store, on SQLite and on PostgreSQL alike: what is kept, found, judged and deleted, and what a failing database
does and does not do to it.
"""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import sqlite3
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from threading import Event as Signal
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from fastapi import FastAPI
from PIL import Image
from pydantic import ValidationError
from sqlalchemy import delete, func, inspect, select, text, update

from app import idempotency
from app.feedback import router
from app.problems import Problem, install
from app.store import events, key_uses, models, search, writer
from app.store.database import Database, StoreUnavailable, migrate
from app.store.events import Event, KeyConflict, UnknownAnswer
from app.store.models import Base, Feedback, KeyUse, Prediction, first_id, new_id, time_of
from app.store.pictures import PictureFiles, PicturesUnavailable
from app.store.search import BadCursor, Place, Query
from app.store.settings import StoreSettings
from app.store.store import Found, Store, StoreOff
from app.store.writer import Writer
from deployments.annotation import Annotation, Caption, Detection, Provenance
from tests.app.postgres import Postgres
from tests.app.small_app import send
from tests.waiting import wait_for

PICTURE = b"\xff\xd8\xff\xe0 the bytes of a picture"
#: A busy machine is no database that fails.
PATIENT: dict[str, Any] = {"timeout_s": 60.0, "search_timeout_s": 60.0}
SHA = hashlib.sha256(PICTURE).hexdigest()


@pytest.fixture
def url(database_url: str) -> str:
    """A database that has never been opened."""
    return database_url


class Stores:
    """Opens stores on one database, and closes them."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder, self.opened = url, folder, []

    def __call__(self, **settings: Any) -> Store:
        settings = PATIENT | {"pictures_url": str(self.folder / "pictures")} | settings
        store = Store(StoreSettings(url=self.url, **settings))
        assert store._writer is not None
        store._writer._tidy_at = time.monotonic() + 1e6  # tests tidy up when they mean to
        self.opened.append(store)
        store.start()
        return store


@pytest.fixture
def stores(url: str, tmp_path: Path) -> Iterator[Stores]:
    made = Stores(url, tmp_path)
    yield made
    for store in made.opened:
        store.close()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def annotation(name: str, label: str | None = "human", caption: str | None = None, *tags: str) -> Annotation:
    record = Annotation(
        id=name, sha256=hashlib.sha256(name.encode()).hexdigest(), models={"detector": "starter:detector#1"}
    )
    if label:
        provenance = Provenance(c2pa="absent", declared_ai=None)
        record.detection = Detection(label=label, ai_probability=0.25, provenance=provenance)
    if caption is not None:
        record.caption = Caption(text=caption)
        record.tags = list(tags)
    return record


def keep(store: Store, *records: Annotation) -> None:
    """Offer answers one after another, and wait until they are written."""
    written = store.status()["written"]
    for record in records:
        store.offer(record, PICTURE)
        time.sleep(0.002)  # each has a millisecond of its own
    wait_for(lambda: store.status()["written"] >= written + len(records))


def tidy(store: Store) -> None:
    """Remove what is too old, files included."""
    assert store._database is not None
    store._tidy(store._database)
    if store._removing is not None:
        store._removing.result(60)


def files(store: Store) -> list[Path]:
    """Pictures that are kept, and parts of some."""
    assert store.settings.pictures_url is not None
    return [path for path in Path(store.settings.pictures_url).rglob("*") if path.is_file()]


def names(found: list[Found]) -> list[str]:
    return [item.annotation.id for item in found]


def hits(store: Store, **query: Any) -> list[str]:
    return names(run(store.search(Query(**query)))[0])


def count(store: Store, table: Any) -> int:
    assert store._database is not None
    with store._database.reading() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


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


def test_migrations_make_the_tables_that_the_code_has_and_take_them_away_again(url: str) -> None:
    database = Database(url, 60, 60)
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


def test_a_database_of_a_newer_program_is_left_alone(url: str) -> None:
    database = Database(url, 60, 60)
    database.open()
    with database.writing() as connection:
        connection.execute(text("UPDATE deeptrust_store_version SET version_num = '9999'"))
    with pytest.raises(StoreUnavailable, match="9999"):
        database.open()
    database.close()


def _open(url: str) -> None:
    database = Database(url, 60, 60)
    database.open()
    database.close()


def test_several_processes_open_a_new_database_at_once(url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(_open, [url] * 4))


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


# ---- pictures and deletion ------------------------------------------------------------------------------------------


def test_a_picture_is_kept_when_there_is_feedback_on_it(stores: Stores) -> None:
    store = stores()
    keep(store, annotation("a").model_copy(update={"sha256": SHA}))
    assert not run(store.keep_picture(SHA, PICTURE)), "nobody has said anything of it"
    assert not run(store.feedback(Event("a", "verdict", False))).has_picture
    assert run(store.keep_picture(SHA, PICTURE)) and run(store.keep_picture(SHA, PICTURE))
    assert run(store.picture(SHA)) == (PICTURE, "image/jpeg")
    assert run(store.feedback(Event("a", "caption", False))).has_picture
    assert run(store.search(Query()))[0][0].has_picture
    assert run(store.picture("0" * 64)) is None


def test_all_pictures_are_kept_where_that_is_wanted_up_to_a_bound(stores: Stores) -> None:
    store = stores(pictures="all", max_picture_queue_bytes=len(PICTURE) * 2)
    keep(store, annotation("a").model_copy(update={"sha256": SHA}))
    wait_for(lambda: run(store.search(Query()))[0] and run(store.search(Query()))[0][0].has_picture)
    store.offer(annotation("large"), PICTURE * 3)
    assert store.status()["pictures_dropped"] == 1


def test_a_picture_is_made_small_whatever_it_was_allowed_to_be_and_a_damaged_one_is_no_outage(stores: Stores) -> None:
    store, app = stores(), FastAPI()

    async def store_of() -> Store:
        return store

    install(app)
    app.include_router(router(store_of))
    buffer = BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")  # below what is accepted by default
    for name, data in (("tiny", buffer.getvalue()), ("damaged", PICTURE)):
        sha256 = hashlib.sha256(data).hexdigest()
        keep(store, annotation(name).model_copy(update={"sha256": sha256}))
        run(store.feedback(Event(name, "verdict", False)))
        assert run(store.keep_picture(sha256, data))
        answer = send(app, "GET", f"/v1/pictures/{sha256}?size=small")
        if name == "tiny":
            assert answer.status_code == 200 and Image.open(BytesIO(answer.content)).format == "JPEG"
        else:
            assert (answer.status_code, answer.json()["code"]) == (422, "truncated")


def test_a_picture_that_is_wanted_again_is_not_removed(stores: Stores) -> None:
    store, hour_ago = stores(), first_id(time.time() - 3601)
    keep(store, annotation("a").model_copy(update={"sha256": SHA}))
    run(store.feedback(Event("a", "verdict", False)))
    expect = partial(events.expect_picture, sha256=SHA, kind="image/jpeg", size_bytes=1, only_flagged=True)
    assert run(store.commit(expect))
    run(store.commit(lambda connection: connection.execute(update(models.Picture).values(id=hour_ago))))
    assert run(store.commit(events.unwanted_picture)) == SHA
    assert run(store.commit(expect))
    assert run(store.commit(events.unwanted_picture)) is None


def want_picture(store: Store) -> PictureFiles:
    """Keep an answer about a picture and feedback on it, so that the picture may be kept too; where pictures lie."""
    keep(store, annotation("a").model_copy(update={"sha256": SHA}))
    run(store.feedback(Event("a", "verdict", True)))
    assert store._files is not None
    return store._files


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    made = Held(monkeypatch)
    yield made
    made.go_on.set()


class Held:
    """Holds up what stores do with files until it is told to let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch, self.go_on = monkeypatch, Signal()
        self.there: list[str] = []
        """Pictures whose file somebody is at."""

    def __call__(self, store: Store, what: str) -> None:
        do = getattr(store._files, what)

        def late(sha256: str, *rest: Any) -> Any:
            self.there.append(sha256)
            assert self.go_on.wait(60)
            return do(sha256, *rest)

        self._monkeypatch.setattr(store._files, what, late)


def test_slow_files_keep_nobody_from_the_database(stores: Stores, held: Held) -> None:
    store = stores()
    want_picture(store)
    run(store.keep_picture(SHA, PICTURE))
    held(store, "read")

    async def ask() -> list[Any]:
        pictures = [asyncio.ensure_future(store.picture(SHA)) for _ in range(9)]
        await asyncio.to_thread(wait_for, lambda: len(held.there) == 4)
        assert names((await asyncio.wait_for(store.search(Query()), 10))[0]) == ["a"]
        held.go_on.set()
        return await asyncio.gather(*pictures)

    assert run(ask()) == [(PICTURE, "image/jpeg")] * 9


def test_files_that_are_removed_slowly_do_not_keep_others_from_writing(stores: Stores, held: Held) -> None:
    store, hour_ago = stores(), first_id(time.time() - 3601)
    held(store, "remove")
    left = {"id": hour_ago, "media_type": "image/jpeg", "size_bytes": 1, "stored": False}
    rows = [left | {"sha256": str(number) * 64} for number in range(3)]
    run(store.commit(lambda connection: connection.execute(models.Picture.__table__.insert(), rows)))
    assert store._writer is not None
    store._writer._tidy_at = 0.0
    run(store.commit(lambda connection: None))  # after which it tidies up
    wait_for(lambda: held.there)
    assert store.submit(lambda connection: "written").result(10) == "written"
    held.go_on.set()
    wait_for(lambda: count(store, models.Picture) == 0)
    assert sorted(held.there) == [row["sha256"] for row in rows]


@pytest.mark.parametrize("removed", ["before it is written", "after it is written"])
def test_a_picture_that_is_deleted_on_its_way_in_is_not_kept(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, removed: str
) -> None:
    store = stores()
    place = want_picture(store)
    write = place.write

    def meanwhile(sha256: str, data: bytes) -> None:
        store.submit(partial(events.forget_picture, sha256=sha256, at_s=time.time())).result(60)
        steps = [partial(place.remove, sha256), partial(write, sha256, data)]
        for step in steps if removed == "before it is written" else reversed(steps):
            step()

    monkeypatch.setattr(place, "write", meanwhile)
    assert not run(store.keep_picture(SHA, PICTURE))
    assert files(store) == [] and count(store, models.Picture) == 0


def test_a_picture_that_is_deleted_on_its_way_in_goes_though_who_writes_it_dies(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores()
    place = want_picture(store)
    write = place.write

    def meanwhile(sha256: str, data: bytes) -> None:
        run(store.delete_picture(sha256))
        write(sha256, data)
        raise PicturesUnavailable("dead")

    monkeypatch.setattr(place, "write", meanwhile)
    with pytest.raises(StoreUnavailable):
        run(store.keep_picture(SHA, PICTURE))
    assert len(files(store)) == 1
    hour_ago = first_id(time.time() - 3601)
    run(store.commit(lambda connection: connection.execute(update(models.Picture).values(id=hour_ago))))
    tidy(store)
    assert files(store) == [] and count(store, models.Picture) == 0


def somebody_waits(store: Store) -> bool:
    """Whether a transaction waits for another one."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return bool(run(store.read(lambda connection: connection.execute(text(waiting)).scalar_one())))


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_an_answer_that_is_not_committed_does_not_outlive_the_deletion_of_its_picture(stores: Stores) -> None:
    store, other = stores(), stores()
    for each in (store, other):
        wait_for(lambda each=each: each.status()["state"] == "ready")
    row = models.row_of(annotation("a").model_copy(update={"sha256": SHA}), time.time(), None)
    with ThreadPoolExecutor(1) as pool:
        assert other._database is not None
        with other._database.writing() as connection:
            events.write_predictions(connection, [row])
            deletion = pool.submit(run, store.delete_picture(SHA))
            wait_for(lambda: deletion.done() or somebody_waits(other))
        assert deletion.result(60)["predictions"] == 1
    assert hits(store) == []


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_picture_that_was_written_waits_for_a_deletion_that_is_not_committed(stores: Stores) -> None:
    store, other = stores(), stores()
    want_picture(store)
    expect = partial(events.expect_picture, sha256=SHA, kind="image/jpeg", size_bytes=1, only_flagged=True)
    assert run(store.commit(expect))
    wait_for(lambda: other.status()["state"] == "ready")
    assert other._database is not None
    with other._database.writing() as connection:
        events.forget_picture(connection, SHA, time.time())
        stored = store.submit(partial(events.picture_stored, sha256=SHA, only_flagged=True))
        wait_for(lambda: stored.done() or somebody_waits(other))
    assert not stored.result(60)


def test_deletion_removes_picture_answers_and_feedback_everywhere(stores: Stores) -> None:
    store, other = stores(), stores()
    keep(store, annotation("stays", "ai", "a dog", "dog"))
    wait_for(lambda: other.status()["state"] == "ready")
    for name in ("a", "b"):
        keep(store, annotation(name, "ai", "a secret dog", "dog").model_copy(update={"sha256": SHA}))
    run(store.feedback(Event("a", "verdict", False)))
    run(store.keep_picture(SHA, PICTURE))
    assert files(store)
    # one that is in the queue when the deletion comes is not written afterwards
    late = models.row_of(annotation("late").model_copy(update={"sha256": SHA}), time.time(), None)
    assert run(other.delete_picture(SHA)) == {"pictures": 1, "predictions": 2, "feedback": 1}
    database = store._database
    assert database is not None
    with database.writing() as connection:
        events.write_predictions(connection, [late])
    assert hits(store) == ["stays"] and hits(store, words="secret") == [] and hits(store, words="dog") == ["stays"]
    assert files(store) == []
    assert run(store.picture(SHA)) is None and count(store, models.Picture) == 0
    assert run(store.delete_picture(SHA)) == {"pictures": 0, "predictions": 0, "feedback": 0}
    # uploaded again it is a picture like any other
    keep(store, annotation("again").model_copy(update={"sha256": SHA}))
    assert hits(store) == ["again", "stays"]


def test_deletion_waits_for_what_is_in_the_queue(stores: Stores) -> None:
    store = stores()

    async def at_once() -> dict[str, int]:
        store.offer(annotation("a").model_copy(update={"sha256": SHA}), PICTURE)
        return await store.delete_picture(SHA)

    run(at_once())
    time.sleep(0.5)
    assert hits(store) == []


# ---- search ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(stores: Stores) -> Store:
    store = stores()
    keep(
        store,
        annotation("caption", "human", "Two dogs running on the beach", "animal", "outdoors"),
        annotation("tag", "ai", "an animal at the sea", "dog", "beach"),
        annotation("one word", "ai", "a dog sleeps", "sofa"),
        annotation("accent", "uncertain", "a café in the rain", "street scene"),
        annotation("nothing", None),
    )
    return store


def test_words_are_found_by_their_stem_in_caption_and_tags_tags_first(filled: Store) -> None:
    assert hits(filled, words="dog") == ["tag", "one word", "caption"]
    assert hits(filled, words="the dogs at the beach") == ["tag", "caption"]
    assert hits(filled, words="RUN") == ["caption"]
    assert hits(filled, words="cafe") == hits(filled, words="Caf\N{LATIN SMALL LETTER E WITH ACUTE}") == ["accent"]
    assert hits(filled, words="elephant") == hits(filled, words="the") == hits(filled, words="!?") == []


def test_everything_that_is_asked_for_must_hold(filled: Store) -> None:
    assert hits(filled) == ["nothing", "accent", "one word", "tag", "caption"]
    assert hits(filled, verdict="ai") == ["one word", "tag"]
    assert hits(filled, words="dog", verdict="human") == ["caption"]
    assert hits(filled, tags=("street scene",)) == ["accent"]
    assert hits(filled, tags=("street",)) == hits(filled, tags=("dog", "sofa")) == []
    assert hits(filled, tags=("dog", "beach"), verdict="ai", words="sea") == ["tag"]


def test_a_query_is_words_and_nothing_else(filled: Store) -> None:
    for hostile in (
        *('"', "dog OR 1", "tags_words : dog", "dog*", "' | 'dog", "dog & !dog", "NEAR(dog beach)", "\\"),
        *("a" * 5000, "%", "\0"),
    ):
        assert set(hits(filled, words=hostile)) <= {"tag", "one word", "caption"}
        assert hits(filled, tags=(hostile,)) == hits(filled, verdict=hostile.replace("\0", "")) == []


def test_dates_bound_a_search(filled: Store) -> None:
    rows, _ = run(filled.search(Query()))
    middle = first_id(rows[2].at.timestamp())
    assert hits(filled, from_id=middle) == ["nothing", "accent", "one word"]
    assert hits(filled, until_id=middle) == ["tag", "caption"]
    assert hits(filled, words="dog", from_id=middle) == ["one word"]
    assert hits(filled, tags=("dog",), until_id=middle) == ["tag"]


@pytest.mark.parametrize("query", [{}, {"words": "dog"}, {"tags": ("dog",)}, {"verdict": "ai"}])
def test_pages_give_everything_once_while_more_is_written(stores: Stores, query: dict[str, Any]) -> None:
    store = stores()
    captions = [("a dog", "dog"), ("a dog", "cat"), ("a cat", "dog")]
    keep(store, *(annotation(str(i), "ai", *captions[i % 3]) for i in range(30)))
    everything = hits(store, limit=100, **query)
    seen: list[str] = []
    place: Place | None = Place()
    while place is not None:
        rows, place = run(store.search(Query(limit=7, place=place, **query)))
        assert len(rows) == 7 or place is None
        seen += names(rows)
        keep(store, annotation(f"later {len(seen)}", "ai", "a dog", "dog"))
        place = None if place is None else Place.parse(str(place))
    in_order = [name for name in seen if not name.startswith("later")]
    assert in_order == everything and len(set(seen)) == len(seen) and len(everything) >= 20


def test_many_rows_are_found_by_the_index_and_by_looking_through_the_newest(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores()
    keep(store, *(annotation(str(i), "ai", "a rare thing" if i % 5 == 0 else "a common thing", "x") for i in range(40)))
    expected = hits(store, words="rare", limit=50)
    monkeypatch.setattr(search, "_NEWEST_ROWS", 10)
    assert hits(store, words="rare", limit=50) == expected == [str(i) for i in range(35, -1, -5)]
    assert hits(store, words="rare", limit=2) == ["35", "30"]
    assert hits(store, words="rare", limit=4) == ["35", "30", "25", "20"], "there are enough a little further back"
    begins = {found.annotation.id: first_id(found.at.timestamp()) for found in run(store.search(Query(limit=50)))[0]}
    assert hits(store, words="rare", from_id=begins["10"], until_id=begins["17"]) == ["15", "10"]
    assert hits(store, words="rare", from_id=begins["4"], until_id=begins["33"]) == ["30", "25", "20", "15", "10", "5"]


@pytest.mark.parametrize(
    "cursor", ["", "x", "!!!!", str(Place(1, 5)) + "A", "Mi41", "MC4tMQ", "MC45MjIzMzcyMDM2ODU0Nzc1ODA4"]
)
def test_a_cursor_that_no_page_gave_is_refused(cursor: str) -> None:
    with pytest.raises(BadCursor):
        Place.parse(cursor)


# ---- a database that fails ------------------------------------------------------------------------------------------


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
        assert time.monotonic() - started < 1.0, "nobody waits for the lock to offer an answer"
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
    with pytest.raises(StoreUnavailable):
        job.result(10)
    wait_for(lambda: (store.status()["written"], store.status()["dropped"]) == (2, 1))
    assert set(hits(store)) == {"a", "b"}
    store.close()


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
