"""Requests at given moments."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from benchmarks.load import open_loop, session


def test_each_request_goes_at_its_moment_and_waits_for_no_other() -> None:
    sent: list[tuple[int, float]] = []
    answered: list[int] = []

    async def run() -> None:
        began, last = time.perf_counter(), asyncio.Event()

        async def send(http: httpx.AsyncClient, number: int) -> None:
            sent.append((number, time.perf_counter() - began))
            if number == 2:
                last.set()
            await last.wait()  # none is answered before the last has been sent
            answered.append(number)

        async with asyncio.timeout(10), session(None) as http:
            await open_loop(http, iter([0.0, 0.05, 0.2]), send)

    asyncio.run(run())
    assert [number for number, _ in sent] == [0, 1, 2] and sorted(answered) == [0, 1, 2]
    assert sent[1][1] >= 0.05 and sent[2][1] >= 0.2


def test_what_a_request_raises_ends_the_load() -> None:
    async def send(http: httpx.AsyncClient, number: int) -> None:
        raise ValueError(number)

    async def run() -> None:
        async with asyncio.timeout(10), session(None) as http:
            await open_loop(http, [0.0, 5.0], send)

    with pytest.raises(ExceptionGroup) as failed:
        asyncio.run(run())
    assert failed.group_contains(ValueError, match="0")
