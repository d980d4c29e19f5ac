"""Room for what is received: bounded by number and by bytes, in order, nothing leaked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from app.problems import Problem
from app.receiving import Receiving


class Sender:
    """Who holds room until told to go."""

    def __init__(self, receiving: Receiving, size: int) -> None:
        self._receiving, self._size = receiving, size
        self.go = asyncio.Event()
        self.is_in = False
        self.task = asyncio.ensure_future(self._send())

    async def _send(self) -> None:
        async with self._receiving.room(self._size):
            self.is_in = True
            await self.go.wait()
        self.is_in = False

    async def leave(self) -> None:
        self.go.set()
        await self.task
        await settled()


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(10):
            await work()

    asyncio.run(whole())


async def senders(receiving: Receiving, *sizes: int) -> list[Sender]:
    found = [Sender(receiving, size) for size in sizes]
    await settled()
    return found


def test_as_many_are_received_as_may_be_in_number_and_in_bytes() -> None:
    async def work() -> None:
        receiving = Receiving(3, 100, max_waiting=8, max_wait_s=5)
        one, two, three, four = await senders(receiving, 10, 10, 10, 10)
        assert [each.is_in for each in (one, two, three, four)] == [True, True, True, False], "three at a time"
        await two.leave()
        assert four.is_in
        for each in (one, three, four):
            await each.leave()
        large, small = await senders(receiving, 95, 10)
        assert large.is_in and not small.is_in, "a hundred bytes at a time"
        await large.leave()
        assert small.is_in
        await small.leave()
        assert (receiving.requests, receiving.bytes, receiving.waiting) == (0, 0, 0)

    run(work)


def test_who_came_first_is_first_also_where_a_later_one_would_fit() -> None:
    async def work() -> None:
        receiving = Receiving(8, 100, max_waiting=8, max_wait_s=5)
        first, large, small = await senders(receiving, 60, 60, 10)
        assert [each.is_in for each in (first, large, small)] == [True, False, False]
        await first.leave()
        assert large.is_in and small.is_in
        await large.leave()
        await small.leave()

    run(work)


def test_a_body_larger_than_all_there_is_has_it_to_itself() -> None:
    async def work() -> None:
        receiving = Receiving(8, 100, max_waiting=8, max_wait_s=5)
        whole, other = await senders(receiving, 10**9, 1)
        assert whole.is_in and not other.is_in
        await whole.leave()
        assert other.is_in
        await other.leave()

    run(work)


@pytest.mark.parametrize(("max_waiting", "max_wait_s"), [(0, 5.0), (1, 0.02)])
def test_beyond_either_bound_it_is_429_with_retry_after(max_waiting: int, max_wait_s: float) -> None:
    async def work() -> None:
        receiving = Receiving(1, 100, max_waiting, max_wait_s)
        (held,) = await senders(receiving, 1)
        with pytest.raises(Problem) as refused:
            async with receiving.room(1):
                pass
        assert refused.value.status == 429 and refused.value.headers == {"Retry-After": "2"}
        await held.leave()
        async with receiving.room(1):
            assert receiving.requests == 1
        assert (receiving.requests, receiving.bytes, receiving.waiting) == (0, 0, 0)

    run(work)


def test_whoever_goes_away_while_waiting_or_received_leaves_nothing_behind() -> None:
    async def work() -> None:
        receiving = Receiving(1, 100, max_waiting=8, max_wait_s=5)
        held, gone, next_one = await senders(receiving, 1, 1, 1)
        for each in (gone, held):
            each.task.cancel()
            await settled()
        assert next_one.is_in
        await next_one.leave()
        assert (receiving.requests, receiving.bytes, receiving.waiting) == (0, 0, 0)

    run(work)
