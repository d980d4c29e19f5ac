"""The two passes over the pictures, as Ray Data streams: take particulars, then write shards.

In: names of pictures and where they lie. Out: their particulars; parquet shards. Between the passes only particulars
are on the driver, a few hundred bytes a picture; the pictures themselves are never more in memory than one at a time
in the first pass and one shard in the second, for each worker.

What is done stays done: each block of particulars and each shard is a file that appears whole, under a name that
follows from the input alone, and a run that finds it there does not do it again.

Blocks hold 256 pictures: Ray Data hands out work every tenth of a second, so a block has to last for seconds. A long
stream has workers of its own, which take the next block while one is in work; a short one is over before they have
started, so it goes to whatever worker is there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import DataError, as_data_error
from data.identify import Particulars, identify
from data.locations import Location
from deployments.images import ImageError, ImageLimits
from deployments.processor import step_back

BLOCK_PICTURES = 256
#: Blocks for each worker from which on workers of the stream's own are worth their start.
_LONG_STREAM = 8
#: A shard of large photos has fewer than that.
SHARD_BYTES = 64 * 2**20

_FACTS = pa.schema(
    [
        ("name", pa.string()),
        ("reason", pa.string()),  # null: valid
        ("detail", pa.string()),
        ("id", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("mode", pa.string()),
        ("bytes", pa.int64()),
        ("jpeg_quality", pa.int32()),
        ("quantisation", pa.string()),
        ("declared", pa.list_(pa.string())),
        ("phash", pa.string()),
        ("pixels", pa.string()),
    ]
)
_FIELDS = [field.name for field in dataclasses.fields(Particulars)]


class Pictures(Protocol):
    """Where pictures are read from; sent to the workers."""

    @property
    def location(self) -> Location: ...

    def read_all(self, names: Sequence[str]) -> Iterator[tuple[str, bytes | None]]:
        """Name and bytes of each, in order; None for what is not there."""


@dataclass(frozen=True)
class Refused:
    """Why a file is no valid picture."""

    reason: str
    detail: str


@dataclass
class Timing:
    """When a pass began its first block and ended its last, seconds since the epoch: without the workers' start."""

    began: float = float("inf")
    ended: float = 0.0
    pictures: int = 0

    @property
    def seconds(self) -> float:
        return max(0.0, self.ended - self.began)


# ------------------------------------------------------------------------------------------------------- first pass


def take_particulars(
    pictures: Pictures,
    names: Sequence[str],
    limits: ImageLimits,
    work: Location,
    workers: int,
    say: Callable[[str], None] = print,
) -> tuple[dict[str, Particulars | Refused], Timing]:
    """Particulars of every picture by name.

    Args:
        pictures: where they lie.
        names: each once; a worker takes 256 at a time, in this order.
        limits: what a picture may be.
        work: folder of this input, these limits and this revision; what an earlier run left there is used.
        workers: processes, each with a CPU.
        say: told about progress.

    Raises:
        DataError: the place of the pictures or of the work cannot be used.
    """
    blocks = [list(names[start : start + BLOCK_PICTURES]) for start in range(0, len(names), BLOCK_PICTURES)]
    files = [f"{number:06d}.parquet" for number in range(len(blocks))]
    there = {entry.name for entry in work.files()} if work.exists() else set()
    found: dict[str, Particulars | Refused] = {}
    for file in (file for file in files if file in there):
        found.update(_unpacked(pq.read_table(io.BytesIO((work / file).read_bytes()))))
    if found:
        say(f"{len(found)} of {len(names)} pictures were identified by an earlier run")
    waiting = [
        pa.table({"file": [file] * len(block), "name": block})
        for file, block in zip(files, blocks, strict=True)
        if file not in there
    ]
    timing = Timing()
    progress = _Progress("identified", len(names), say)
    for table in _stream(waiting, _Identifier, {"pictures": pictures, "limits": limits, "work": work}, workers, timing):
        found.update(_unpacked(table))
        timing.pictures += len(table)
        progress.at(len(found))
    return found, timing


class _Identifier:
    """A worker of the first pass."""

    def __init__(self, pictures: Pictures, limits: ImageLimits, work: Location) -> None:
        step_back()
        self._pictures, self._limits, self._work = pictures, limits, work

    def __call__(self, block: pa.Table) -> pa.Table:
        began = time.time()
        rows = [self._row(name, data) for name, data in self._pictures.read_all(block["name"].to_pylist())]
        table = pa.Table.from_pylist(rows, _FACTS)
        with (self._work / block["file"][0].as_py()).writing() as file:
            pq.write_table(table, file)
        return _timed(table, began)

    def _row(self, name: str, data: bytes | None) -> dict[str, Any]:
        if data is None:
            return {"name": name, "reason": "missing", "detail": "the file is not there"}
        try:
            particulars = identify(data, self._limits)
        except ImageError as error:
            return {"name": name, "reason": error.code, "detail": error.detail}
        return {"name": name} | {field: getattr(particulars, field) for field in _FIELDS}


def _unpacked(table: pa.Table) -> dict[str, Particulars | Refused]:
    found: dict[str, Particulars | Refused] = {}
    for row in table.select(_FACTS.names).to_pylist():
        if row["reason"] is None:
            found[row["name"]] = Particulars(**{field: row[field] for field in _FIELDS})
        else:
            found[row["name"]] = Refused(row["reason"], row["detail"])
    return found


# ------------------------------------------------------------------------------------------------------ second pass


@dataclass(frozen=True)
class Shard:
    """One parquet file to be: where, relative to the version, and its rows without the pictures' bytes."""

    path: str
    names: list[str]
    rows: list[dict[str, Any]]


