"""Processes that are measured from outside, and beside which others are: their memory, at one moment and over time;
stopping and waking them; and processes that run models with the allocator of the project's replicas, without Ray. Knows
no benchmark.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Self

import psutil

from deployments.memory import ALLOCATOR as ALLOCATOR
from deployments.memory import process_with as process_with

#: What a service takes to see to what it missed while it was paused, such as health checks that were due.
SETTLE_S = 2.0


class Apart:
    """An object in a process of its own, for what does not go from one process to another, such as a model.

    The process ends with the block; the object is let go of before, since vLLM's engine is one more process, for which
    the one that has it would wait.
    """

    def __init__(self, environment: Mapping[str, str], make: Callable[..., Any], *arguments: Any) -> None:
        self._process = process_with(environment)
        self._process.submit(_make, make, arguments).result()

    def call(self, method: str, *arguments: Any) -> Any:
        """What the object's method returns; what it raises is raised here."""
        return self._process.submit(_call, method, arguments).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.submit(_let_go).result()
        self._process.shutdown()


_apart: Any = None
"""The object, in its process."""


def _make(make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _apart
    _apart = make(*arguments)


def _call(method: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(_apart, method)(*arguments)


def _let_go() -> None:
    global _apart
    _apart = None
    gc.collect()


def pause(processes: Iterable[psutil.Process]) -> None:
    """Stop them where they are: whatever they do at rest takes nothing from what is measured meanwhile."""
    for process in processes:
        with suppress(psutil.Error):
            process.suspend()


def resume(processes: Iterable[psutil.Process]) -> None:
    """Have them go on; ``SETTLE_S`` later they are what they were."""
    for process in processes:
        with suppress(psutil.Error):
            process.resume()


@contextmanager
def paused(read: Callable[[], Iterable[psutil.Process]]) -> Iterator[None]:
    """The processes that ``read`` names stand still meanwhile, and are what they were afterwards."""
    pause(read())
    try:
        yield
    finally:
        resume(read())
        time.sleep(SETTLE_S)


def pss(processes: Iterable[psutil.Process]) -> int:
    """Proportional set size of all of them together, in bytes; of those that have ended, nothing."""
    total = 0
    for process in processes:
        with suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


@contextmanager
def sampled(read: Callable[[], int], every_s: float) -> Iterator[list[int]]:
    """What ``read`` says again and again until the block ends, the first and the last at its ends."""
    samples, over = [read()], threading.Event()

    def watch() -> None:
        while not over.wait(every_s):
            samples.append(read())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        over.set()
        watcher.join()
        samples.append(read())
