"""In which order rows are seen: a plan that follows from a seed alone, whatever the number of workers.

In: how many rows each file of a split holds, the size of a global batch, a number of lanes. Out: for any epoch, step
and worker the rows to read. A global batch consists of the same rows with one worker or with many, and a run that
starts at step 1,234 sees what an undisturbed one would have seen there.

A lane is an equal share of an epoch's rows, and a worker owns whole lanes: so a file is read by one worker and once
an epoch (by two where lanes meet). Rows are shuffled by files, and within windows of several files, as far as memory
allows. The idea is that of elastically deterministic streaming (MosaicML StreamingDataset, "canonical nodes"). Knows no
files, no Ray and no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Order:
    """The order of the rows of one split."""

    groups: tuple[int, ...]
    """Rows of each file."""
    batch: int
    """Rows of a global batch."""
    lanes: int = 1
    window: int = 1024
    """Rows that are shuffled among each other, in whole files."""
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.batch % self.lanes:
            raise ValueError(f"a global batch of {self.batch} does not divide into {self.lanes} lanes")
        if not self.rows:
            raise ValueError("there are no rows")

    @property
    def rows(self) -> int:
        return sum(self.groups)

    @property
    def steps(self) -> int:
        """Global batches of an epoch. What does not fill a batch waits for the next epoch, whose order is another."""
        return max(1, self.rows // self.batch)

    def epoch(self, number: int) -> np.ndarray:
        """Row numbers ``(steps, batch)`` of an epoch; columns are lane after lane."""
        return _epoch(self, number)

    def share(self, number: int, rank: int, world: int) -> np.ndarray:
        """What one of ``world`` workers takes of each global batch of an epoch, ``(steps, batch / world)``."""
        if self.lanes % world:
            raise ValueError(f"{world} workers do not divide {self.lanes} lanes")
        own = self.batch // world
        return self.epoch(number)[:, rank * own : (rank + 1) * own]

    def pieces(self, first_step: int, last_step: int, rank: int, world: int, rows: int) -> Iterator[np.ndarray]:
        """A worker's rows from global step ``first_step`` up to ``last_step``, in pieces of about ``rows`` rows that
        end with a step, none across epochs; each is ``[epoch, row, row, ...]``."""
        most = max(1, rows // (self.batch // world))
        step = first_step
        while step < last_step:
            number, place = divmod(step, self.steps)
            count = min(most, self.steps - place, last_step - step)
            taken = self.share(number, rank, world)[place : place + count].reshape(-1)
            yield np.concatenate([[number], taken])
            step += count


@lru_cache(maxsize=4)
def _epoch(order: Order, number: int) -> np.ndarray:
    starts = np.concatenate([[0], np.cumsum(order.groups)])
    if order.shuffle:
        random = np.random.default_rng([order.seed, number])
        windows: list[list[np.ndarray]] = [[]]
        held = 0
        for group in random.permutation(len(order.groups)):
            if held >= order.window:
                windows.append([])
                held = 0
            windows[-1].append(np.arange(starts[group], starts[group + 1]))
            held += order.groups[group]
        rows = np.concatenate([random.permutation(np.concatenate(window)) for window in windows])
    else:
        rows = np.arange(starts[-1])
    wanted = order.steps * order.batch
    # a split smaller than one batch fills it by starting over
    rows = np.resize(rows, wanted) if len(rows) < wanted else rows[:wanted]
    lanes = rows.reshape(order.lanes, order.steps, order.batch // order.lanes)
    return np.ascontiguousarray(lanes.transpose(1, 0, 2).reshape(order.steps, order.batch))


def slices(rows: int, rank: int, world: int) -> np.ndarray:
    """A worker's rows of a split that is passed once, in order: every ``world``-th."""
    return np.arange(rank, rows, world)


def by_group(rows: np.ndarray, groups: Sequence[int]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Row numbers sorted out by file: ``(file, places in rows, rows within the file)`` for each file that is needed."""
    starts = np.concatenate([[0], np.cumsum(groups)])
    owner = np.searchsorted(starts, rows, side="right") - 1
    for group in np.unique(owner):
        places = np.flatnonzero(owner == group)
        yield int(group), places, rows[places] - starts[group]
