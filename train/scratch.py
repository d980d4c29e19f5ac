"""A training process's own folder, and the removal of what a killed one left."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def scratch_of(run: str, rank: int) -> Iterator[Path]:
    """A folder of this process for the length of the block; around it lies one for checkpoints, which may be on their
    way longer. What a killed worker of this run and rank left on this machine is removed: a lock tells it from what is
    in use, which the kernel gives back when the process ends."""
    prefix = f"training-{re.sub(r'[^A-Za-z0-9_.-]', '_', run)}-rank{rank}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):
            descriptor = _locked(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)
    fresh = Path(tempfile.mkdtemp(prefix="new-"))
    with suppress(OSError):  # where a file system has no locks nothing is removed either
        _locked(fresh)
    around = fresh.rename(fresh.with_name(f"{prefix}{fresh.name.removeprefix('new-')}"))  # locked before it is found
    try:
        with tempfile.TemporaryDirectory(dir=around) as scratch:
            yield Path(scratch)
    finally:
        with suppress(OSError):  # a checkpoint is on its way
            around.rmdir()


def _locked(folder: Path) -> int:
    """A descriptor that keeps a folder locked while it is open.

    Raises:
        OSError: another process has it, or its file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
