"""An object that benchmarks keep in a process of its own."""

from __future__ import annotations

import os

import psutil
import pytest

from benchmarks.processes import Apart


class Counter:
    """Knows where it is."""

    def __init__(self, start: int) -> None:
        self.count = start

    def next(self, step: int) -> tuple[int, int, str]:
        if not step:
            raise ValueError("no step")
        self.count += step
        return self.count, os.getpid(), os.environ["OF_THIS_OBJECT"]


def test_an_object_apart_keeps_its_state_and_its_variables_and_its_process_ends_with_the_block() -> None:
    with Apart({"OF_THIS_OBJECT": "one"}, Counter, 5) as first, Apart({"OF_THIS_OBJECT": "two"}, Counter, 0) as second:
        count, process, variable = first.call("next", 2)
        assert (count, variable) == (7, "one") and process != os.getpid()
        with pytest.raises(ValueError, match="no step"):
            first.call("next", 0)
        assert first.call("next", 1) == (8, process, "one")
        assert second.call("next", 1)[0] == 1 and second.call("next", 1)[2] == "two"
        assert "OF_THIS_OBJECT" not in os.environ
    assert not psutil.pid_exists(process)
