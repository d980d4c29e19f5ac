"""The application in a process of its own, as people start it, and the end of it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from app import cluster

ROOT = Path(__file__).parent.parent
#: Seconds that it has once told to stop, and once told again: that means at once, no test waits for what was accepted.
_STOP_S = (1.0, 75.0)


@contextlib.contextmanager
def served(port: int, log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m app.serve`, not ready yet, of which nothing is left afterwards.

    Args:
        log: gets what it says.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.serve", *arguments],
            env=os.environ | {"PORT": str(port)},
            cwd=ROOT,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        for patience_s in _STOP_S:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience_s)
        process.kill()
        process.wait()
        cluster.stop(port)  # Ray goes on when who started it has died


def starting(process: subprocess.Popen[bytes], log: Path) -> Iterator[None]:
    """Again and again until it is ready."""
    while "ready after" not in log.read_text():
        assert process.poll() is None, f"the application ended with {process.returncode}:\n{log.read_text()[-4000:]}"
        yield
        time.sleep(0.2)
