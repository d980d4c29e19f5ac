"""Batches loaded in a process beside this one by torch's ``DataLoader``: what trains without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from train.stream import Batch, Source, blocks_of, rebatch


class _Rows(IterableDataset[Batch]):
    def __init__(self, source: Source, pieces: Sequence[np.ndarray], micro: int) -> None:
        self._source, self._pieces, self._micro = source, pieces, micro

    def __iter__(self) -> Iterator[Batch]:
        return rebatch(blocks_of(self._source, self._pieces), self._micro)


def batches_beside(source: Source, pieces: Sequence[np.ndarray], micro: int) -> Iterator[Batch]:
    """Batches of pieces; one process: several would hand over batches in turns, and rows would mix."""
    if not pieces:
        return
    loader: Any = DataLoader(
        _Rows(source, pieces, micro),
        batch_size=None,
        num_workers=1,
        prefetch_factor=4,
        multiprocessing_context="spawn",
    )
    for batch in loader:
        yield {name: np.asarray(values) for name, values in batch.items()}
