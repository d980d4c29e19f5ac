"""Features of a frozen image tower, computed once and kept, so that an epoch of a head or decoder is cheap.

In: a source of pictures (``train.stream``) and an encoder. Out: ``Features``, a source of the same rows, whose shards
``VARIANT-NUMBER.npy`` (float16) lie in a folder or on S3, each written whole or not at all; a killed run continues
where it was.

Knows no model and no task.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from data.locations import Location
from train.order import by_group
from train.stream import Batch, Source

#: Rows of a shard.
_SHARD = 128


class OutOfTime(RuntimeError):
    """The deadline came before all features were there; what is there stays."""


class EncoderSpec(Protocol):
    """Says how to load an encoder in another process."""

    def load(self) -> Callable[[np.ndarray], np.ndarray]:
        """A function from uint8 views ``(n, V, S, S, 3)`` to features ``(n, ...)``."""
        ...


@dataclass(frozen=True)
class Features:
    """Rows of a split as features instead of pixels."""

    location: Location
    groups: tuple[int, ...]
    variants: int = 1
    window: int = 4096

    def shard(self, variant: int, group: int) -> Location:
        return self.location / f"{variant}-{group:05d}.npy"

    def load(self, epoch: int, rows: np.ndarray) -> Iterator[Batch]:
        """Features of ``rows`` in their order, float16, 128 rows at a time: a piece may be as long as an epoch."""
        variant = epoch % self.variants
        for first in range(0, len(rows), _SHARD):
            part = rows[first : first + _SHARD]
            found: np.ndarray | None = None
            for group, places, inside in by_group(part, self.groups):
                shard = self.shard(variant, group)
                if shard.is_local:
                    values = np.load(shard.local_path, mmap_mode="r")[inside]
                else:
                    values = np.load(io.BytesIO(shard.read_bytes()))[inside]
                if found is None:
                    found = np.empty((len(part), *values.shape[1:]), dtype=np.float16)
                found[places] = values
            assert found is not None
            yield {"features": found, "row": part, "epoch": np.full(len(part), epoch)}


class Encode:
    """A Ray Data stage: one shard's rows to its file."""

    def __init__(self, source: Source, target: Features, encoder: EncoderSpec, batch: int, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._source, self._target, self._encode, self._batch = source, target, encoder.load(), batch

    def __call__(self, table: pa.Table) -> pa.Table:
        for variant, group in zip(table["variant"].to_pylist(), table["group"].to_pylist(), strict=True):
            start = sum(self._target.groups[:group])
            rows = np.arange(start, start + self._target.groups[group])
            parts = [
                self._encode(block["pixels"][first : first + self._batch])
                for block in self._source.load(variant, rows)
                for first in range(0, len(block["row"]), self._batch)
            ]
            buffer = io.BytesIO()
            np.save(buffer, np.concatenate(parts).astype(np.float16))
            self._target.shard(variant, group).write_bytes(buffer.getvalue())
        return table.append_column(
            "rows", pa.array([self._target.groups[group] for group in table["group"].to_pylist()])
        )


def compute_features(
    source: Source,
    encoder: EncoderSpec,
    location: Location,
    variants: int = 1,
    *,
    workers: int = 1,
    threads: int = 1,
    batch: int = 8,
    cpus: float = 0.5,
    deadline: float = float("inf"),
) -> Features:
    """Features of every row in every variant (the source's ``epoch``); what is there already is not computed again.

    Args:
        location: its name must change whenever encoder, source or variants' meaning do.
        workers: processes that encode, each with ``threads`` threads and reserving ``cpus``; Ray must be there.
        deadline: ``time.time()`` at which to stop.

    Raises:
        OutOfTime: it came before the end.
    """
    rows = sum(source.groups)
    groups = tuple(min(_SHARD, rows - first) for first in range(0, rows, _SHARD))
    features = Features(location, groups, variants)
    location.ready()
    have = {entry.name for entry in location.files()} if location.exists() else set()
    missing = [
        (variant, group)
        for variant in range(variants)
        for group in range(len(groups))
        if features.shard(variant, group).name not in have
    ]
    if not missing:
        return features
    if time.time() > deadline:
        raise OutOfTime(f"{len(missing)} shards of features are missing")
    import ray.data

    blocks = [pa.table({"variant": [variant], "group": [group]}) for variant, group in missing]
    arguments: dict[str, Any] = {"target": features, "encoder": encoder, "batch": batch, "threads": threads}
    dataset = ray.data.from_blocks(blocks).map_batches(
        Encode,
        fn_constructor_kwargs={"source": source, **arguments},
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(blocks)), max_tasks_in_flight_per_actor=2),
        num_cpus=cpus,
    )
    total, done, began = sum(groups[group] for _, group in missing), 0, time.monotonic()
    said = began
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        done += sum(table["rows"].to_pylist())
        if time.monotonic() - said > 10 or done == total:
            said = time.monotonic()
            speed = done / (said - began)
            print(
                f"features of the frozen tower: {done}/{total}, {speed:.1f}/s, "
                f"{(total - done) / speed / 60:.1f} min left",
                flush=True,
            )
        if time.time() > deadline and done < total:
            raise OutOfTime(f"{total - done} features are missing")
    return features
