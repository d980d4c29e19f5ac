"""The plan of a bulk annotation: which pictures, in which shards, by which models; fixed when it is first started.

In: a folder of pictures or of parquet files, local or on S3. Out: ``plan.parquet`` (one row a shard) and ``plan.json``
(what must not change between two starts), and after a restart what is left to do. A shard is what is done as a whole
or not at all: its pictures are always batched in the same way, and it becomes one file of a name of its own.

Knows no model and starts no Ray.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.annotations import FOLDER
from data.errors import DataError, explained
from data.locations import FileEntry, Location

Kind = Literal["files", "parquet"]

#: Endings of the formats that are decoded (deployments.images), lower case.
PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"),
)

PLAN, SHARDS, MANIFEST = "plan.json", "plan.parquet", "manifest.json"
_SHARD_FILE = re.compile(r"(\d{8})\.parquet")
#: Stands in a name for bytes that are no UTF-8, which neither a plan nor a record can hold.
_NO_TEXT = re.compile("[\udc80-\udcff]")

#: A shard: `names` are pictures (kind `files`) or one parquet file, of which `rows` rows from `first` in `row_group`.
_SCHEMA = pa.schema(
    {
        "shard": pa.int64(),
        "pictures": pa.int64(),
        "names": pa.list_(pa.string()),
        "sizes": pa.list_(pa.int64()),
        "row_group": pa.int64(),
        "first": pa.int64(),
    }
)
_SHARDS_A_ROW_GROUP = 1024
_SMALLEST_SHARD, _LARGEST_SHARD, _SHARDS_OF_A_SMALL_FOLDER = 8, 64, 64
#: Columns of a parquet file that are read: a picture's bytes or where it lies, and its name.
COLUMNS = frozenset({"id", "image", "path"})
#: Bytes that may be read of a row group, which is read whole for each of its shards.
_LARGEST_ROW_GROUP = 2**30
#: Names that a message tells of many.
_NAMES_SHOWN = 5


class Plan(BaseModel):
    """What two starts of one annotation have in common; anything else may differ (actors, threads, machines)."""

    model_config = ConfigDict(extra="forbid")

    input: str
    kind: Kind
    input_digest: str = Field(description="of names, sizes and tags of everything that is read")
    pictures: int
    shards: int
    shard_pictures: int
    settings: dict[str, Any] = Field(description="what the records depend on: models, tasks, limits, batches")
    created_at: str


@dataclass(frozen=True)
class Listing:
    """What an input holds: what is read of it, and how many other files there are."""

    kind: Kind
    entries: list[FileEntry]
    others: int

    @property
    def digest(self) -> str:
        """Changes when a file comes, goes or changes."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(f"{entry.name}\0{entry.size}\0{entry.tag}\n".encode())
        return digest.hexdigest()[:32]


def list_input(place: Location, kind: Kind | None = None, suffixes: Sequence[str] = PICTURE_SUFFIXES) -> Listing:
    """Pictures or parquet files below a place.

    Raises:
        DataError: it is not there, is empty, holds both and ``kind`` does not say which, or has names that are no text.
    """
    if _NO_TEXT.search(place.path):
        raise DataError(f"{os.fsencode(place.path)!r} is not UTF-8: rename what it names")
    if place.is_file():
        if not place.name.lower().endswith(".parquet"):
            raise DataError(f"{place} is a file: --input takes a folder of pictures, an s3:// prefix, or parquet")
        entries = [entry for entry in place.parent.files() if entry.name == place.name]
        return Listing(kind="parquet", entries=entries, others=0)
    if place.is_local and not place.is_dir():
        raise DataError(f"{place} does not exist: --input takes a folder of pictures, an s3:// prefix, or parquet")
    entries = place.files()
    if any(entry.name == MANIFEST for entry in entries) and any("/" in entry.name for entry in entries):
        raise DataError(f"{place} is a prepared version: name one of its splits, for instance {place / 'production'}")
    wanted = tuple(suffix.lower() for suffix in suffixes)
    found: dict[Kind, list[FileEntry]] = {"files": [], "parquet": []}
    for entry in entries:
        name = entry.name.rsplit("/", 1)[-1].lower()
        if name.startswith("."):
            continue
        if name.endswith(".parquet"):
            found["parquet"].append(entry)
        elif name.endswith(wanted):
            found["files"].append(entry)
    if kind is None:
        if found["files"] and found["parquet"]:
            raise DataError(f"{place} holds pictures and parquet files: say which with --kind files or --kind parquet")
        kind = "parquet" if found["parquet"] else "files"
    if not found[kind]:
        what = "parquet file" if kind == "parquet" else f"picture ({', '.join(wanted)})"
        raise DataError(f"there is no {what} in {place}, only {len(entries)} other files: check --input and --suffixes")
    if strange := [repr(os.fsencode(entry.name)) for entry in found[kind] if _NO_TEXT.search(entry.name)]:
        shown = ", ".join(strange[:_NAMES_SHOWN]) + (", ..." if len(strange) > _NAMES_SHOWN else "")
        raise DataError(
            f"{len(strange)} of {len(found[kind])} names in {place} are not UTF-8 ({shown}): rename these files"
        )
    return Listing(kind=kind, entries=found[kind], others=len(entries) - len(found[kind]))


