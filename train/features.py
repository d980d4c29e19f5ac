"""Features of a frozen image tower, computed once and kept, so that an epoch of a head or decoder is cheap.

In: a source of pictures (``train.stream``) and an encoder. Out: ``Features``, a source of the same rows, whose shards
``VARIANT-NUMBER.npy`` (float16) lie in a folder or on S3, each written whole or not at all; a killed run continues
where it was. ``cached_features`` does the same for raw pictures without Ray.

Knows no model and no task.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from data.locations import Location
from train.order import by_group
from train.stream import Batch, Source

Encoder = Callable[[list[bytes]], np.ndarray]


def cached_features(
    folder: Path,
    ids: Sequence[str],
    read: Callable[[str], bytes],
    encode: Encoder,
    shape: tuple[int, ...],
    batch_size: int = 8,
) -> np.ndarray:
    """Features of ``ids`` in their order, shape ``(len(ids), *shape)``, float16, memory-mapped from ``folder``.

    Args:
        folder: where the cache lives; its name must change whenever the encoder or its input does.
        ids: names of the pictures; a cache that holds exactly these is reused as it is.
        read: the encoded bytes of one picture.
        encode: bytes of up to ``batch_size`` pictures -> array ``(n, *shape)``.

    Raises:
        ValueError: the folder holds the features of other pictures.
    """
    features, listing = folder / "features.npy", folder / "ids.json"
    if listing.is_file():
        if json.loads(listing.read_text()) != list(ids):
            raise ValueError(f"{folder} holds features of other pictures; remove it or name another folder")
        return np.load(features, mmap_mode="r")

    folder.mkdir(parents=True, exist_ok=True)
    partial, done_file = folder / "features.partial.npy", folder / "done.txt"
    done = int(done_file.read_text()) if done_file.is_file() and partial.is_file() else 0
    rows = (
        np.lib.format.open_memmap(partial, mode="r+")
        if done
        else np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=(len(ids), *shape))
    )
    started, first = time.monotonic(), done
    while done < len(ids):
        names = ids[done : done + batch_size]
        rows[done : done + len(names)] = encode([read(name) for name in names])
        done += len(names)
        if done % (batch_size * 40) < batch_size or done == len(ids):
            rows.flush()
            done_file.write_text(str(done))
            rate = (done - first) / (time.monotonic() - started)
            print(
                f"features: {done}/{len(ids)}, {rate:.1f}/s, {(len(ids) - done) / rate / 60:.1f} min left", flush=True
            )
    rows.flush()
    del rows
    partial.replace(features)
    listing.write_text(json.dumps(list(ids)))
    done_file.unlink(missing_ok=True)
    return np.load(features, mmap_mode="r")


#: Rows of a shard.
_SHARD = 128


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
) -> Features:
    """Features of every row in every variant (the source's ``epoch``); what is there already is not computed again.

    Args:
        location: its name must change whenever encoder, source or variants' meaning do.
        workers: processes that encode, each with ``threads`` threads and reserving ``cpus``; Ray must be there.
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
    return features