def plan_shards(split: str, names: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[Shard]:
    """Shards of a split, in the order of the rows: at most 256 pictures or 64 MiB each."""
    shards: list[Shard] = []
    size = 0
    for name, row in zip(names, rows, strict=True):
        if not shards or len(shards[-1].rows) == BLOCK_PICTURES or size + row["bytes"] > SHARD_BYTES:
            shards.append(Shard(f"{split}/{len(shards):05d}.parquet", [], []))
            size = 0
        shards[-1].names.append(name)
        shards[-1].rows.append(row)
        size += row["bytes"]
    return shards


def write_shards(
    pictures: Pictures,
    shards: Sequence[Shard],
    schema: pa.Schema,
    folder: Location,
    workers: int,
    say: Callable[[str], None] = print,
) -> Timing:
    """Write every shard that is not there yet, with the original bytes, checked against their ids.

    Raises:
        DataError: a picture changed since the first pass, or the folder cannot be written.
    """
    there = {entry.name for entry in folder.files()} if folder.exists() else set()
    rowless = pa.schema([field for field in schema if field.name != "image"])
    waiting = []
    for shard in (shard for shard in shards if shard.path not in there):
        table = pa.Table.from_pylist(shard.rows, rowless)
        table = table.append_column("_name", pa.array(shard.names))
        waiting.append(table.append_column("_file", pa.array([shard.path] * len(shard.names))))
    total = sum(len(shard.rows) for shard in shards)
    timing = Timing()
    progress = _Progress("written", total, say)
    done = total - sum(len(table) for table in waiting)
    arguments = {"pictures": pictures, "schema": schema, "folder": folder}
    for table in _stream(waiting, _ShardWriter, arguments, workers, timing):
        timing.pictures += table["rows"][0].as_py()
        progress.at(done + timing.pictures)
    return timing


class _ShardWriter:
    """A worker of the second pass."""

    def __init__(self, pictures: Pictures, schema: pa.Schema, folder: Location) -> None:
        step_back()
        self._pictures, self._schema, self._folder = pictures, schema, folder

    def __call__(self, block: pa.Table) -> pa.Table:
        began = time.time()
        ids = block["id"].to_pylist()
        images = []
        for (name, data), id_ in zip(self._pictures.read_all(block["_name"].to_pylist()), ids, strict=True):
            if data is None or hashlib.sha256(data).hexdigest() != id_:
                raise DataError(
                    f"{name} in {self._pictures.location} changed while it was being prepared: "
                    "leave the input alone and run again"
                )
            images.append(data)
        columns = [
            pa.array(images, pa.binary()) if field.name == "image" else block[field.name].combine_chunks()
            for field in self._schema
        ]
        path = block["_file"][0].as_py()
        with (self._folder / path).writing() as file:
            write_parquet(pa.table(columns, schema=self._schema), file)
        return _timed(pa.table({"file": [path], "rows": [len(ids)]}), began)


def write_parquet(table: pa.Table, file: pa.NativeFile) -> None:
    """A parquet file of one row group. Pictures are stored as they are: they do not compress any further."""
    small = [field.name for field in table.schema if field.name != "image"]
    leaves = [
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in table.schema
        if field.name != "image"
    ]
    pq.write_table(
        table,
        file,
        row_group_size=max(1, len(table)),
        compression=dict.fromkeys(leaves, "zstd") | ({"image": "NONE"} if "image" in table.column_names else {}),
        use_dictionary=leaves,
        write_statistics=small,
    )


# ------------------------------------------------------------------------------------------------------------ stream


def _timed(table: pa.Table, began: float) -> pa.Table:
    table = table.append_column("_began", pa.array([began] * len(table)))
    return table.append_column("_ended", pa.array([time.time()] * len(table)))


def _stream(
    blocks: list[pa.Table], worker: type, arguments: dict[str, Any], workers: int, timing: Timing
) -> Iterator[pa.Table]:
    """Each block through one of a pool of workers, as they get done.

    Raises:
        DataError: a worker raised one, or what it raised has a remedy.
    """
    if not blocks:
        return
    import ray.data

    dataset = ray.data.from_blocks(blocks)
    how: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "num_cpus": 1}
    if len(blocks) >= _LONG_STREAM * workers:
        pool = ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2)
        dataset = dataset.map_batches(worker, fn_constructor_kwargs=arguments, compute=pool, **how)
    else:
        tasks = ray.data.TaskPoolStrategy(size=workers)
        dataset = dataset.map_batches(_once, fn_kwargs={"worker": worker, "arguments": arguments}, compute=tasks, **how)
    try:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            timing.began = min(timing.began, table["_began"][0].as_py())
            timing.ended = max(timing.ended, table["_ended"][0].as_py())
            yield table
    except Exception as error:
        found = as_data_error(error)
        if found is None:
            raise
        raise found from error


def _once(block: pa.Table, worker: type, arguments: dict[str, Any]) -> pa.Table:
    """A block in a worker that is made for it."""
    return worker(**arguments)(block)


class _Progress:
    """Says how far a pass is, every few seconds."""

    def __init__(self, verb: str, total: int, say: Callable[[str], None], every_s: float = 10.0) -> None:
        self._verb, self._total, self._say, self._every_s = verb, total, say, every_s
        self._first: tuple[float, int] | None = None
        self._said = time.monotonic()

    def at(self, done: int) -> None:
        now = time.monotonic()
        self._first = self._first or (now, done)
        if now - self._said < self._every_s and done < self._total:
            return
        self._said = now
        elapsed, new = now - self._first[0], done - self._first[1]
        left = f", {new / elapsed:.0f}/s, {(self._total - done) * elapsed / new:.0f} s left" if elapsed and new else ""
        self._say(f"{self._verb} {done} of {self._total}{left}")
