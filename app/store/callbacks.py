"""Who is to be told that an answer is there: one address for each request that named one, until it has been told.

A request's row waits until the last of its pictures is answered (``release``), is due from then on, and ends as
delivered, given up or gone. Whoever tells somebody leases the row first; a lease that has run out (its process was
killed) lets another one tell again: at least once, and not more often than processes die. Rows of a host that is not
reached are held: they are put off together, so that whoever is due behind them is found.

Functions on a connection, the same for both databases. Knows no HTTP.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal
from urllib.parse import urlsplit

from sqlalchemy import Connection, delete, exists, func, insert, select, update

from app.store.models import Callback, Deferred, first_id, new_id

Ending = Literal["delivered", "given_up", "gone"]
WAITING, DUE = "waiting", "due"
#: Of hosts that are held, so many are put off at a look.
_MOST_HELD = 500


@dataclass(frozen=True)
class Due:
    """Somebody to be told."""

    place: str
    url: str
    attempts: int
    """This one included."""
    since_s: float
    """When the answer was there."""
    request_id: str
    traceparent: str

    @property
    def host(self) -> str:
        """Whose address it is."""
        return _host_of(self.url)


@dataclass(frozen=True)
class Hold:
    """What is left to a host that is not reached."""

    until_s: float
    """Whoever is due there is put off until then."""
    takes_one: bool = False
    """But for one, who is told: whether it is reached again."""
    gives_up_before_s: float = 0.0
    """And but for those whose answers were there before that: nobody tells them any more."""


@dataclass(frozen=True)
class Turn:
    """What a look at who is due came to."""

    taken: list[Due]
    given_up: list[Due]
    """Of hosts that are held; not told this time."""
    put_off: int


def _host_of(url: str) -> str:
    with contextlib.suppress(ValueError):
        return urlsplit(url).hostname or ""
    return ""


def add(connection: Connection, place: str, url: str, now_s: float) -> None:
    """Remember whom to tell of a request that is being taken in."""
    row = {"place": place, "id": new_id(now_s), "url": url, "state": WAITING, "since": 0, "due_at": 0, "attempts": 0}
    connection.execute(insert(Callback), row)


def remove_left(connection: Connection, place: str) -> None:
    """Forget whom to tell of a request all of whose pictures were deleted: its place is free for another."""
    answers = exists().where(Deferred.place == Callback.place)
    connection.execute(delete(Callback).where(Callback.place == place, ~answers))


def url_of(connection: Connection, place: str) -> str | None:
    """Whom a request named; None: nobody."""
    return connection.execute(select(Callback.url).where(Callback.place == place)).scalar()


def release(connection: Connection, place: str) -> None:
    """Whoever waits for a request's answer is to be told now, if every picture of it is answered."""
    # the row is locked before the others are looked at: of two who answer the last two pictures at a time the second
    # then sees what the first one wrote
    waiting = select(Callback.place).where(Callback.place == place, Callback.state == WAITING).with_for_update()
    if connection.execute(waiting).scalar() is None:
        return
    left = exists().where(Deferred.place == place, Deferred.status == 0)
    now = int(time.time() * 1000)
    connection.execute(update(Callback).where(Callback.place == place, ~left).values(state=DUE, since=now, due_at=now))


def is_any_due(connection: Connection, now_s: float) -> bool:
    """Whether somebody is to be told now."""
    due = exists().where(Callback.state == DUE, Callback.due_at <= int(now_s * 1000))
    return bool(connection.execute(select(due)).scalar())


def is_due(connection: Connection, place: str) -> bool:
    """Whether somebody is to be told of the answer at a place, or is being told."""
    due = exists().where(Callback.place == place, Callback.state == DUE)
    return bool(connection.execute(select(due)).scalar())


