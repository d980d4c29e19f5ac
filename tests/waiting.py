"""Waiting for what happens on another thread or in another process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(
    condition: Callable[[], T], timeout_s: float = 60, every_s: float = 0.02, what: Callable[[], object] | str = ""
) -> T:
    """The first true value of a condition.

    Args:
        what: said when it does not happen.
    """
    limit = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < limit, f"not after {timeout_s:g} s: {what() if callable(what) else what}"
        time.sleep(every_s)
    return value
