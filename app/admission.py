"""Admission: how many pictures are in work at a time, who waits a moment, and who is told to come back.

How many are in work follows from how long they take: more than a machine can do only wait inside it, until their time
is over and the work spent on them is lost. The limit therefore shrinks when pictures take longer than they should and
grows while they do not and there is a queue: additive increase, multiplicative decrease (Chiu and Jain 1989).

Pictures whose senders can wait slip into places that nobody waits for. They count and teach like all others, so that
they can fill the machines when nobody else asks, and have a second limit of their own that holds them back much
earlier: while they are many, everybody else's pictures still take a fraction of the time that they may.

Overload is refused before a body is read, and not at once: a client that is refused at once and comes back at once
costs more than the answer. A bounded number waits, first come first served, for a bounded time; whoever is beyond
either bound gets 429 with ``Retry-After``. Knows no pictures and no models.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from app.problems import Problem

#: Where the limit starts, and below which it never falls: one batch for each of two stages. It grows with every picture
#: until the first one is late.
_LEAST = 16
#: What is left of the limit when a picture is late.
_DECREASE = 0.8
#: Where the limit of those that slip in starts, and below which it never falls: half of the places that always are.
_LEAST_SLIPPED = 8
#: Share of the time that a picture may take beyond which fewer slip in.
_SLIPPED_SHARE = 0.25


class AdaptiveLimit:
    """How many pictures may be in work, learned from how long they take. ``benchmarks.graph_simulation`` has it too."""

    def __init__(self, capacity: int, target_s: float, least: int) -> None:
        self.capacity, self.target_s, self.least = capacity, target_s, min(least, capacity)
        self._limit = float(self.least)
        self._late_before = False
        self._decreased_at = -math.inf

    @property
    def places(self) -> int:
        """Pictures that may be in work now."""
        return int(self._limit)

    def observe(self, seconds: float, in_work: int, now: float) -> None:
        """Learn from a picture that took ``seconds``.

        Args:
            in_work: how many were at its end, itself among them.
            now: seconds of any clock that only goes forward.
        """
        if seconds > self.target_s:
            self._late_before = True
            # those in work now came in under the old limit: only what came later tells whether it is low enough
            if now - self._decreased_at > seconds:
                self._limit, self._decreased_at = max(float(self.least), self._limit * _DECREASE), now
        elif in_work >= self.places:
            step = 1 / self._limit if self._late_before else 1.0
            self._limit = min(float(self.capacity), self._limit + step)


def limits(capacity: int, target_s: float) -> tuple[AdaptiveLimit, AdaptiveLimit]:
    """The limit of all pictures in work, and that of those among them whose senders can wait."""
    return (
        AdaptiveLimit(capacity, target_s, _LEAST),
        AdaptiveLimit(capacity, target_s * _SLIPPED_SHARE, _LEAST_SLIPPED),
    )


class Admission:
    """A counter of pictures in work with a bounded waiting room. Belongs to one event loop."""

    def __init__(self, capacity: int, max_waiting: int, max_wait_s: float, target_s: float = math.inf) -> None:
        """
        Args:
            capacity: pictures in work at a time, at most.
            max_waiting: requests that wait for a place; 0 refuses at once.
            max_wait_s: longest wait, seconds.
            target_s: how long a picture should take, seconds; when they take longer fewer are let in.
        """
        self.capacity, self.max_waiting, self.max_wait_s = capacity, max_waiting, max_wait_s
        self.in_work = self.slipped = 0
        self.all, self.slipping = limits(capacity, target_s)
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._lacking = 0
        """Places that there would have to be for a request of several pictures that was refused."""
        self._seconds_per_picture = 1.0

    @property
    def limit(self) -> int:
        """Pictures that may be in work now."""
        return self.all.places

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    async def enter(self) -> None:
        """Take one place, waiting for it if need be.

        Raises:
            Problem: overloaded, 429 with ``Retry-After``.
        """
        if self.in_work < self.limit and not self._waiting:
            self.in_work += 1
            return
        if len(self._waiting) >= self.max_waiting:
            raise self._overloaded()
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            async with asyncio.timeout(self.max_wait_s):
                await place  # `leave` has counted us in when it resolves this
        except (TimeoutError, asyncio.CancelledError) as error:
            if place.done() and not place.cancelled():
                self.leave(1)  # the place came in the very moment in which we stopped waiting
            elif place in self._waiting:
                self._waiting.remove(place)
            if isinstance(error, TimeoutError):
                raise self._overloaded() from None
            raise

    def slip_in(self, most: int) -> int:
        """Take up to ``most`` places that nobody waits for; returns how many. ``slip_out`` gives them back."""
        room = min(self.limit - self.in_work, self.slipping.places - self.slipped)
        taken = 0 if self._waiting else max(0, min(most, room))
        self.in_work += taken
        self.slipped += taken
        return taken

    def slip_out(self, pictures: int) -> None:
        """Give back places that were slipped into."""
        self.slipped -= pictures
        self.leave(pictures)

    def widen(self, more: int) -> None:
        """Take ``more`` places for a request that is inside. One that is alone is let in whatever its size: it could
        never fit. Pictures that slipped in do not stand in its way: no more of them come until it has left. It does not
        wait: it holds a place, and two of them would wait for each other's. Refused, it counts as a queue, so that the
        limit grows to it as far as pictures are in time.

        Raises:
            Problem: overloaded, 429 with ``Retry-After``.
        """
        before_us = self.in_work - self.slipped
        if before_us > 1 and before_us + more > self.limit:
            self._lacking = max(self._lacking, before_us + more)
            raise self._overloaded()
        self.in_work += more

    def leave(self, pictures: int) -> None:
        """Give places back, to those who wait first."""
        self.in_work -= pictures
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self.in_work < self.limit:
            place = self._waiting.popleft()
            if not place.done():  # else its owner has been cancelled and is about to take it out
                self.in_work += 1
                place.set_result(None)

    def observe(self, seconds: float) -> None:
        """Learn from a finished picture, which took ``seconds``, how many may be in work and how fast places come
        free.
        """
        self._seconds_per_picture += (seconds / max(1, self.in_work) - self._seconds_per_picture) / 20
        now = time.monotonic()
        if seconds > self.all.target_s or self._lacking <= self.limit:
            self._lacking = 0
        self.all.observe(seconds, max(self.in_work, self._lacking), now)
        self.slipping.observe(seconds, self.slipped, now)
        self._let_in()

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Learn from the picture that is worked on meanwhile: how long it took to be answered, or that it ran out of
        time. What fails otherwise says nothing of how many there may be.
        """
        started = time.monotonic()
        try:
            yield
        except Problem as problem:
            if problem.code == "timeout":
                self.observe(time.monotonic() - started)
            raise
        self.observe(time.monotonic() - started)

    def _overloaded(self) -> Problem:
        ahead = self.in_work + len(self._waiting)
        wait_s = min(60, max(1, math.ceil(ahead * self._seconds_per_picture)))
        return Problem(
            "overloaded",
            f"{ahead} pictures are in work or wait; try again in {wait_s} s",
            headers={"Retry-After": str(wait_s)},
        )
