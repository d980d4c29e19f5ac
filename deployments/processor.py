"""The processor: which instruction sets it has, from which follows what is fast and which exported engine is right, and
who goes first where there is not enough of it for all.

Knows no model.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

#: Niceness of what computes for long: beside it, whoever answers has nine times as much of a core (1024 to 110).
COMPUTING = 10


def step_back(threads: Iterable[int] | None = None) -> None:
    """Let what computes go after what answers. Who takes a picture in needs a hundredth of what the models do with it:
    among equals he would wait for the same cores, and his sender for seconds (``benchmarks.gateway``).

    On Linux a thread has a niceness of its own and hands it on to the threads and processes that it starts.

    Args:
        threads: native ids; None: the one that calls. Who has stepped back as far already stays where he is.
    """
    for thread in (threading.get_native_id(),) if threads is None else threads:
        try:
            if os.getpriority(os.PRIO_PROCESS, thread) < COMPUTING:
                os.setpriority(os.PRIO_PROCESS, thread, COMPUTING)
        except ProcessLookupError:  # a thread that has ended since
            continue


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """The instruction set flags of the first processor in /proc/cpuinfo's text (x86 ``flags``, ARM ``Features``)."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def processor_flags() -> frozenset[str]:
    """Instruction sets of this machine's processor; none where the kernel does not tell."""
    file = Path("/proc/cpuinfo")
    return cpu_flags(file.read_text()) if file.is_file() else frozenset()
