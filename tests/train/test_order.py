"""The order of rows: the same global batches for any number of workers, every row once an epoch, and no epoch like
another."""

from __future__ import annotations

import numpy as np
import pytest

from train.order import Order, by_group, slices


def order(**changes: object) -> Order:
    values: dict[str, object] = {"groups": (7, 5, 9, 11, 8), "batch": 8, "lanes": 4, "window": 12, "seed": 3}
    return Order(**(values | changes))  # type: ignore[arg-type]


def test_a_global_batch_holds_the_same_rows_for_one_worker_and_for_many() -> None:
    plan = order()
    for epoch in range(3):
        alone = plan.share(epoch, 0, 1)
        for world in (2, 4):
            together = np.concatenate([plan.share(epoch, rank, world) for rank in range(world)], axis=1)
            assert np.array_equal(alone, together)


def test_every_row_comes_at_most_once_an_epoch_and_what_is_left_out_changes() -> None:
    plan = order()
    assert plan.steps == 5
    left_out = []
    for epoch in range(20):
        rows = plan.epoch(epoch).reshape(-1)
        assert len(set(rows.tolist())) == len(rows) == 40
        left_out.append(set(range(40)) - set(rows.tolist()))
    assert not np.array_equal(plan.epoch(0), plan.epoch(1))
    few = order(groups=(7, 5, 9, 11, 11))
    missed = [frozenset(range(43)) - frozenset(few.epoch(epoch).reshape(-1).tolist()) for epoch in range(10)]
    assert all(len(rows) == 3 for rows in missed) and len(set(missed)) > 1


def test_pieces_go_on_exactly_where_a_run_was_stopped() -> None:
    plan = order()

    def rows(first: int, last: int, rank: int) -> list[tuple[int, int]]:
        return [(int(piece[0]), int(row)) for piece in plan.pieces(first, last, rank, 2, 9) for row in piece[1:]]

    whole = rows(0, 13, 1)
    assert len(whole) == 13 * 4
    for stop in (1, 5, 7, 12):
        assert rows(0, stop, 1) + rows(stop, 13, 1) == whole
    assert [epoch for epoch, _ in whole[::4]] == [0] * 5 + [1] * 5 + [2] * 3


def test_a_file_is_read_by_one_worker_where_lanes_do_not_meet_in_it() -> None:
    plan = order(groups=(64,) * 32, batch=64, lanes=4, window=128)
    owners: dict[int, set[int]] = {}
    for rank in range(4):
        for group, _, _ in by_group(plan.share(0, rank, 4).reshape(-1), plan.groups):
            owners.setdefault(group, set()).add(rank)
    shared = sum(len(ranks) > 1 for ranks in owners.values())
    assert len(owners) == 32
    assert shared <= 2 * 3  # a window of two files at each of the three borders


def test_a_split_smaller_than_a_batch_fills_it() -> None:
    plan = Order((3,), 8, 2, seed=1)
    assert plan.steps == 1
    assert set(plan.epoch(0).reshape(-1).tolist()) == {0, 1, 2}


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="lanes"):
        Order((10,), 8, 3)
    with pytest.raises(ValueError, match="workers"):
        order().share(0, 0, 3)
    with pytest.raises(ValueError, match="no rows"):
        Order((), 8)


def test_rows_are_found_in_their_files() -> None:
    rows = np.array([11, 0, 6, 7, 11])
    found = {group: (places.tolist(), inside.tolist()) for group, places, inside in by_group(rows, (7, 5))}
    assert found == {0: ([1, 2], [0, 6]), 1: ([0, 3, 4], [4, 0, 4])}
    assert sorted(np.concatenate([slices(10, rank, 3) for rank in range(3)]).tolist()) == list(range(10))
