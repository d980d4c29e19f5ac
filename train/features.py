"""Features of a frozen image tower, computed once and kept, so that an epoch of a head or decoder is cheap.

In: a source of pictures (``train.stream``) and an encoder. Out: ``Features``, a source of the same rows, whose shards
``VARIANT-NUMBER.npy`` (float16) lie in a folder or on S3, each written whole or not at all; a killed run continues
where it was, as does one that has let a replica of Serve have its CPUs (``train.giving_way``).

Knows no model and no task.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from data.locations import Location
from train.giving_way import Ask, GiveWay, wait_for_room, waiting_replicas
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
    give_way_s: float = 0.0,
    ask: Ask = waiting_replicas,
) -> Features:
    """Features of every row in every variant (the source's ``epoch``); what is there already is not computed again.

    Args:
        location: its name must change whenever encoder, source or variants' meaning do.
        workers: processes that encode, each with ``threads`` threads and reserving ``cpus``; Ray must be there.
        deadline: ``time.time()`` at which to stop.
        give_way_s: how long a replica of Serve may wait for a CPU until this stops for it; 0: for ever.
        ask: who waits.

    Raises:
        OutOfTime: it came before the end.
    """
    rows = sum(source.groups)
    groups = tuple(min(_SHARD, rows - first) for first in range(0, rows, _SHARD))
    features = Features(location, groups, variants)
    location.ready()
    stage: dict[str, Any] = {
        "fn_constructor_kwargs": {
            "source": source, "target": features, "encoder": encoder, "batch": batch, "threads": threads
        },
        "num_cpus": cpus,
    }  # fmt: skip
    while missing := _missing(features):
        if time.time() > deadline:
            raise OutOfTime(f"{len(missing)} shards of features are missing")
        with GiveWay("CPU", give_way_s, ask) if give_way_s else nullcontext() as way:
            if _encode(features, missing, workers, stage, lambda: bool(way and way.to) or time.time() > deadline):
                break
        if way and way.to:
            print(f"features of the frozen tower: stopped, serving wants room for {way.to}", flush=True)
            found = wait_for_room("CPU", cpus * workers, deadline, ask)
            if found == "no help":
                print("serving did not take the room: features keep what they have from now on", flush=True)
                give_way_s = 0.0
    return features


def _missing(features: Features) -> list[tuple[int, int]]:
    """Variant and number of each shard that is not there."""
    have = {entry.name for entry in features.location.files()} if features.location.exists() else set()
    return [
        (variant, group)
        for variant in range(features.variants)
        for group in range(len(features.groups))
        if features.shard(variant, group).name not in have
    ]


def _encode(
    features: Features,
    missing: list[tuple[int, int]],
    workers: int,
    stage: dict[str, Any],
    stop: Callable[[], bool],
) -> bool:
    """Compute shards; False: it was told to ``stop`` before the last, and nothing is reserved any more."""
    import ray.data

    blocks = [pa.table({"variant": [variant], "group": [group]}) for variant, group in missing]
    dataset = ray.data.from_blocks(blocks).map_batches(
        Encode,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(blocks)), max_tasks_in_flight_per_actor=2),
        **stage,
    )
    total, done, began = sum(features.groups[group] for _, group in missing), 0, time.monotonic()
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
        if done < total and stop():
            return False
    return True
