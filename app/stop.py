"""``python -m app.stop``: end the application that listens on ``PORT`` (8000), with every process that came of it.

Requests that were accepted are answered first, within their time. Asked again meanwhile, it ends everything at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

import psutil

from app import cluster

#: A request's longest time that may be configured, and some more.
_PATIENCE_S = 660.0


def main() -> None:
    """Stop it and say what was done; exit status 1 if something is still there."""
    port = int(os.environ.get("PORT", "8000"))
    known = len(cluster.processes(port))
    owner, patience_s = cluster.owner(port), 10.0
    if owner is not None and not cluster.ask_to_stop(port):
        patience_s = 0.0  # asked before
    elif owner is not None:
        print("accepted requests are finished first; `make stop` again ends everything at once", file=sys.stderr)
        _end_politely(owner)
    ended = max(known, cluster.stop(port, patience_s))
    left = cluster.processes(port)
    if left:
        sys.exit(f"error: {len(left)} processes did not end: {', '.join(str(process.pid) for process in left)}")
    print(f"stopped {ended} processes" if ended else f"nothing with port {port} was running")


def _end_politely(owner: psutil.Process) -> None:
    """Tell the process in the foreground, which ends all others and then itself, and wait until it has."""
    with contextlib.suppress(psutil.Error):
        owner.terminate()
    limit = time.monotonic() + _PATIENCE_S
    while cluster.runs(owner) and time.monotonic() < limit:  # its parent may be slow to take note of its end
        time.sleep(0.1)


if __name__ == "__main__":
    main()
