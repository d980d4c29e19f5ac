"""Which instruction sets this processor has: what is fast, and which exported engine is right, follows from it.

Knows no model.
"""

from __future__ import annotations

from pathlib import Path


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
