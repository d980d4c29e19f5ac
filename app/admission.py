"""Admission: how many pictures are in work at a time, who waits a moment, and who is told to come back.

Overload is refused before a body is read, and not at once: a client that is refused at once and comes back at once
costs more than the answer. A bounded number waits, first come first served, for a bounded time; whoever is beyond
either bound gets 429 with ``Retry-After``. Knows no pictures and no models.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque

from app.problems import Problem


class Admission:
    """A counter of pictures in work with a bounded waiting room. Belongs to one event loop."""

    def __init__(self, capacity: int, max_waiting: int, max_wait_s: float) -> None:
        """
        Args:
            capacity: pictures in work at a time.
            max_waiting: requests that wait for a place; 0 refuses at once.
            max_wait_s: longest wait, seconds.
        """
        self.capacity, self.max_waiting, self.max_wait_s = capacity, max_waiting, max_wait_s
        self.in_work = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._seconds_per_picture = 1.0

    async def enter(self) -> None:
        """Take one place, waiting for it if need be.

        Raises:
            Problem: overloaded, 429 with ``Retry-After``.
        """
        if self.in_work < self.capacity and not self._waiting:
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

    def widen(self, more: int) -> None:
        """Take ``more`` places for a request that is inside. One that is alone is let in whatever its size: it could
        never fit.

        Raises:
            Problem: overloaded, 429 with ``Retry-After``.
        """
        if self.in_work > 1 and self.in_work + more > self.capacity:
            raise self._overloaded()
        self.in_work += more

    def leave(self, pictures: int) -> None:
        """Give places back, to those who wait first."""
        self.in_work -= pictures
        while self._waiting and self.in_work < self.capacity:
            place = self._waiting.popleft()
            if not place.done():  # else its owner has been cancelled and is about to take it out
                self.in_work += 1
                place.set_result(None)

    def observe(self, seconds: float) -> None:
        """Learn from a finished picture how fast places come free: an average over about twenty."""
        self._seconds_per_picture += (seconds / max(1, self.in_work) - self._seconds_per_picture) / 20

    def _overloaded(self) -> Problem:
        ahead = self.in_work + len(self._waiting)
        wait_s = min(60, max(1, math.ceil(ahead * self._seconds_per_picture)))
        return Problem(
            "overloaded",
            f"{ahead} pictures are in work or wait; try again in {wait_s} s",
            headers={"Retry-After": str(wait_s)},
        )
