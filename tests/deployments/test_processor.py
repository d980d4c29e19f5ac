"""Who goes first where there is not enough of the processor for all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from deployments.processor import step_back
from deployments.replica import Replica

_READ = "import os; print(os.getpriority(os.PRIO_PROCESS, 0))"


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def of_child() -> int:
    return int(subprocess.run([sys.executable, "-c", _READ], capture_output=True, text=True, check=True).stdout)


def in_thread(*work: Callable[[], int | None]) -> list[int | None]:
    """What each returns, one after the other, in a thread that ends with them."""
    with ThreadPoolExecutor(1) as thread:
        return [thread.submit(one).result() for one in work]


def test_a_thread_steps_back_with_all_that_it_starts_and_nobody_else() -> None:
    before = niceness()
    found = in_thread(step_back, niceness, of_child, lambda: in_thread(niceness)[0], step_back, niceness)
    back = max(before, 10)
    assert found == [None, back, back, back, None, back]
    assert niceness() == of_child() == in_thread(niceness)[0] == before


def test_who_has_stepped_back_further_stays_there() -> None:
    def further() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 12)

    assert in_thread(further, step_back, niceness) == [None, None, 12]


def test_a_thread_that_has_ended_is_nobody() -> None:
    gone = in_thread(threading.get_native_id)[0]
    assert gone is not None
    step_back([gone])


def test_of_a_replica_what_computes_steps_back_and_what_answers_does_not() -> None:
    before, replica = niceness(), Replica()  # type: ignore[var-annotated]
    pools = (replica._worker, replica._loader, replica._parts)
    assert {pool.submit(niceness).result() for pool in pools} == {max(before, 10)}
    assert niceness() == before
