"""From rows of a prepared data set to batches of pictures as a model sees them, while it trains.

In: a ``Source`` (what a row is) and an ``Order`` (which rows when). Out: an iterator of batches, ``{"pixels": uint8
(n, V, S, S, 3), "row": int64 (n,), "epoch": int64 (n,)}``; labels and captions are small, and whoever trains looks them
up by row.

Two streams give the same batches: Ray Data reads, decodes and renders in tasks anywhere on the cluster, a shard of the
split for each worker; ``local_batches`` does it in this process, and ``train.beside`` in one beside it. Tasks that read
pictures import this module, which therefore needs no torch. Knows no model and no loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import explained
from data.locations import Location
from data.versions import DataVersion, Split
from deployments.images import ADMITTED, decode
from deployments.views import ViewSpec, render
from train.damage import Damage, Tier, deliver, random_damage
from train.order import Order, by_group, slices

Batch = dict[str, np.ndarray]
#: Rendered pictures handed on together; the first batch is there before a task is done.
_BLOCK_BYTES = 16 * 2**20
#: A task holds this much of encoded pictures at most, about.
_TASK_BYTES = 128 * 2**20
#: Validation passes over the same pictures again and again; up to this size they stay in memory.
KEEP_BYTES = 512 * 2**20


class Augment(Protocol):
    """What training does to a picture before the model's views are cut."""

    def __call__(self, image: Any, id_: str, epoch: int) -> Any: ...


@dataclass(frozen=True)
class Deliver:
    """The same tier of delivery for every picture."""

    tier: Tier = "clean"

    def __call__(self, image: Any, id_: str, epoch: int) -> Any:
        return deliver(image, self.tier)


@dataclass(frozen=True)
class RandomDamage:
    """Another random delivery of every picture in every epoch, both classes alike."""

    damage: Damage
    variants: int = 0
    """Start over after so many; 0: never the same twice."""

    def __call__(self, image: Any, id_: str, epoch: int) -> Any:
        return random_damage(image, self.damage, id_, epoch % self.variants if self.variants else epoch)


