"""Verified items into a parquet file: ``python -m app.review export``.

In: items on which reviewers agree, the places of pictures. Out: a file as ``deployments.verified`` describes it, which
appears whole. A picture's bytes are checked against their hash. Knows no review tool and no data set.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from app.review.label_studio import ReviewError
from app.store.reviews import Verified
from deployments.verified import GROUP_ROWS, SCHEMA


def export(
    items: Sequence[Verified],
    read: Callable[[str], bytes | None],
    output: Path,
    source: str | None,
    generator: str | None,
) -> tuple[int, int]:
    """Write items, sorted by sha256; how many, and how many pictures were not where they should be.

    Args:
        read: a picture's bytes by its hash; None: it is not there.
        source: what all of them come from.
        generator: what made those that are AI, where that is known.

    Raises:
        ReviewError: the file cannot be written.
    """
    missing = 0
    part = output.with_name(f".{output.name}.{secrets.token_hex(4)}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(part, SCHEMA, compression="zstd") as writer:
            for group in _groups(sorted(items, key=lambda item: item.sha256)):
                rows = []
                for item in group:
                    data = read(item.sha256)
                    if data is None or hashlib.sha256(data).hexdigest() != item.sha256:
                        missing += 1
                        continue
                    rows.append(_row(item, data, source, generator))
                if rows:
                    writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
        part.replace(output)
    except OSError as error:
        raise ReviewError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return len(items) - missing, missing


def _groups(items: Sequence[Verified]) -> Iterator[Sequence[Verified]]:
    for start in range(0, len(items), GROUP_ROWS):
        yield items[start : start + GROUP_ROWS]


def _row(item: Verified, data: bytes, source: str | None, generator: str | None) -> dict[str, Any]:
    return {
        "sha256": item.sha256,
        "image": data,
        "label": item.verdict,
        "captions": list(item.captions),
        "tags": None if item.tags is None else list(item.tags),
        "reviewers": list(item.reviewers),
        "verified_at": item.at,
        "source": source,
        "generator": generator if item.verdict == "ai" else None,
    }
