"""Pictures in the store: kept, made small, and deleted with all that was said of them, whoever writes meanwhile."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from PIL import Image
from sqlalchemy import text, update

from app.feedback import router
from app.problems import install
from app.store import events, models
from app.store.database import StoreUnavailable
from app.store.events import Event
from app.store.models import first_id
from app.store.pictures import PictureFiles, PicturesUnavailable
from app.store.search import Query
from app.store.store import Store
from app.trials import Tried
from tests.app.small_app import send
from tests.app.stores import PICTURE, SHA, Held, Stores, annotation, count, files, hits, keep, names, run, tidy
from tests.data.made import S3Server, s3_server
from tests.waiting import wait_for


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

    assert run(at_once()) == {"pictures": 0, "predictions": 1, "feedback": 0}
    assert hits(store) == []


def test_an_answer_on_a_picture_that_was_deleted_while_it_was_worked_on_is_not_kept(stores: Stores) -> None:
    store, began_s = stores(), time.time()
    run(store.delete_picture(SHA))
    for name, key in (("a", None), ("b", "name")):
        store.offer(annotation(name).model_copy(update={"sha256": SHA}), PICTURE, key, began_s)
    store.offer(annotation("other"), PICTURE, began_s=began_s)
    keep(store, annotation("again").model_copy(update={"sha256": SHA}))
    assert hits(store) == ["again", "other"]


def test_a_trials_answer_on_a_picture_that_was_deleted_meanwhile_is_not_kept(stores: Stores) -> None:
    store, now = stores(), time.time()
    run(store.delete_picture(SHA))
    began_before, began_after = (
        Tried("detector", "candidate", True, "r", SHA, "ok", seconds, now + 10).row() for seconds in (30.0, 2.0)
    )
    store.offer_trials([began_before])
    store.offer_trials([began_after])
    wait_for(lambda: count(store, models.TrialAnswer) == 1)
    run(store.delete_picture(hashlib.sha256(b"another").hexdigest()))  # behind what was offered
    assert count(store, models.TrialAnswer) == 1


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with s3_server(tmp_path / "s3" / "root") as server:
        (server.folder / "bucket").mkdir()
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_pictures_lie_on_s3_where_that_is_wanted(s3: S3Server, stores: Stores) -> None:
    store = stores(pictures_url="s3://bucket/pictures/")
    place = want_picture(store)
    assert place.read(SHA) is None
    assert run(store.keep_picture(SHA, PICTURE))
    assert run(store.picture(SHA)) == (PICTURE, "image/jpeg")
    (file,) = (path for path in (s3.folder / "bucket" / "pictures").rglob("*") if path.is_file())
    assert file.name == SHA and file.read_bytes() == PICTURE
    assert run(store.delete_picture(SHA)) == {"pictures": 1, "predictions": 1, "feedback": 1}
    assert not file.exists() and place.read(SHA) is None
    place.remove(SHA)  # there is none, which is as well


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_bucket_that_does_not_exist_is_no_picture_that_is_not_there(s3: S3Server, stores: Stores) -> None:
    store = stores(pictures_url="s3://another/pictures")
    place = want_picture(store)
    for work in (partial(place.read, SHA), partial(place.remove, SHA), partial(place.write, SHA, PICTURE)):
        with pytest.raises(PicturesUnavailable, match="bucket does not exist"):
            work()
    with pytest.raises(StoreUnavailable, match="bucket does not exist"):
        run(store.delete_picture(SHA))


def test_of_a_full_disk_no_part_of_a_picture_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    place = PictureFiles(str(tmp_path))
    with pytest.raises(PicturesUnavailable, match="no space"):
        place.write("ab" * 32, PICTURE)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
