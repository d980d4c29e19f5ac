"""Memory of processes that are measured from outside, at one moment and over time; and the allocator that the project's
models run with, for processes without Ray. Knows no benchmark.
"""

from __future__ import annotations

import multiprocessing
import os
import sysconfig
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import psutil

#: What Ray and ``deployments.memory`` do in a replica, as a process's environment.
ALLOCATOR = {
    "LD_PRELOAD": str(Path(sysconfig.get_path("purelib")) / "ray" / "core" / "libjemalloc.so"),
    "MALLOC_CONF": "background_thread:true,narenas:2,dirty_decay_ms:-1,muzzy_decay_ms:0",
}


def process_with(environment: Mapping[str, str]) -> ProcessPoolExecutor:
    """A process of its own that is started with these variables, such as ``ALLOCATOR``: to be shut down by its user."""
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, environment):
        process.submit(os.getpid).result()  # the first task starts it
    return process


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
