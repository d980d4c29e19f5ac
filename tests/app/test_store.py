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
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from fastapi import FastAPI
from sqlalchemy import delete, func, inspect, select, text, update

from app import idempotency
from app.feedback import router
from app.problems import Problem
from app.store import events, key_uses, models, search
from app.store.database import Database, StoreUnavailable, migrate
from app.store.events import Event, KeyConflict, UnknownAnswer
from app.store.models import Base, Feedback, KeyUse, Prediction, first_id, new_id, time_of
from app.store.search import BadCursor, Place, Query
from app.store.settings import StoreSettings
from app.store.store import Found, Store, StoreOff
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
    assert store._database is not None
    store._tidy(store._database)
    expected = {record.id for record in records if int(record.sha256[:8], 16) / 2**32 < 0.5} | {judged.id}
    assert set(hits(store, limit=100)) == expected and 5 < len(expected) < 35


def test_flagged_keeps_only_what_gets_feedback_in_time(stores: Stores) -> None:
    store = stores(keep="flagged", feedback_window_h=1.0)
    keep(store, annotation("a"), annotation("b"))
    run(store.feedback(Event("a", "verdict", False, "ai")))
    assert store._database is not None
    store._tidy(store._database)
    assert set(hits(store)) == {"a", "b"}, "feedback may still come"
    with store._database.writing() as connection:
        connection.execute(update(Prediction).where(Prediction.expires_id.is_not(None)).values(expires_id=1))
    store._tidy(store._database)
    assert hits(store) == ["a"]


def test_what_is_too_old_goes_with_its_feedback_and_picture(stores: Stores, tmp_path: Path) -> None:
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
    store._tidy(database)
    assert hits(store) == ["new"]
    assert (count(store, Feedback), count(store, models.Picture)) == (0, 0)
    assert [path for path in (tmp_path / "pictures").rglob("*") if path.is_file()] == []


def test_beyond_the_count_the_oldest_without_feedback_go(stores: Stores) -> None:
    store = stores(keep_count=3)
    keep(store, *(annotation(str(i)) for i in range(6)))
    run(store.feedback(Event("0", "verdict", True)))
    assert store._database is not None
    store._tidy(store._database)
    assert hits(store) == ["5", "4", "0"]


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


def test_deletion_removes_picture_answers_and_feedback_everywhere(stores: Stores, tmp_path: Path) -> None:
    store, other = stores(), stores()
    keep(store, annotation("stays", "ai", "a dog", "dog"))
    wait_for(lambda: other.status()["state"] == "ready")
    for name in ("a", "b"):
        keep(store, annotation(name, "ai", "a secret dog", "dog").model_copy(update={"sha256": SHA}))
    run(store.feedback(Event("a", "verdict", False)))
    run(store.keep_picture(SHA, PICTURE))
    assert [path for path in (tmp_path / "pictures").rglob("*") if path.is_file()]
    # one that is in the queue when the deletion comes is not written afterwards
    late = models.row_of(annotation("late").model_copy(update={"sha256": SHA}), time.time(), None)
    assert run(other.delete_picture(SHA)) == {"pictures": 1, "predictions": 2, "feedback": 1}
    database = store._database
    assert database is not None
    with database.writing() as connection:
        events.write_predictions(connection, [late])
    assert hits(store) == ["stays"] and hits(store, words="secret") == [] and hits(store, words="dog") == ["stays"]
    assert [path for path in (tmp_path / "pictures").rglob("*") if path.is_file()] == []
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