def shard_size(pictures: int) -> int:
    """Pictures of a shard unless somebody says: few enough that a small folder keeps every core busy and a kill costs
    little, enough that an archive does not become millions of files.
    """
    return min(_LARGEST_SHARD, max(_SMALLEST_SHARD, -(-pictures // _SHARDS_OF_A_SMALL_FOLDER)))


def _file_shards(listing: Listing, shard_pictures: int) -> Iterator[dict[str, Any]]:
    for first in range(0, len(listing.entries), shard_pictures):
        part = listing.entries[first : first + shard_pictures]
        names, sizes = [entry.name for entry in part], [entry.size for entry in part]
        yield {"pictures": len(part), "names": names, "sizes": sizes, "row_group": 0, "first": 0}


def _row_groups(place: Location, listing: Listing) -> list[tuple[FileEntry, list[int]]]:
    """Each parquet file with the number of rows of its row groups."""
    groups = []
    for entry in listing.entries:
        location = parquet_file(place, entry.name)
        with explained(str(location)), location.open() as file:
            try:
                metadata = pq.ParquetFile(file).metadata
            except pa.ArrowInvalid as error:
                raise DataError(f"{location} is not a parquet file ({error}): remove it or write it again") from error
        columns = set(metadata.schema.to_arrow_schema().names)
        if not columns & {"image", "path"}:
            raise DataError(
                f"{location} has neither a column `image` (bytes) nor `path`, only {', '.join(sorted(columns))}"
            )
        found = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        if (largest := max(map(_bytes_read, found), default=0)) > _LARGEST_ROW_GROUP:
            raise DataError(
                f"{location} has a row group of {largest / 2**30:.1f} GiB, which each of its shards would read whole "
                f"(at most {_LARGEST_ROW_GROUP / 2**30:g} GiB): write it again with row_group_size={_LARGEST_SHARD}"
            )
        groups.append((entry, [group.num_rows for group in found]))
    return groups


def _bytes_read(group: pq.RowGroupMetaData) -> int:
    """Size of what is read of a row group, uncompressed."""
    chunks = (group.column(index) for index in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in COLUMNS)


def _parquet_shards(groups: list[tuple[FileEntry, list[int]]], shard_pictures: int) -> Iterator[dict[str, Any]]:
    """Row groups, cut into equal pieces where they are larger than a shard."""
    for entry, counts in groups:
        for group, rows in enumerate(counts):
            pieces = max(1, -(-rows // shard_pictures))
            borders = [rows * piece // pieces for piece in range(pieces + 1)]
            for first, end in itertools.pairwise(borders):
                if end > first:
                    yield {
                        "pictures": end - first,
                        "names": [entry.name],
                        "sizes": [entry.size],
                        "row_group": group,
                        "first": first,
                    }


def parquet_file(place: Location, name: str) -> Location:
    """Where a file of the input lies: below the folder, or the input itself."""
    return place if place.name == name and not place.is_dir() else place / name


def shard_name(shard: int) -> str:
    """File name of a shard below ``records/``."""
    return f"{shard:08}.parquet"


def open_plan(
    output: Location, place: Location, listing: Listing, shard_pictures: int | None, settings: dict[str, Any]
) -> Plan:
    """The plan that lies in ``output``, or a new one written there.

    Raises:
        DataError: ``output`` holds something else, was begun with another input or other settings, or the input has
            changed since.
    """
    held = _read_plan(output)
    if held is None:
        return _write_plan(output, place, listing, shard_pictures, settings)
    anew = "choose another --output, or remove this one to begin anew"
    if held.input != str(place) or held.kind != listing.kind:
        raise DataError(f"{output} holds the annotation of {held.input} ({held.kind}): {anew}")
    wanted = {"shard_pictures": shard_pictures or held.shard_pictures} | settings
    begun = {"shard_pictures": held.shard_pictures} | held.settings
    if different := [name for name in wanted if wanted[name] != begun.get(name)]:
        changes = "; ".join(f"{name} was {begun.get(name)}, is {wanted[name]}" for name in different)
        raise DataError(f"{output} was begun with other settings ({changes}): use the old ones, or {anew}")
    if held.input_digest != listing.digest:
        raise DataError(
            f"{place} has changed since its annotation was begun on {held.created_at} ({len(listing.entries)} files "
            f"now): restore it to finish, or {anew}"
        )
    return held


def _read_plan(output: Location) -> Plan | None:
    file = output / PLAN
    try:
        text = file.read_text()
    except (FileNotFoundError, NotADirectoryError):
        if output.is_file():
            raise DataError(f"{output} is a file: --output takes a folder") from None
        # a first start that was killed may have left the list of shards, or a part of it or of the plan
        strangers = [e.name for e in output.files() if not e.name.startswith((SHARDS, PLAN))] if output.is_dir() else []
        if strangers:
            raise DataError(
                f"{output} is not empty ({strangers[0]}) and holds no annotation: choose another --output"
            ) from None
        return None
    try:
        return Plan.model_validate_json(text)
    except ValidationError as error:
        raise DataError(f"{file} is damaged or of another version: remove {output} to begin anew ({error})") from error


def _write_plan(
    output: Location, place: Location, listing: Listing, shard_pictures: int | None, settings: dict[str, Any]
) -> Plan:
    if listing.kind == "files":
        shard_pictures = shard_pictures or shard_size(len(listing.entries))
        shards = _file_shards(listing, shard_pictures)
    else:
        groups = _row_groups(place, listing)
        shard_pictures = shard_pictures or shard_size(sum(sum(counts) for _, counts in groups))
        shards = _parquet_shards(groups, shard_pictures)
    content, pictures, count = io.BytesIO(), 0, 0
    with pq.ParquetWriter(content, _SCHEMA, compression="zstd") as writer:
        waiting: list[dict[str, Any]] = []
        for count, shard in enumerate(shards, 1):
            waiting.append({"shard": count - 1} | shard)
            pictures += shard["pictures"]
            if len(waiting) == _SHARDS_A_ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(waiting, schema=_SCHEMA))
                waiting.clear()
        if waiting:
            writer.write_table(pa.Table.from_pylist(waiting, schema=_SCHEMA))
    if not pictures:
        raise DataError(f"the parquet files of {place} have no rows: check --input")
    plan = Plan(
        input=str(place),
        kind=listing.kind,
        input_digest=listing.digest,
        pictures=pictures,
        shards=count,
        shard_pictures=shard_pictures,
        settings=settings,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    (output / SHARDS).write_bytes(content.getvalue())
    (output / PLAN).write_text(plan.model_dump_json(indent=1) + "\n")  # last: with it the plan holds
    return plan


def finished_shards(output: Location) -> set[int]:
    """Shards whose file is there; a file appears complete or not at all."""
    records = output / FOLDER
    if not records.is_dir():
        return set()
    matches = (_SHARD_FILE.fullmatch(entry.name) for entry in records.files())
    return {int(match[1]) for match in matches if match}


def remove_partial_files(output: Location) -> None:
    """Remove what killed writers left; readers of a whole folder would stumble over it."""
    records = output / FOLDER
    if records.is_dir():
        for entry in records.files():
            if not _SHARD_FILE.fullmatch(entry.name):
                (records / entry.name).remove()


def unfinished(output: Location, done: set[int], at_most: int) -> Iterator[pa.Table]:
    """What is left to do, in tables of at most ``at_most`` shards, one row each."""
    parquet = pq.ParquetFile(pa.BufferReader((output / SHARDS).read_bytes()))
    for batch in parquet.iter_batches(batch_size=at_most):
        left = [index for index, shard in enumerate(batch.column("shard").to_pylist()) if shard not in done]
        if left:
            yield pa.Table.from_batches([batch]).take(left)