@dataclass(frozen=True)
class Pictures:
    """A split's pictures, read from its files where they are needed."""

    location: Location
    files: tuple[str, ...]
    groups: tuple[int, ...]
    views: ViewSpec
    augment: Augment = field(default_factory=Deliver)
    mean_bytes: float = 150_000.0

    @classmethod
    def of(cls, version: DataVersion, split: Split, views: ViewSpec, augment: Augment | None = None) -> Pictures:
        """The pictures of a split.

        Raises:
            DataError: the split is empty or a file cannot be read.
        """
        files = tuple(version.files(split))
        with explained(str(version.location)):
            groups = tuple(
                pq.read_metadata(path, filesystem=version.location.arrow_filesystem).num_rows for path in files
            )
        mean = version.manifest.image_bytes.get(split, 0) / max(1, sum(groups))
        return cls(version.location, files, groups, views, augment or Deliver(), max(mean, 1000.0))

    def first(self, rows: int) -> Pictures:
        """The same with at most so many rows, the first ones."""
        groups: list[int] = []
        for group in self.groups:
            if left := rows - sum(groups):
                groups.append(min(group, left))
        return replace(self, files=self.files[: len(groups)], groups=tuple(groups))

    @property
    def window(self) -> int:
        """How many rows a task may hold."""
        return int(np.clip(_TASK_BYTES / self.mean_bytes, 64, 1024))

    def load(self, epoch: int, rows: np.ndarray) -> Iterator[Batch]:
        """Rendered pictures of ``rows``, in their order, in blocks of a few MB."""
        encoded: list[tuple[str, bytes]] = [("", b"")] * len(rows)
        for group, places, inside in by_group(rows, self.groups):
            with explained(str(self.location)):
                table = pq.read_table(
                    self.files[group],
                    columns=["id", "image"],
                    filesystem=self.location.arrow_filesystem,
                    partitioning=None,
                    use_threads=False,
                )
            ids, images = table["id"], table["image"]
            for place, row in zip(places.tolist(), inside.tolist(), strict=True):
                encoded[place] = ids[row].as_py(), images[row].as_py()
        size = max(1, _BLOCK_BYTES // int(np.prod(self.views.shape)))
        for first in range(0, len(rows), size):
            part = encoded[first : first + size]
            pixels = np.empty((len(part), *self.views.shape), dtype=np.uint8)
            for index, (id_, data) in enumerate(part):
                pixels[index] = render(self.augment(decode(data, ADMITTED).image, id_, epoch), self.views)
            yield {"pixels": pixels, "row": rows[first : first + size], "epoch": np.full(len(part), epoch)}


class Source(Protocol):
    """Rows of a split, loaded by number."""

    @property
    def groups(self) -> tuple[int, ...]: ...

    @property
    def window(self) -> int: ...

    def load(self, epoch: int, rows: np.ndarray) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Shard:
    """One worker's part of a run."""

    order: Order
    rank: int
    world: int
    first_step: int
    last_step: int
    micro: int
    """Rows of a batch that this worker's model sees at once; a step is one or several."""

    def pieces(self, rows: int) -> list[np.ndarray]:
        # several tasks an epoch, or few pictures would all wait for one task
        epoch_rows = self.order.steps * self.order.batch // self.world
        wanted = max(self.micro, min(rows, -(-epoch_rows // 4)))
        return list(self.order.pieces(self.first_step, self.last_step, self.rank, self.world, wanted))


def rebatch(blocks: Iterator[Batch], size: int) -> Iterator[Batch]:
    """The rows of blocks of any size in batches of exactly ``size``, the last one smaller."""
    held: list[Batch] = []
    count = 0
    for block in blocks:
        held.append(block)
        count += len(block["row"])
        if count < size:
            continue
        whole = {name: np.concatenate([part[name] for part in held]) for name in block} if len(held) > 1 else block
        for first in range(0, count - size + 1, size):
            yield {name: values[first : first + size] for name, values in whole.items()}
        rest = count % size
        held = [{name: values[count - rest :] for name, values in whole.items()}] if rest else []
        count = rest
    if count:
        yield {name: np.concatenate([part[name] for part in held]) for name in held[0]}


def ray_batches(source: Source, pieces: Sequence[np.ndarray], micro: int, loaders: int, cpus: float) -> Iterator[Batch]:
    """Batches of pieces, loaded by Ray Data tasks, at most ``loaders`` at a time, each reserving ``cpus``."""
    import ray.data
    from ray.data import DataContext

    if not pieces:
        return
    context = DataContext.get_current()
    # the order is part of the plan: without it two runs would not see the same batches
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = _BLOCK_BYTES
    blocks = [pa.table({"epoch": piece[:1], "rows": [piece[1:].tolist()]}) for piece in pieces]

    def load(batch: dict[str, Any]) -> Iterator[Batch]:
        for epoch, rows in zip(batch["epoch"], batch["rows"], strict=True):
            yield from source.load(int(epoch), np.asarray(rows, dtype=np.int64))

    dataset = ray.data.from_blocks(blocks).map_batches(
        load, batch_size=None, batch_format="numpy", num_cpus=cpus, compute=ray.data.TaskPoolStrategy(size=loaders)
    )
    yield from dataset.iter_batches(batch_size=micro, batch_format="numpy", prefetch_batches=2)


def blocks_of(source: Source, pieces: Sequence[np.ndarray]) -> Iterator[Batch]:
    """What a source gives for pieces of an order, one after another."""
    for piece in pieces:
        yield from source.load(int(piece[0]), piece[1:])


def local_batches(source: Source, pieces: Sequence[np.ndarray], micro: int) -> Iterator[Batch]:
    """The batches of ``ray_batches``, made in this process."""
    return rebatch(blocks_of(source, pieces), micro)


class PassOnce:
    """A split in order, once for each iteration, this worker's part; kept in memory when that is little."""

    def __init__(self, source: Source, rank: int, world: int, micro: int, loaders: int, cpus: float, ray: bool) -> None:
        self._source, self._micro = source, micro
        self._loaders, self._cpus, self._ray = loaders, cpus, ray
        self._rows = slices(sum(source.groups), rank, world)
        self._kept: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._kept is not None:
            yield from self._kept
            return
        size = max(self._micro, min(self._source.window, -(-len(self._rows) // 4)))
        pieces = [np.concatenate([[0], self._rows[first : first + size]]) for first in range(0, len(self._rows), size)]
        batches = (
            ray_batches(self._source, pieces, self._micro, self._loaders, self._cpus)
            if self._ray
            else local_batches(self._source, pieces, self._micro)
        )
        kept: list[Batch] | None = []
        held = 0
        for batch in batches:
            held += sum(values.nbytes for values in batch.values())
            if kept is not None:
                kept = [*kept, batch] if held <= KEEP_BYTES else None
            yield batch
        self._kept = kept


def pictures_of(version: DataVersion, rows: list[int]) -> dict[int, Any]:
    """A few decoded validation pictures by row."""
    source = Pictures.of(version, "val", ViewSpec())
    found = {}
    for group, places, inside in by_group(np.array(rows), source.groups):
        images = pq.read_table(
            source.files[group], columns=["image"], filesystem=version.location.arrow_filesystem, partitioning=None
        )["image"]
        for place, row in zip(places.tolist(), inside.tolist(), strict=True):
            found[rows[place]] = decode(images[row].as_py(), ADMITTED).image
    return found
