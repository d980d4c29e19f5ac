"""Features of a frozen image tower, computed once and kept, so that an epoch of a head or decoder is cheap.

In: a source of pictures (``train.stream``) and an encoder. Out: ``Features``, a source of the same rows, whose shards
``VARIANT-NUMBER.npy`` (float16) lie in a folder or on S3, each written whole or not at all; a killed run continues
where it was, as does one that has let a replica of Serve have its CPUs or GPUs (``train.giving_way``).

Knows no model and no task.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from data.errors import DataError
from data.locations import Location
from data.session import gpus_hidden
from train.giving_way import Ask, GiveWay, Resource, wait_for_room, waiting_replicas
from train.job import LoopConfig, threads_of
from train.order import by_group
from train.stream import Batch, Source

#: Rows of a shard.
_SHARD = 128
#: Rows that are shuffled among each other.
_WINDOW = 4096
#: Shards on S3 of which a process has copies: those of a window, and some of the next.
_COPIES = _WINDOW // _SHARD + 8


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
    window: int = _WINDOW

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
                mapped = np.load(shard.local_path, mmap_mode="r") if shard.is_local else _copied(shard)
                values = mapped[inside]
                if found is None:
                    found = np.empty((len(part), *values.shape[1:]), dtype=np.float16)
                found[places] = values
            assert found is not None
            yield {"features": found, "row": part, "epoch": np.full(len(part), epoch)}


@lru_cache(maxsize=_COPIES)
def _copied(shard: Location) -> np.ndarray:
    """A shard on S3, whose copy on this machine has no name and goes with the last who reads it."""
    with tempfile.NamedTemporaryFile(prefix="features-") as file:
        file.write(shard.read_bytes())
        file.flush()
        return np.load(file.name, mmap_mode="r")


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
    least: int = 0,
    cpus: float = 0.5,
    gpus: float = 0.0,
    deadline: float = float("inf"),
    give_way_s: float = 0.0,
    ask: Ask = waiting_replicas,
) -> Features:
    """Features of every row in every variant (the source's ``epoch``); what is there already is not computed again.

    Args:
        location: its name must change whenever encoder, source or variants' meaning do.
        workers: processes that encode at most, each with ``threads`` threads and reserving ``cpus`` and, where the
            cluster has GPUs, ``gpus`` of them (-1: one); Ray must be there.
        least: of them, for how many there must be room to go on after giving way; 0: for all.
        deadline: ``time.time()`` at which to stop.
        give_way_s: how long a replica of Serve may wait for a GPU, or where none is reserved for a CPU, until this
            stops for it; 0: for ever.
        ask: who waits.

    Raises:
        OutOfTime: it came before the end.
        DataError: the place has no room for them all.
    """
    import ray

    rows = sum(source.groups)
    groups = tuple(min(_SHARD, rows - first) for first in range(0, rows, _SHARD))
    features = Features(location, groups, variants)
    location.ready()
    constructor = {"source": source, "target": features, "encoder": encoder, "batch": batch, "threads": threads}
    while missing := _missing(features):
        if time.time() > deadline:
            raise OutOfTime(f"{len(missing)} shards of features are missing")
        here = ray.cluster_resources().get("GPU", 0.0)
        share = (1.0 if gpus < 0 else gpus) if here else 0.0
        most = min(workers, max(1, int(here / share))) if share else workers
        held: Resource = "GPU" if share else "CPU"
        stage = {"fn_constructor_kwargs": constructor, "num_cpus": cpus} | _reserved(share)
        with GiveWay(held, give_way_s, ask) if give_way_s else nullcontext() as way:
            if _encode(features, missing, most, stage, lambda: bool(way and way.to) or time.time() > deadline):
                break
        if way and way.to:
            print(f"features of the frozen tower: stopped, serving wants room for {way.to}", flush=True)
            found = wait_for_room(held, (share or cpus) * min(least or most, most), deadline, ask)
            if found == "no help":
                print("serving did not take the room: features keep what they have from now on", flush=True)
                give_way_s = 0.0
    return features


def features_of_run(
    config: LoopConfig,
    encoder: EncoderSpec,
    train: tuple[Source, Location, int],
    val: tuple[Source, Location, int],
    deadline: float,
    give_way_s: float,
) -> tuple[Features, Features]:
    """Features of a run's two sources, each at its place and in so many variants, encoded as the run trains: by as many
    processes, each with a worker's threads and GPUs. Ray must be there.

    Raises:
        OutOfTime, DataError: as ``compute_features``.
    """

    def computed(source: Source, place: Location, variants: int) -> Features:
        return compute_features(
            source,
            encoder,
            place,
            variants,
            workers=config.num_workers,
            least=config.min_workers,
            threads=threads_of(config),
            gpus=config.gpus_per_worker,
            deadline=deadline,
            give_way_s=give_way_s,
        )

    return computed(*train), computed(*val)


def _reserved(share: float) -> dict[str, Any]:
    """What Ray Data is told of a stage's GPUs and environment. ``models:/`` means there what it means here."""
    here = {name: os.environ[name] for name in ("MLFLOW_TRACKING_URI",) if name in os.environ}
    return ({"num_gpus": share} if share else {}) | {"runtime_env": {"env_vars": gpus_hidden(share) | here}}


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
        batch_size=1,  # a shard; Ray Data wants a number where there are GPUs
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(blocks)), max_tasks_in_flight_per_actor=2),
        **stage,
    )
    total, done, began = sum(features.groups[group] for _, group in missing), 0, time.monotonic()
    said = began
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        if not done:
            _check_space(features, table, total)
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


def _check_space(features: Features, first: pa.Table, rows: int) -> None:
    """Refuse to go on for hours towards a full disk: what the first shard takes, all others will.

    Raises:
        DataError: there is no room for so many rows.
    """
    if not features.location.is_local:
        return
    shard = features.shard(first["variant"][0].as_py(), first["group"][0].as_py()).local_path
    needed = shard.stat().st_size / first["rows"][0].as_py() * rows
    free = shutil.disk_usage(shard).free
    if free < needed:
        raise DataError(
            f"features of the frozen tower need {needed / 2**30:.1f} GiB and {features.location} has "
            f"{free / 2**30:.1f} free: free some, choose another --cache, or train without --freeze tower"
        )
