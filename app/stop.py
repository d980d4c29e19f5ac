"""``python -m app.stop``: end the application that listens on ``PORT`` (8000), with every process that came of it."""

from __future__ import annotations

import os
import sys

from app import cluster


def main() -> None:
    """Stop it and say what was done; exit status 1 if something is still there."""
    port = int(os.environ.get("PORT", "8000"))
    ended = cluster.stop(port)
    left = cluster.processes(port)
    if left:
        sys.exit(f"error: {len(left)} processes did not end: {', '.join(str(process.pid) for process in left)}")
    print(f"stopped {ended} processes" if ended else f"nothing with port {port} was running")


if __name__ == "__main__":
    main()
