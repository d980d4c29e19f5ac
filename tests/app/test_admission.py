"""Admission: bounded work, a bounded waiting room, nothing leaked."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from app.admission import Admission
from app.problems import Problem


def test_a_place_that_comes_free_goes_to_the_one_who_has_waited_longest() -> None:
    async def run() -> list[int]:
        admission, order = Admission(1, max_waiting=4, max_wait_s=5), []
        await admission.enter()

        async def wait(number: int) -> None:
            await admission.enter()
            order.append(number)
            admission.leave(1)

        waiters = [asyncio.ensure_future(wait(number)) for number in range(3)]
        await asyncio.sleep(0.01)
        assert order == []
        admission.leave(1)
        await asyncio.gather(*waiters)
        assert admission.in_work == 0
        return order

    assert asyncio.run(run()) == [0, 1, 2]


def test_beyond_the_waiting_room_it_is_429_at_once_with_retry_after() -> None:
    async def run() -> None:
        admission = Admission(1, max_waiting=0, max_wait_s=5)
        await admission.enter()
        with pytest.raises(Problem) as refused:
            await admission.enter()
        assert refused.value.status == 429
        assert int(refused.value.headers["Retry-After"]) >= 1

    asyncio.run(run())


def test_who_has_waited_too_long_is_refused_and_holds_no_place() -> None:
    async def run() -> None:
        admission = Admission(1, max_waiting=4, max_wait_s=0.02)
        await admission.enter()
        with pytest.raises(Problem, match="try again"):
            await admission.enter()
        admission.leave(1)
        assert admission.in_work == 0
        await admission.enter()
        assert admission.in_work == 1

    asyncio.run(run())


def test_a_client_that_goes_away_while_waiting_leaves_no_trace() -> None:
    async def run() -> None:
        admission = Admission(1, max_waiting=4, max_wait_s=5)
        await admission.enter()
        for handed_over in (False, True):
            waiter = asyncio.ensure_future(admission.enter())
            await asyncio.sleep(0)
            if handed_over:  # the place is given and taken back in the same turn of the loop
                admission.leave(1)
            waiter.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiter
        assert admission.in_work == 0

    asyncio.run(run())


def test_a_batch_larger_than_the_capacity_is_let_in_alone_and_only_then() -> None:
    async def run() -> None:
        admission = Admission(4, max_waiting=4, max_wait_s=5)
        await admission.enter()
        admission.widen(31)
        assert admission.in_work == 32
        admission.leave(32)
        await admission.enter()
        await admission.enter()
        with pytest.raises(Problem):
            admission.widen(31)
        admission.widen(2)
        assert admission.in_work == 4

    asyncio.run(run())


@pytest.mark.parametrize("late_before", [False, True])
def test_a_request_of_several_pictures_that_is_refused_makes_the_limit_grow_to_it_and_no_further(
    late_before: bool,
) -> None:
    async def run() -> None:
        admission, refused = Admission(64, max_waiting=4, max_wait_s=5, target_s=10), 0
        if late_before:
            admission.observe(20.0)
        await admission.enter()  # one other, always
        for _ in range(40):
            await admission.enter()
            try:
                admission.widen(15)
                break
            except Problem:
                refused += 1
                admission.leave(1)
            admission.observe(1.0)  # of the other one's
        assert 0 < refused < 40 and admission.in_work == 17
        admission.leave(16)
        for _ in range(100):
            admission.observe(1.0)
        assert admission.limit <= 18

    asyncio.run(run())


def test_a_late_picture_ends_the_growth_for_a_request_that_was_refused() -> None:
    async def run() -> None:
        admission = Admission(64, max_waiting=4, max_wait_s=5, target_s=10)
        for _ in range(2):
            await admission.enter()
        with pytest.raises(Problem):
            admission.widen(40)
        admission.observe(1.0)
        assert admission.limit == 17
        admission.observe(20.0)
        for _ in range(100):
            admission.observe(1.0)
        assert admission.limit == 16

    asyncio.run(run())


def test_a_new_limit_grows_with_every_picture_that_is_in_time_while_there_is_a_queue() -> None:
    async def run() -> None:
        admission = Admission(64, max_waiting=4, max_wait_s=5, target_s=10)
        start = admission.limit
        assert start < 64
        admission.observe(1.0)
        assert admission.limit == start  # nobody needs more
        for _ in range(100):
            while admission.in_work < admission.limit:
                await admission.enter()
            admission.observe(1.0)
        assert admission.limit == 64

    asyncio.run(run())


def test_late_pictures_lower_the_limit_once_for_those_who_were_let_in_under_the_old_one() -> None:
    async def run() -> None:
        admission = _grown_to(32)
        for _ in range(16):
            admission.observe(20.0)
        assert admission.limit == 25

    asyncio.run(run())


def test_the_limit_never_falls_below_two_batches_and_rises_again_slowly() -> None:
    async def run() -> None:
        admission = _grown_to(32)
        admission.all.target_s = 1e-9
        for _ in range(50):
            admission.observe(1e-6)
        assert admission.limit == 16
        admission.in_work, admission.all.target_s = 32, 10
        for _ in range(10):
            admission.observe(1.0)
        assert admission.limit == 16
        for _ in range(1000):
            admission.observe(1.0)
        assert admission.limit == 32

    asyncio.run(run())


def _grown_to(limit: int) -> Admission:
    """One whose limit has grown to its capacity, with as many pictures in work."""
    admission = Admission(limit, max_waiting=4, max_wait_s=5, target_s=10)
    admission.in_work = limit
    while admission.limit < limit:
        admission.observe(1.0)
    return admission


def test_who_waits_is_let_in_when_the_limit_grows() -> None:
    async def run() -> None:
        admission = Admission(17, max_waiting=4, max_wait_s=5, target_s=10)
        for _ in range(16):
            await admission.enter()
        waiter = asyncio.ensure_future(admission.enter())
        await asyncio.sleep(0.01)
        assert not waiter.done()
        admission.observe(1.0)
        await asyncio.wait_for(waiter, 1)

    asyncio.run(run())


def test_whoever_slips_in_fills_the_machine_while_nobody_else_asks() -> None:
    admission = Admission(64, max_waiting=4, max_wait_s=5, target_s=30)
    for _ in range(100):
        admission.slip_in(40 - admission.slipped)
        admission.observe(2.0)  # in time
        admission.slip_out(1)
    assert admission.slip_in(40 - admission.slipped) > 0 and admission.slipped == 40
    assert admission.limit > 40, "a place is left for who asks now"


def test_whoever_slips_in_yields_long_before_a_picture_is_late() -> None:
    admission = Admission(64, max_waiting=4, max_wait_s=5, target_s=30)
    for _ in range(100):
        admission.slip_in(40 - admission.slipped)
        admission.observe(2.0)
        admission.slip_out(1)
    limit = admission.limit
    for _ in range(30):
        admission.observe(10.0)  # in time, and more than a quarter of it
        admission.slipping._decreased_at -= 20  # and none of them let in under the limit before
    assert admission.slipping.places == 8 and admission.limit >= limit
    admission.slip_out(admission.slipped - 8)
    assert admission.slip_in(40) == 0


def test_a_request_of_several_pictures_is_not_refused_for_those_that_slipped_in() -> None:
    async def run() -> None:
        admission = Admission(16, max_waiting=4, max_wait_s=5)
        assert admission.slip_in(40) == 8
        for _ in range(2):
            await admission.enter()
        admission.widen(13)
        with pytest.raises(Problem):
            admission.widen(2)
        assert admission.slip_in(40) == 0
        admission.leave(15)
        admission.slip_out(8)
        assert admission.in_work == admission.slipped == 0

    asyncio.run(run())


def test_what_ran_out_of_time_is_learnt_from_and_what_failed_otherwise_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    admission, learnt = Admission(2, 4, 60.0), list[float]()
    monkeypatch.setattr(admission, "observe", learnt.append)
    for failure, count in ((None, 1), (Problem("timeout", "Late."), 2), (Problem("unavailable", "Gone."), 2)):
        with contextlib.suppress(Problem), admission.observing():
            if failure is not None:
                raise failure
        assert len(learnt) == count
