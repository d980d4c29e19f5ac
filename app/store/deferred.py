"""Pictures whose senders can wait, in a queue on disk: taken in, worked off by whichever process has room, each once.

A picture that was taken in is there until its answer is. Whoever works on it leases it; a lease that has run out (its
process was killed) lets another one work on it again. The answer, the row of ``predictions`` and the end of the wait
are one transaction, so a picture that two processes worked on after all is written once. Several pictures of one
request share its ``place``.

Functions on a connection, the same for both databases. Knows no models and no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import Connection, delete, exists, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import aliased

from app.store import callbacks
from app.store.events import DELETED, KeyConflict, write_predictions
from app.store.models import Deferred, first_id, new_id, row_of, time_of
from deployments.annotation import Annotation

#: Statuses of problems that another attempt may not meet: overloaded, unavailable, out of time.
_PASSING = (429, 503, 504)


class QueueFull(RuntimeError):
    """As many pictures wait as may."""


@dataclass(frozen=True)
class Accepted:
    """One picture of a request, as it was sent; with ``status`` and ``answer`` if it is answered already: refused, or
    sent before.
    """

    answer_id: str
    sha256: str
    data: bytes
    status: int = 0
    answer: str = ""
    name: str | None = None
    """Under which its answer is kept once, of a request that may be sent again."""


@dataclass(frozen=True)
class Leased:
    """A picture to be worked on."""

    id: int
    tasks: str
    explain: str
    answer_id: str
    data: bytes
    attempts: int
    request_id: str
    traceparent: str


@dataclass(frozen=True)
class Outcome:
    """What became of one picture of a request. ``status`` 0: it waits."""

    number: int
    status: int
    answer: str
    """JSON of the annotation, or of the problem."""


class Backlog(NamedTuple):
    """What waits."""

    pictures: int = 0
    age_s: float = 0.0
    """Since the oldest of them was taken in."""
    room_used: float = 0.0
    """Share of the room that is taken: of their number or of their bytes, whichever is more."""


def put(
    connection: Connection,
    place: str,
    tasks: str,
    explain: str,
    pictures: Sequence[Accepted],
    max_count: int,
    max_bytes: int,
    callback: str | None = None,
    request_id: str = "",
    traceparent: str = "",
) -> None:
    """Take a request's pictures in; the same pictures at the same place once. Those among them that were answered and
    have no whole answer are worked on again, if there is room.

    Args:
        callback: whom to tell when all of them are answered.
        request_id: of the request, for what is logged of the work.
        traceparent: its span, likewise.

    Raises:
        QueueFull: no room.
        KeyConflict: the place belongs to another request.
    """
    waiting, size = connection.execute(
        select(func.count(), func.coalesce(func.sum(Deferred.size_bytes), 0)).where(Deferred.status == 0)
    ).one()
    if waiting + len(pictures) > max_count or size + sum(len(picture.data) for picture in pictures) > max_bytes:
        if not _is_there(connection, place, tasks, explain, pictures, callback):
            raise QueueFull(f"{waiting} pictures wait")
        return
    now_s = time.time()
    ids = sorted(new_id(now_s) for _ in pictures)
    rows = [
        {
            "id": ids[number],
            "place": place,
            "number": number,
            "tasks": tasks,
            "explain": explain,
            "answer_id": picture.answer_id,
            "sha256": picture.sha256,
            "size_bytes": len(picture.data),
            "data": picture.data,
            "status": picture.status,
            "attempts": 0,
            "leased_until": int(now_s * 1000) if picture.status else 0,
            "answer": picture.answer,
            "name": picture.name,
            "request_id": request_id,
            "traceparent": traceparent,
        }
        for number, picture in enumerate(pictures)
    ]
    try:
        with connection.begin_nested():
            callbacks.remove_left(connection, place)
            connection.execute(insert(Deferred), rows)
            if callback is not None:
                callbacks.add(connection, place, callback, now_s)
                callbacks.release(connection, place)  # what needs no work is answered
    except IntegrityError:
        if not _is_there(connection, place, tasks, explain, pictures, callback):
            raise KeyConflict(place) from None
        _reopen(connection, place, pictures)


def _is_there(
    connection: Connection, place: str, tasks: str, explain: str, pictures: Sequence[Accepted], callback: str | None
) -> bool:
    """Whether this very request was taken in before.

    Raises:
        KeyConflict: another one was, at the same place.
    """
    columns = (Deferred.sha256, Deferred.tasks, Deferred.explain, Deferred.status)
    found = connection.execute(select(*columns).where(Deferred.place == place).order_by(Deferred.number)).all()
    if not found:
        return False
    if len(found) != len(pictures) or callbacks.url_of(connection, place) != callback:
        raise KeyConflict(place)
    for row, picture in zip(found, pictures, strict=True):
        # which one it was that was deleted nobody knows any more
        sha256 = row.sha256 if row.status == DELETED else picture.sha256
        if (row.sha256, row.tasks, row.explain) != (sha256, tasks, explain):
            raise KeyConflict(place)
    return True


def _reopen(connection: Connection, place: str, pictures: Sequence[Accepted]) -> None:
    """Work again on what has no whole answer at a place, now that its sender asks again: it may have been an outage.

    Not while somebody is being told of the answer as it is.
    """
    if callbacks.is_due(connection, place):
        return
    rows = connection.execute(
        select(Deferred.id, Deferred.number, Deferred.status, Deferred.answer)
        .where(Deferred.place == place, Deferred.status.in_((200, *_PASSING)))
        .with_for_update()
    ).all()
    for row in rows:
        if row.status == 200 and Annotation.model_validate_json(row.answer).is_whole:
            continue
        picture = pictures[row.number]
        values = {"status": picture.status, "answer": picture.answer, "data": picture.data}
        since = int(time.time() * 1000) if picture.status else 0
        fresh = {"size_bytes": len(picture.data), "attempts": 0, "leased_until": since}
        connection.execute(update(Deferred).where(Deferred.id == row.id).values(values | fresh))


def lease(connection: Connection, now_s: float, lease_s: float, most: int) -> list[Leased]:
    """Up to ``most`` pictures that nobody works on, the oldest first; they are this caller's for ``lease_s``."""
    wanted = (
        select(Deferred.id)
        .where(Deferred.status == 0, Deferred.leased_until <= int(now_s * 1000))
        .order_by(Deferred.id)
        .limit(most)
    )
    if connection.dialect.name == "postgresql":
        wanted = wanted.with_for_update(skip_locked=True)
    ids = list(connection.execute(wanted).scalars())
    if not ids:
        return []
    connection.execute(
        update(Deferred)
        .where(Deferred.id.in_(ids))
        .values(leased_until=int((now_s + lease_s) * 1000), attempts=Deferred.attempts + 1)
    )
    columns = (
        *(Deferred.id, Deferred.tasks, Deferred.explain, Deferred.answer_id, Deferred.data, Deferred.attempts),
        *(Deferred.request_id, Deferred.traceparent),
    )
    rows = connection.execute(select(*columns).where(Deferred.id.in_(ids)).order_by(Deferred.id))
    return [Leased(*row) for row in rows]


