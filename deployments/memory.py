"""What a process does with memory that its model has let go of: it keeps it for the next batch.

A network's activations are tens of megabytes, taken and let go of layer by layer. jemalloc, which replicas run with
(`app/cluster.py`), hands blocks of that size back to the system between two uses, and the system zeroes each of their
pages again: a fifth to a third of a batch's time on a CPU (`benchmarks/TRIED.md`). What is kept is what the largest
batch takes. On GPUs activations are not in this memory. What is timed without Ray is timed in a process that has it so.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

#: What Ray and ``keep_freed`` do in a replica, as a process's environment.
ALLOCATOR = {
    "LD_PRELOAD": str(Path(sysconfig.get_path("purelib")) / "ray" / "core" / "libjemalloc.so"),
    "MALLOC_CONF": "background_thread:true,narenas:2,dirty_decay_ms:-1,muzzy_decay_ms:0",
}
#: ``MALLCTL_ARENAS_ALL`` of jemalloc.h.
_EVERY_ARENA = 4096


def keep_freed() -> None:
    """Have this process keep from now on what it frees; nothing changes where its allocator is not jemalloc."""
    if (jemalloc := _jemalloc()) is None:
        return
    count, size = ctypes.c_uint(), ctypes.c_size_t(ctypes.sizeof(ctypes.c_uint))
    jemalloc.mallctl(b"arenas.narenas", ctypes.byref(count), ctypes.byref(size), None, ctypes.c_size_t(0))
    never = ctypes.c_ssize_t(-1)
    # those that there are, and what those begin with that are still to come
    for name in ("arenas", *(f"arena.{index}" for index in range(count.value))):
        new, length = ctypes.byref(never), ctypes.c_size_t(ctypes.sizeof(never))
        jemalloc.mallctl(f"{name}.dirty_decay_ms".encode(), None, None, new, length)


def give_back() -> None:
    """Hand back what is free at this moment: weights that another revision's have replaced."""
    if (jemalloc := _jemalloc()) is not None:
        jemalloc.mallctl(f"arena.{_EVERY_ARENA}.purge".encode(), None, None, None, ctypes.c_size_t(0))


def process_with(environment: Mapping[str, str]) -> ProcessPoolExecutor:
    """A process of its own that is started with these variables, such as ``ALLOCATOR``: to be shut down by its user."""
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, environment):
        process.submit(os.getpid).result()  # the first task starts it
    return process


def _jemalloc() -> ctypes.CDLL | None:
    process = ctypes.CDLL(None)
    return process if hasattr(process, "mallctl") else None
