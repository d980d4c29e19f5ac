"""What chaos makes of what it saw: when the full rate was back, what an answer was, what was kept twice."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest

from benchmarks.chaos import ChaosConfig, Clients, Kept, full_rate_after, judge, kept, rate, seen, wait_for_calm


def every(begin: float, end: float, a_second: float) -> list[float]:
    return [begin + number / a_second for number in range(int((end - begin) * a_second))]


def test_the_full_rate_is_back_from_the_answer_on_after_which_it_lasts() -> None:
    # ten a second, nothing for 20 s after the kill at 100, three a second for 10 s, then ten again
    times = every(80, 100, 10) + every(120, 130, 3) + every(130, 160, 10)
    assert rate(times, 90, 100) == pytest.approx(10)
    took = full_rate_after(times, 100, full=9, window_s=5, until=160, replaced_at=118)
    assert took is not None and 28 <= took <= 30, "two seconds at the lower rate in fifteen are lost in the windows"
    assert full_rate_after(times, 100, full=9, window_s=5, until=142, replaced_at=118) is None, "not yet"
    assert full_rate_after(times, 100, full=11, window_s=5, until=160, replaced_at=118) is None


def test_a_burst_of_what_was_held_up_is_no_rate() -> None:
    burst = every(80, 101.9, 3.3) + every(117.6, 117.8, 80)
    assert full_rate_after(burst, 100, full=2.9, window_s=5, until=160, replaced_at=106) is None
    took = full_rate_after([*burst, *every(118, 160, 3.3)], 100, full=2.9, window_s=5, until=160, replaced_at=106)
    assert took == pytest.approx(17.6), "the end of the silence, not a window that begins before it"


def test_a_kill_that_nobody_notices_takes_no_time_once_the_process_is_replaced() -> None:
    times = every(80, 160, 10)
    assert full_rate_after(times, 100, full=9, window_s=5, until=115.1, replaced_at=103) == 0
    assert full_rate_after(times, 100, full=9, window_s=5, until=114, replaced_at=101) is None, "no whole windows yet"
    late = full_rate_after(times, 100, full=9, window_s=5, until=140, replaced_at=120)
    assert late == pytest.approx(15), "as long as it is not replaced it may still be missed"
    assert full_rate_after(times, 100, full=9, window_s=5, until=160, replaced_at=float("inf")) is None


def test_nothing_is_killed_before_the_service_is_well_again() -> None:
    began = time.monotonic()
    slow = every(began - 60, began + 60, 2.1)
    with pytest.raises(RuntimeError, match="should"):
        wait_for_calm(lambda: slow, full=2.9, calm_s=5, give_up_s=0.1)
    well = every(began - 60, began + 60, 10)
    assert wait_for_calm(lambda: well, full=9, calm_s=5, give_up_s=1.0) >= 9


def test_what_clients_see_is_told_apart() -> None:
    assert [seen(None), seen(200), seen(200, [{"stage": "tagger"}])] == ["reset", "complete", "partial"]
    assert [seen(429), seen(503), seen(500), seen(409), seen(202)] == ["refused", "failed", "failed", "wrong", "wrong"]


def test_what_is_in_the_store_twice_is_counted_by_picture_answer_and_name() -> None:
    rows = [("a", "1", "x"), ("b", "2", "y"), ("c", "3", None), ("d", "4", None)]
    assert kept(rows, {"a", "b", "e"}) == Kept(rows=4, twice=0, missing=1)
    assert kept([*rows, ("a", "5", None)], {"a"}).twice == 1
    assert kept([*rows, ("f", "2", "z")], set()).twice == 1
    assert kept([*rows, ("g", "6", "x")], set()).twice == 1
    assert kept([], set()) == Kept(0, 0, 0)


def test_each_bar_is_judged_and_a_missed_one_is_named() -> None:
    def row(of_cold_start: float | None, others: float | None) -> dict[str, Any]:
        return {
            "full_rate_after_s": of_cold_start and 100 * of_cold_start,
            "of_cold_start": of_cold_start,
            "others_answered": others,
        }

    def missed(*rows: dict[str, Any], unanswered: int = 0, twice: int = 0) -> list[str]:
        result = {"kills": list(rows), "unanswered": unanswered, "in_store_twice": twice}
        return [bar for bar, met in judge(result, ChaosConfig()).items() if not met]

    good = row(1.5, 0.95), row(0.0, None)
    assert missed(*good) == []
    assert missed(*good, row(1.51, 1.0)) == ["within 1.5 of the cold start"]
    assert missed(*good, row(0.2, 0.94)) == ["other stages answered 95% meanwhile"]
    assert missed(*good, row(None, 1.0)) == ["the full rate back after every kill", "within 1.5 of the cold start"]
    assert missed(*good, unanswered=1) == ["every request answered"]
    assert missed(*good, twice=1) == ["nothing in the store twice"]


def test_an_answer_in_part_is_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = Clients("http://127.0.0.1:9", count=1, seed=1)
    answers = iter(
        [
            ("partial", "tagger:failed", {"sha256": "a", "id": "1"}, 0.0),
            ("refused", "429", None, 0.0),
            ("complete", "", {"sha256": "b", "id": "2"}, 0.0),
        ]
    )
    monkeypatch.setattr(clients, "_attempt", lambda *_: next(answers))
    for number in range(2):
        clients._send(number, random.Random(0))
    assert dict(clients.in_part) == {"tagger:failed": 1}
    assert set(clients.answered) == {"a", "b"} and clients.unanswered == [] and clients.attempts == [1, 2]


def test_a_probe_that_hangs_is_waited_for() -> None:
    clients = Clients("http://127.0.0.1:9", count=1, seed=1)
    began = time.monotonic()
    clients.probes += [(began + 2, "detect", True), (began + 2, "caption", True), (began - 1, "tag", True)]
    late = threading.Timer(0.3, lambda: clients.probes.append((began + 1, "tag", False)))
    late.start()
    clients.wait_for_probes(began + 1)
    assert clients.probes[-1] == (began + 1, "tag", False)