def give_back(connection: Connection, ids: Sequence[int], until_s: float, counts: bool = True) -> None:
    """Let others work on pictures from ``until_s`` on.

    Args:
        counts: the attempt was one.
    """
    values = {"leased_until": int(until_s * 1000), "attempts": Deferred.attempts - (0 if counts else 1)}
    connection.execute(update(Deferred).where(Deferred.id.in_(ids), Deferred.status == 0).values(values))


def finish(
    connection: Connection, row_id: int, status: int, answer: str, record: Annotation | None, expires_s: float | None
) -> bool:
    """Write what came of a picture, and let go of its bytes; False: somebody was faster, or it was deleted.

    Args:
        record: the annotation, if there is one and answers are kept.
        expires_s: when the kept answer goes away again, as for answers that were given at once.
    """
    ended = connection.execute(
        update(Deferred)
        .where(Deferred.id == row_id, Deferred.status == 0)
        .values(status=status, answer=answer, data=b"", size_bytes=0, leased_until=int(time.time() * 1000))
    )
    if ended.rowcount != 1:
        return False
    place, name = connection.execute(select(Deferred.place, Deferred.name).where(Deferred.id == row_id)).one()
    callbacks.release(connection, place)
    if record is not None:
        write_predictions(connection, [row_of(record, time.time(), expires_s, name)])
    return True


def outcomes(connection: Connection, place: str) -> list[Outcome]:
    """What became of a request's pictures so far, in their order; empty: there is no such request."""
    columns = (Deferred.number, Deferred.status, Deferred.answer)
    rows = connection.execute(select(*columns).where(Deferred.place == place).order_by(Deferred.number))
    return [Outcome(*row) for row in rows]


def is_any_free(connection: Connection, now_s: float) -> bool:
    """Whether a picture waits that nobody works on."""
    free = exists().where(Deferred.status == 0, Deferred.leased_until <= int(now_s * 1000))
    return bool(connection.execute(select(free)).scalar())


def count(connection: Connection) -> int:
    """Pictures without an answer."""
    return connection.execute(select(func.count()).where(Deferred.status == 0)).scalar_one()


def backlog(connection: Connection, now_s: float, max_count: int, max_bytes: int) -> Backlog:
    """What waits at ``now_s``; limits as of ``put``, and 0: no queue is wanted."""
    size = func.coalesce(func.sum(Deferred.size_bytes), 0)
    pictures, used, oldest = connection.execute(
        select(func.count(), size, func.min(Deferred.id)).where(Deferred.status == 0)
    ).one()
    if not pictures:
        return Backlog()
    shares = [taken / limit for taken, limit in ((pictures, max_count), (used, max_bytes)) if limit]
    return Backlog(pictures, max(0.0, now_s - time_of(oldest).timestamp()), max(shares, default=0.0))


def remove_old(connection: Connection, now_s: float, keep_h: float, most: int) -> int:
    """Remove the answers to a few requests all of whose pictures have been answered for so long; returns how many."""
    before_s = now_s - keep_h * 3600
    other = aliased(Deferred)
    young = exists().where(
        other.place == Deferred.place, (other.status == 0) | (other.leased_until >= int(before_s * 1000))
    )
    # none is answered before it is taken in: ids bound what is looked through
    old = select(Deferred.place).where(Deferred.id < first_id(before_s), Deferred.status > 0, ~young)
    places = old.order_by(Deferred.id).limit(most)
    return connection.execute(delete(Deferred).where(Deferred.place.in_(places))).rowcount
