"""The application in a process of its own, as people start it, and the end of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app import cluster

ROOT = Path(__file__).parent.parent
#: It finishes what was accepted, which may take a minute and a little.
_STOP_S = 75.0


@contextmanager
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
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        cluster.stop(port)  # Ray goes on when who started it has died


def starting(process: subprocess.Popen[bytes], log: Path) -> Iterator[None]:
    """Again and again until it is ready."""
    while "ready after" not in log.read_text():
        assert process.poll() is None, f"the application ended with {process.returncode}:\n{log.read_text()[-4000:]}"
        yield
        time.sleep(0.2)
