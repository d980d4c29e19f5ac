"""Clients without think time, and what is said of the times that they saw. Knows no route and no answer: what is sent,
and what of an answer counts, is the caller's.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

import httpx

#: Sends the request of that number and takes its answer in.
Send = Callable[[httpx.AsyncClient, int], Coroutine[Any, Any, None]]


def session(connections: int | None, timeout_s: float = 120.0) -> httpx.AsyncClient:
    """An HTTP client that keeps as many connections open as it has clients; None: without bound."""
    kept = connections if connections is not None else 64
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=kept)
    return httpx.AsyncClient(timeout=timeout_s, limits=limits)


async def closed_loop(http: httpx.AsyncClient, clients: int, send: Send, go_on: Callable[[int], bool]) -> None:
    """Each client sends the next request as soon as it has its answer, while ``go_on`` of the request's number."""
    numbers = iter(range(10**12))

    async def client() -> None:
        while go_on(number := next(numbers)):
            await send(http, number)

    await asyncio.gather(*(client() for _ in range(clients)))


async def open_loop(http: httpx.AsyncClient, moments: Iterable[float], send: Send) -> None:
    """A request at each moment, in seconds from now and in their order, whether those before were answered or not."""
    began = time.perf_counter()
    async with asyncio.TaskGroup() as sending:
        for number, moment in enumerate(moments):
            await asyncio.sleep(max(0.0, moment - (time.perf_counter() - began)))
            sending.create_task(send(http, number))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of one side's rate over the other's in the same round: what the machine does hits both alike.

    Raises:
        ValueError: one side has more rounds, or there are none.
    """
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least that share of them does not exceed; nan without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))] if ordered else math.nan
