"""The queue of those who can wait, on SQLite and on PostgreSQL: each picture answered once, whoever dies at it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Event as Signal
from typing import Any

import pytest
from fastapi.responses import Response
from sqlalchemy import Connection, func, select, text, update

from app import deferred as queue
from app.admission import Admission
from app.analysis import Graph
from app.callbacks import answer_of
from app.deferred import Deferral, wants_to_wait
from app.problems import Problem
from app.store import deferred, events
from app.store.database import StoreUnavailable
from app.store.deferred import Accepted, QueueFull
from app.store.events import KeyConflict
from app.store.models import Deferred, Prediction, first_id
from app.store.settings import StoreSettings
from app.store.store import Store
from deployments.annotation import Annotation, Caption
from tests.waiting import wait_for


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = Store(StoreSettings(url=database_url, timeout_s=60, search_timeout_s=60, deferred_in_work=20))
    opened.start()
    yield opened
    opened.close()


def picture(number: int) -> Accepted:
    data = f"picture {number}".encode()
    return Accepted(f"mine-{number}", hashlib.sha256(data).hexdigest(), data)


def put(store: Store, place: str, *pictures: Accepted, count: int = 100, size: int = 2**20, tasks: str = "tag") -> None:
    run = partial(deferred.put, place=place, tasks=tasks, explain="", pictures=pictures)
    asyncio.run(store.commit(partial(run, max_count=count, max_bytes=size)))


def lease(store: Store, most: int = 10, now_s: float | None = None) -> list[deferred.Leased]:
    now_s = time.time() if now_s is None else now_s
    return asyncio.run(store.commit(partial(deferred.lease, now_s=now_s, lease_s=60, most=most)))


def finish(store: Store, leased: deferred.Leased, status: int = 200) -> bool:
    sha256 = hashlib.sha256(leased.data).hexdigest()
    record = Annotation(id=leased.answer_id, sha256=sha256, caption=Caption(text="a dog")) if status == 200 else None
    answer = record.model_dump_json() if record else '{"status": 422}'
    run = partial(deferred.finish, row_id=leased.id, status=status, answer=answer, record=record, expires_s=None)
    return asyncio.run(store.commit(run))


def outcomes(store: Store, place: str) -> list[deferred.Outcome]:
    return asyncio.run(store.read(partial(deferred.outcomes, place=place)))


def is_any_free(store: Store) -> bool:
    return asyncio.run(store.read(partial(deferred.is_any_free, now_s=time.time())))


def answers(store: Store) -> int:
    return asyncio.run(
        store.read(lambda connection: connection.execute(select(func.count(Prediction.id))).scalar_one())
    )


def test_what_was_taken_in_is_leased_answered_and_kept_once(store: Store) -> None:
    put(store, "first", picture(0), picture(1))
    put(store, "second", picture(2))
    assert is_any_free(store)
    leased = lease(store)
    assert [item.data for item in leased] == [b"picture 0", b"picture 1", b"picture 2"]
    assert [item.attempts for item in leased] == [1, 1, 1] and not is_any_free(store) and lease(store) == []
    assert [outcome.status for outcome in outcomes(store, "first")] == [0, 0]

    assert finish(store, leased[1]) and finish(store, leased[0], status=422)
    assert [outcome.status for outcome in outcomes(store, "first")] == [422, 200]
    assert Annotation.model_validate_json(outcomes(store, "first")[1].answer).id == "mine-1"
    assert outcomes(store, "nowhere") == []
    assert finish(store, leased[2]) and not finish(store, leased[2]), "whoever is second writes nothing"
    assert answers(store) == 2


def test_a_lease_that_has_run_out_or_is_given_back_is_anothers(store: Store) -> None:
    put(store, "here", picture(0))
    (first,) = lease(store)
    assert lease(store, now_s=time.time() + 59) == []
    (again,) = lease(store, now_s=time.time() + 61)
    assert (again.id, again.attempts) == (first.id, 2)
    give_back = partial(deferred.give_back, ids=[again.id], until_s=time.time() - 1)
    asyncio.run(store.commit(give_back))
    (third,) = lease(store)
    assert third.attempts == 3
    # the first one was only slow: what it says counts, and nothing else
    assert finish(store, first) and not finish(store, third)
    assert answers(store) == 1
    asyncio.run(store.commit(give_back))
    assert lease(store, now_s=time.time() + 1000) == [], "what has been answered is never worked on again"


def test_the_same_request_has_one_place_and_another_one_is_told(store: Store) -> None:
    put(store, "key", picture(0))
    put(store, "key", picture(0))
    assert len(lease(store)) == 1
    put(store, "key", picture(0), count=0)  # there is no room, and it needs none
    with pytest.raises(KeyConflict):
        put(store, "key", picture(1))
    with pytest.raises(KeyConflict):
        put(store, "key", picture(0), tasks="detect")


def test_a_full_queue_takes_nothing_of_a_request(store: Store) -> None:
    put(store, "a", picture(0), picture(1), count=3)
    with pytest.raises(QueueFull):
        put(store, "b", picture(2), picture(3), count=3)
    with pytest.raises(QueueFull):
        put(store, "b", picture(2), size=20)
    assert outcomes(store, "b") == []
    for leased in lease(store):
        finish(store, leased)
    put(store, "b", picture(2), picture(3), count=2, size=20)  # what is answered takes no room


def test_of_what_waits_number_age_and_room_are_known(store: Store) -> None:
    def backlog(now_s: float, count: int = 10, size: int = 1000) -> deferred.Backlog:
        return asyncio.run(store.read(partial(deferred.backlog, now_s=now_s, max_count=count, max_bytes=size)))

    put(store, "a", picture(0))
    taken_s = time.time()
    earlier = {"id": Deferred.id - first_id(1000)}
    asyncio.run(store.commit(lambda connection: connection.execute(update(Deferred).values(earlier))))
    put(store, "b", picture(1), picture(2))
    assert backlog(taken_s) == (3, pytest.approx(1000, abs=60), 0.3)
    assert backlog(taken_s, size=36).room_used == 0.75, "three times nine bytes"
    assert backlog(taken_s, count=0, size=0).room_used == 0.0
    first, *others = lease(store)
    assert backlog(taken_s).pictures == 3, "what is worked on has no answer yet"
    assert finish(store, first)
    assert backlog(taken_s) == (2, pytest.approx(0, abs=60), 0.2)
    assert backlog(taken_s - 1000).age_s == 0.0, "another's clock is ahead"
    assert all(finish(store, leased) for leased in others)
    assert backlog(taken_s + 1000) == (0, 0.0, 0.0)


def test_a_deleted_picture_is_neither_worked_on_nor_answered(store: Store) -> None:
    put(store, "a", picture(0))
    (leased,) = lease(store)
    asyncio.run(store.delete_picture(picture(0).sha256))
    assert not finish(store, leased)
    assert outcomes(store, "a") == [] and answers(store) == 0


def test_a_deleted_picture_of_several_keeps_its_turn_and_says_that_it_is_gone(store: Store) -> None:
    pictures = [picture(0), picture(1), picture(1), picture(2)]
    put(store, "a", *pictures)
    put(store, "b", picture(1), picture(1))
    first, *_, last = lease(store)[:4]
    assert finish(store, last)
    asyncio.run(store.delete_picture(picture(1).sha256))
    assert outcomes(store, "b") == [], "of which nothing else is left"
    assert finish(store, first)
    status, answer = answer_of(outcomes(store, "a"))
    gone = Problem("not_found", "This picture was deleted.", final=True).to_dict()
    items = json.loads(answer)["items"]
    assert status == 200 and [item.get("id") for item in items] == ["mine-0", None, None, "mine-2"]
    assert items[1] == items[2] == gone
    held = (Deferred.sha256, Deferred.answer_id, Deferred.data, Deferred.size_bytes, Deferred.name)
    marks = select(*held).where(Deferred.status == 404)
    left = asyncio.run(store.read(lambda connection: [tuple(row) for row in connection.execute(marks)]))
    assert left == [("", "", b"", 0, None)] * 2

    put(store, "a", *pictures)
    assert lease(store) == [], "sent again it is the same request"
    put(store, "a", *pictures, count=0)
    for other in (pictures[:3], [picture(3), *pictures[1:]]):
        with pytest.raises(KeyConflict):
            put(store, "a", *other)
    asyncio.run(store.delete_picture(picture(0).sha256))
    assert len(outcomes(store, "a")) == 4
    asyncio.run(store.delete_picture(picture(2).sha256))
    assert outcomes(store, "a") == []


def test_a_deletion_keeps_no_answer_longer(store: Store) -> None:
    put(store, "here", picture(0), picture(1))
    for leased in lease(store):
        finish(store, leased)
    day_ago = {"id": Deferred.id - first_id(25 * 3600), "leased_until": Deferred.leased_until - 25 * 3600 * 1000}
    asyncio.run(store.commit(lambda connection: connection.execute(update(Deferred).values(day_ago))))
    asyncio.run(store.delete_picture(picture(0).sha256))
    assert asyncio.run(store.commit(partial(deferred.remove_old, now_s=time.time(), keep_h=24, most=10))) == 2


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_pictures_of_one_request_that_are_deleted_at_once_leave_nothing(database_url: str, store: Store) -> None:
    put(store, "a", picture(0), picture(1))
    other = Store(StoreSettings(url=database_url, timeout_s=60, search_timeout_s=60))
    other.start()
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    try:
        assert store._database is not None
        wait_for(lambda: other.status()["state"] == "ready")
        with store._database.reading() as looking, store._database.writing() as connection:
            events.forget_picture(connection, picture(0).sha256, time.time())
            second = other.submit(partial(events.forget_picture, sha256=picture(1).sha256, at_s=time.time()))
            wait_for(lambda: second.done() or looking.execute(text(waiting)).scalar_one() > 0)
        second.result(60)
        assert outcomes(store, "a") == []
    finally:
        other.close()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_an_answer_that_is_not_committed_does_not_outlive_the_deletion_of_its_picture(
    database_url: str, store: Store
) -> None:
    put(store, "a", picture(0))
    (leased,) = lease(store)
    record = Annotation(id=leased.answer_id, sha256=picture(0).sha256, caption=Caption(text="a dog"))
    end = partial(deferred.finish, row_id=leased.id, status=200, answer="{}", record=record, expires_s=None)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    other = Store(StoreSettings(url=database_url, timeout_s=60, search_timeout_s=60))
    other.start()
    try:
        assert store._database is not None
        wait_for(lambda: other.status()["state"] == "ready")
        with store._database.reading() as looking, store._database.writing() as connection:
            assert end(connection)
            deletion = other.submit(partial(events.forget_picture, sha256=picture(0).sha256, at_s=time.time()))
            wait_for(lambda: deletion.done() or looking.execute(text(waiting)).scalar_one() > 0)
        assert deletion.result(60)["predictions"] == 1 and answers(store) == 0
    finally:
        other.close()


def test_answers_that_nobody_fetched_go_after_a_while_and_what_waits_stays(store: Store) -> None:
    put(store, "answered", picture(0))
    finish(store, lease(store)[0])
    put(store, "waiting", picture(1))
    later = time.time() + 25 * 3600
    removed = asyncio.run(store.commit(partial(deferred.remove_old, now_s=later, keep_h=24, most=10)))
    assert removed == 1
    left = asyncio.run(store.read(lambda connection: connection.execute(select(Deferred.place)).scalars().all()))
    assert left == ["waiting"]


def test_answers_can_be_fetched_for_as_long_from_when_the_last_of_a_request_is_there(store: Store) -> None:
    def remove_old(now_s: float) -> int:
        return asyncio.run(store.commit(partial(deferred.remove_old, now_s=now_s, keep_h=24, most=10)))

    def pass_a_day() -> None:
        day = {"id": Deferred.id - first_id(25 * 3600), "leased_until": Deferred.leased_until - 25 * 3600 * 1000}
        asyncio.run(store.commit(lambda connection: connection.execute(update(Deferred).values(day))))

    refused = Accepted("mine-2", "", b"", 415, "{}")
    put(store, "here", picture(0), picture(1), refused)
    put(store, "refused", refused)
    assert remove_old(time.time()) == 0
    finish(store, lease(store, most=1)[0])
    pass_a_day()
    assert remove_old(time.time()) == 1, "of the place where nothing waits"
    finish(store, lease(store, most=1)[0])
    assert remove_old(time.time()) == 0 and len(outcomes(store, "here")) == 3
    pass_a_day()
    assert remove_old(time.time()) == 3


def test_the_preference_is_read_as_rfc_7240_writes_it() -> None:
    assert wants_to_wait(["respond-async"]) and wants_to_wait(["wait=10, Respond-Async; x=1"])
    assert wants_to_wait(["return=minimal", "respond-async"])
    assert not wants_to_wait([]) and not wants_to_wait(["return=respond-async", "respond-asynchronously"])


def test_a_database_that_does_not_answer_has_no_empty_queue_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = StoreSettings(url=f"sqlite:///{tmp_path}/file/store.db")
    (tmp_path / "file").write_text("")  # no folder: the database cannot be opened
    down = Store(settings)
    down.start()
    deferral = Deferral(down, QuickGraph(), Admission(2, 4, 60.0), 60.0)
    try:
        with caplog.at_level("WARNING", logger="ray.serve"):
            assert [asyncio.run(deferral.backlog()) for _ in range(3)] == [None] * 3
    finally:
        down.close()
    assert sum("how many pictures wait" in record.getMessage() for record in caplog.records) == 1


def test_only_places_that_nobody_waits_for_are_slipped_into() -> None:
    async def try_it() -> None:
        admission = Admission(2, 4, 60.0)
        assert admission.slip_in(8) == 2 and admission.in_work == 2
        interactive = asyncio.ensure_future(admission.enter())
        await asyncio.sleep(0)
        admission.slip_out(1)
        await interactive  # the place that came free is its
        assert admission.slip_in(8) == 0
        another = asyncio.ensure_future(admission.enter())
        await asyncio.sleep(0)
        admission.leave(2)
        assert admission.slip_in(8) == 1 and admission.in_work == 2
        await another

    asyncio.run(try_it())


class QuickGraph(Graph):
    """A graph without models: every picture is answered at once."""

    def __init__(self) -> None:
        pass

    async def analyze(self, data: bytes, identity: str | None, *_: object) -> Annotation:
        return Annotation(id=identity or "", sha256=hashlib.sha256(data).hexdigest(), caption=Caption(text="a dog"))


def test_what_waits_teaches_the_admission_that_more_may_be_in_work(store: Store) -> None:
    put(store, "here", *(picture(number) for number in range(20)))

    async def work() -> Admission:
        admission = Admission(64, 4, 60.0, 30.0)
        deferral = Deferral(store, QuickGraph(), admission, 60.0)
        while deferral.is_possible and (waiting := await deferral.backlog()) and waiting.pictures:
            await deferral._begin_some()
            await asyncio.gather(*deferral._working.values())
        return admission

    admission = asyncio.run(work())
    assert admission.slipping.places > 8
    assert admission.in_work == admission.slipped == 0
    assert answers(store) == 20


class FailingGraph(QuickGraph):
    """A graph without models, which fails as it is told."""

    def __init__(self, failure: Exception) -> None:
        self.failure = failure

    async def analyze(self, *_: object) -> Annotation:
        raise self.failure


@pytest.mark.parametrize("code", ["overloaded", "unavailable", "timeout"])
def test_a_problem_that_is_the_answer_says_so_and_one_that_nobody_can_look_there_does_not(
    tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "_MAX_ATTEMPTS", 1)
    opened = Store(StoreSettings(url=f"sqlite:///{tmp_path}/store.db", timeout_s=60, search_timeout_s=60))
    opened.start()
    failure = Problem(code, "Too much.", {"Retry-After": "7"})
    deferral = Deferral(opened, FailingGraph(failure), Admission(2, 4, 60.0), 60.0)

    async def answered() -> Response:
        await deferral._begin_some()
        await asyncio.gather(*deferral._working.values())
        return await deferral.result("here")

    def away(*_: object) -> None:
        raise StoreUnavailable("gone")

    put(opened, "here", picture(0))
    answer = asyncio.run(answered())
    assert answer.status_code == failure.status and "retry-after" not in answer.headers
    assert json.loads(bytes(answer.body)) == failure.to_dict() | {"final": True}
    monkeypatch.setattr(opened, "read", away)
    with pytest.raises(Problem) as later:
        asyncio.run(deferral.result("here"))
    assert later.value.code == "unavailable" and "final" not in later.value.to_dict() and later.value.headers
    opened.close()


def test_what_is_leased_after_nobody_waits_for_it_any_more_is_anothers_at_once_and_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Store(StoreSettings(url=f"sqlite:///{tmp_path}/store.db", timeout_s=0.1, search_timeout_s=60))
    opened.start()
    wait_for(lambda: opened.status()["state"] == "ready")
    put_in = partial(deferred.put, place="here", tasks="tag", explain="", pictures=[picture(0)])
    opened.submit(partial(put_in, max_count=9, max_bytes=99)).result(60)
    held, at_once = Signal(), deferred.lease

    def late(*arguments: Any, **options: Any) -> list[deferred.Leased]:
        leased = at_once(*arguments, **options)
        assert leased and held.wait(60)
        return leased

    monkeypatch.setattr(deferred, "lease", late)
    deferral = Deferral(opened, QuickGraph(), Admission(2, 4, 60.0), 60.0)
    with pytest.raises(StoreUnavailable, match="in time"):
        asyncio.run(deferral._begin_some())
    assert deferral._admission.in_work == 0
    held.set()

    def attempts_of_free(connection: Connection) -> list[int]:
        is_free = Deferred.leased_until <= int(time.time() * 1000)
        return list(connection.execute(select(Deferred.attempts).where(is_free)).scalars())

    wait_for(lambda: opened.submit(attempts_of_free).result(60) == [0])
    opened.close()


def test_what_a_replica_that_ends_was_at_is_anothers_and_was_no_attempt(store: Store) -> None:
    put(store, "here", picture(0))
    deferral = Deferral(store, FailingGraph(Problem("timeout", "Late.")), Admission(2, 4, 60.0), 60.0, lambda: False)

    async def lease() -> deferred.Leased:
        (leased,) = await store.commit(partial(deferred.lease, now_s=time.time(), lease_s=60, most=1))
        return leased

    async def end() -> None:
        leased = await lease()
        deferral._working[leased.id] = asyncio.create_task(asyncio.sleep(0))
        deferral.close()  # a new version is deployed, or there are too many replicas: nobody said `make stop`

    asyncio.run(end())
    assert asyncio.run(lease()).attempts == 1


def test_a_queue_with_nothing_in_it_takes_no_places(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    admission = Admission(2, 4, 60.0)
    deferral = Deferral(store, FailingGraph(Problem("timeout", "Late.")), admission, 60.0, lambda: False)
    taken: list[int] = []
    monkeypatch.setattr(admission, "slip_in", lambda most: taken.append(most) or 0)
    asyncio.run(store.commit(lambda _: None))  # it is open
    asyncio.run(deferral._begin_some())
    assert not taken
    put(store, "here", picture(0))
    asyncio.run(deferral._begin_some())
    assert taken


def test_what_fails_while_a_replica_stops_is_anothers_to_try_and_counts_for_nothing(store: Store) -> None:
    put(store, "here", picture(0))
    stopping = True
    deferral = Deferral(
        store, FailingGraph(Problem("unavailable", "Gone.")), Admission(2, 4, 60.0), 60.0, lambda: stopping
    )

    async def attempt(number: int) -> deferred.Leased:
        await store.commit(
            lambda connection: connection.execute(update(Deferred).values(attempts=number - 1, leased_until=0))
        )
        (leased,) = await store.commit(partial(deferred.lease, now_s=time.time(), lease_s=60, most=1))
        deferral._admission.slip_in(1)
        await deferral._work(leased)
        return leased

    def attempts() -> int:
        return asyncio.run(store.read(lambda connection: connection.execute(select(Deferred.attempts)).scalar_one()))

    for number in (1, queue._MAX_ATTEMPTS):
        assert asyncio.run(attempt(number)).attempts == number
        assert outcomes(store, "here")[0].status == 0 and attempts() == number - 1
    stopping = False
    asyncio.run(attempt(1))
    assert outcomes(store, "here")[0].status == 0 and attempts() == 1
    asyncio.run(attempt(queue._MAX_ATTEMPTS))
    assert outcomes(store, "here")[0].status == 503
