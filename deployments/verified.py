"""Verified items: pictures with what reviewers say of them, as a parquet file hands them from review to data.

The columns are the contract between ``python -m app.review export``, which writes such a file, and ``python -m
data.prepare --feedback``, which reads it. One row a picture, sorted by ``sha256``, in small row groups, so that
neither side ever holds more than one group of pictures. Knows no store and no data set.
"""

from __future__ import annotations

import pyarrow as pa

#: Rows of a row group: pictures that a reader has in memory at a time.
GROUP_ROWS = 64
LABELS = ("ai", "human")

SCHEMA = pa.schema(
    [
        pa.field("sha256", pa.string(), nullable=False),  # of `image`, hexadecimal; each once
        pa.field("image", pa.binary(), nullable=False),  # the file as it was uploaded
        pa.field("label", pa.string()),  # ai or human; null: not asked, or nobody could tell
        pa.field("captions", pa.list_(pa.string()), nullable=False),  # each reviewer's, those that differ; may be none
        pa.field("tags", pa.list_(pa.string())),  # null: reviewers did not agree on them
        pa.field("reviewers", pa.list_(pa.string()), nullable=False),  # at least one
        pa.field("verified_at", pa.timestamp("us", "UTC"), nullable=False),  # of the last of them
        pa.field("source", pa.string()),  # null: uploads of the application
        pa.field("generator", pa.string()),  # null: not known
    ]
)


class NotVerified(ValueError):
    """A file that is none of verified items; the message says what differs and what to do."""


def check_schema(found: pa.Schema, where: str) -> None:
    """
    Raises:
        NotVerified: columns are missing, are too many, or hold something else.
    """
    faults = [f"it lacks {field.name}" for field in SCHEMA if field.name not in found.names]
    faults += [f"it has {name}, which nobody reads" for name in found.names if name not in SCHEMA.names]
    faults += [
        f"{field.name} holds {found.field(field.name).type} instead of {field.type}"
        for field in SCHEMA
        if field.name in found.names and found.field(field.name).type != field.type
    ]
    if faults:
        raise NotVerified(
            f"{where} is no file of verified items: {'; '.join(faults)}. Make one with `python -m app.review export`"
        )
