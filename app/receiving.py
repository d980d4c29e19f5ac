"""Room for requests of senders who can wait, while they are received and until their pictures are on disk.

Bounded by number and by bytes: a photo that comes fast takes little of either, and one that comes slowly, of unknown
size, no more than its share of memory. First come, first served; a bounded number waits for a bounded time, and whoever
is beyond either bound gets 429 with ``Retry-After``. Knows no pictures and no queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.problems import Problem


class Receiving:
    """What is being received. Belongs to one event loop."""

    def __init__(self, most: int, most_bytes: int, max_waiting: int, max_wait_s: float) -> None:
        """
        Args:
            most: requests at a time.
            most_bytes: of their bodies together.
            max_waiting: requests that wait for room; 0 refuses at once.
            max_wait_s: longest wait, seconds.
        """
        self.most, self.most_bytes = most, most_bytes
        self.max_waiting, self.max_wait_s = max_waiting, max_wait_s
        self.requests = self.bytes = self.waiting = 0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def room(self, size: int) -> AsyncIterator[None]:
        """Room for a body of at most so many bytes; one that is larger than all there is takes that.

        Raises:
            Problem: overloaded, 429 with ``Retry-After``.
        """
        size = min(size, self.most_bytes)
        await self._enter(size)
        try:
            yield
        finally:
            self.requests -= 1
            self.bytes -= size
            self._freed.set()

    async def _enter(self, size: int) -> None:
        overloaded = Problem(
            "overloaded", "Too many requests are being received; try again in 2 s.", {"Retry-After": "2"}
        )
        if self.waiting >= self.max_waiting and (self._turn.locked() or not self._has_room(size)):
            raise overloaded
        self.waiting += 1
        try:
            async with asyncio.timeout(self.max_wait_s), self._turn:
                while not self._has_room(size):
                    self._freed.clear()
                    await self._freed.wait()
                # nothing is awaited from here on: what is taken here is given back by `room`
                self.requests += 1
                self.bytes += size
        except TimeoutError:
            raise overloaded from None
        finally:
            self.waiting -= 1

    def _has_room(self, size: int) -> bool:
        return self.requests < self.most and self.bytes + size <= self.most_bytes
