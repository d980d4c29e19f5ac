"""Annotations as parquet: what bulk annotation writes and everybody else reads.

In: ``deployments.annotation.Annotation`` records. Out: the same as rows of a table whose nested columns are plain
structs and lists, so that pyarrow, DuckDB and pandas read them without this code; and back again.

Knows no model and does not know how the records came about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.locations import Location
from deployments.annotation import Annotation

#: Where the records lie below an annotation's folder.
FOLDER = "records"

_SIGNAL = pa.struct({"kind": pa.string(), "name": pa.string(), "value": pa.string(), "declares_ai": pa.bool_()})
_PROVENANCE = pa.struct({"c2pa": pa.string(), "declared_ai": pa.bool_(), "signals": pa.list_(_SIGNAL)})
_HEAT_MAP = pa.struct({"method": pa.string(), "grid": pa.list_(pa.list_(pa.float64())), "png": pa.string()})
_DETECTION = pa.struct(
    {"label": pa.string(), "ai_probability": pa.float64(), "provenance": _PROVENANCE, "heat_map": _HEAT_MAP}
)
_STAGES = ("decode", "detector", "captioner", "tagger")
_ERROR = pa.struct({"stage": pa.string(), "code": pa.string(), "detail": pa.string()})

#: One row a picture. `models` and `timings_ms`, mappings in the record, are structs of the keys that occur.
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "sha256": pa.string(),
        "detection": _DETECTION,
        "caption": pa.struct({"text": pa.string()}),
        "tags": pa.list_(pa.string()),
        "models": pa.struct(dict.fromkeys(("detector", "captioner", "tagger", "prompt"), pa.string())),
        "timings_ms": pa.struct(dict.fromkeys((*_STAGES, "total"), pa.float64())),
        "errors": pa.list_(_ERROR),
    }
)


def to_table(records: Sequence[Annotation]) -> pa.Table:
    """Records as rows, in their order."""
    return pa.Table.from_pylist([record.model_dump() for record in records], schema=SCHEMA)


def from_row(row: dict[str, Any]) -> Annotation:
    """The record that a row (``Table.to_pylist``) was made of."""
    mappings = {
        name: {key: value for key, value in (row[name] or {}).items() if value is not None}
        for name in ("models", "timings_ms")
    }
    return Annotation.model_validate(row | mappings)


def read_shard(location: Location, columns: list[str] | None = None) -> pa.Table:
    """One file of records.

    From memory: Arrow's threads may hold a Python file until after the interpreter is gone, and then abort the program.

    Raises:
        ArrowInvalid: it is damaged.
    """
    return pq.ParquetFile(pa.BufferReader(location.read_bytes())).read(columns=columns)


def read_annotations(place: str | Location) -> Iterator[Annotation]:
    """Every record of an annotation's folder, shard after shard.

    Raises:
        DataError: the place cannot be read.
    """
    records = Location.of(place) / FOLDER
    for entry in records.files():
        if entry.name.endswith(".parquet"):
            yield from map(from_row, read_shard(records / entry.name).to_pylist())