def lease(
    connection: Connection,
    now_s: float,
    lease_s: float,
    most: int,
    held: Mapping[str, Hold] = MappingProxyType({}),
) -> Turn:
    """Up to ``most`` who are to be told, the longest due first; they are this caller's for ``lease_s``.

    Args:
        held: hosts that are not reached.
    """
    wanted = (
        select(Callback.place, Callback.url, Callback.since)
        .where(Callback.state == DUE, Callback.due_at <= int(now_s * 1000))
        .order_by(Callback.due_at)
        .limit(most + (_MOST_HELD if held else 0))
    )
    if connection.dialect.name == "postgresql":
        wanted = wanted.with_for_update(skip_locked=True)
    taken: list[str] = []
    given_up: list[str] = []
    put_off: dict[str, list[str]] = {}
    tried: set[str] = set()
    for place, url, since in connection.execute(wanted):
        host = _host_of(url)
        hold = held.get(host)
        if hold is None or (hold.takes_one and host not in tried):
            if len(taken) < most:
                taken.append(place)
                tried.add(host)
        elif since < hold.gives_up_before_s * 1000:
            given_up.append(place)
        else:
            put_off.setdefault(host, []).append(place)
    if taken:
        values = {"due_at": int((now_s + lease_s) * 1000), "attempts": Callback.attempts + 1}
        connection.execute(update(Callback).where(Callback.place.in_(taken)).values(values))
    if given_up:
        connection.execute(update(Callback).where(Callback.place.in_(given_up)).values(state="given_up"))
    for host, places in put_off.items():
        until = int(held[host].until_s * 1000)
        connection.execute(update(Callback).where(Callback.place.in_(places)).values(due_at=until))
    return Turn(_named(connection, taken), _named(connection, given_up), sum(map(len, put_off.values())))


def _named(connection: Connection, places: list[str]) -> list[Due]:
    """Who is to be told of the answers at places, as they are known by now."""
    if not places:
        return []
    # of a request whose pictures were all deleted there is nothing left to name
    columns = (Callback.place, Callback.url, Callback.attempts, Callback.since)
    named = (func.coalesce(Deferred.request_id, ""), func.coalesce(Deferred.traceparent, ""))
    first = (
        select(func.min(Deferred.number)).where(Deferred.place == Callback.place).correlate(Callback).scalar_subquery()
    )
    rows = connection.execute(
        select(*columns, *named)
        .outerjoin(Deferred, (Deferred.place == Callback.place) & (Deferred.number == first))
        .where(Callback.place.in_(places))
        .order_by(Callback.since)
    )
    return [Due(row[0], row[1], row[2], row[3] / 1000, row[4], row[5]) for row in rows]


def end(connection: Connection, place: str, ending: Ending) -> bool:
    """Nobody has to be told any more; False: that was so before."""
    ended = connection.execute(
        update(Callback).where(Callback.place == place, Callback.state == DUE).values(state=ending)
    )
    return ended.rowcount == 1


def put_off(connection: Connection, due: Due, until_s: float, counts: bool = True) -> None:
    """Tell again at ``until_s``, unless somebody else has taken it over since.

    Args:
        counts: the attempt was one.
    """
    connection.execute(
        update(Callback)
        .where(Callback.place == due.place, Callback.state == DUE, Callback.attempts == due.attempts)
        .values(due_at=int(until_s * 1000), attempts=due.attempts - (0 if counts else 1))
    )


def count(connection: Connection) -> int:
    """Who is to be told and has not been, answers that are not there yet aside."""
    return connection.execute(select(func.count()).where(Callback.state == DUE)).scalar_one()


def remove_old(connection: Connection, now_s: float, keep_h: float, most: int) -> int:
    """Remove a few of requests whose answers have been removed; returns how many."""
    answers = exists().where(Deferred.place == Callback.place)
    old = select(Callback.place).where(Callback.id < first_id(now_s - keep_h * 3600), ~answers).limit(most)
    return connection.execute(delete(Callback).where(Callback.place.in_(old))).rowcount
