"""The source data set's raw material: pictures of two prepared versions, read out of their shards.

In: a version of aivshuman and one of flickr30k. Out: candidates with label ``stock`` or ``platform``, the split that
each has already, and a reader for the pictures. Knows nothing of how they are divided.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from data.captions import photo_number
from data.curate import Candidate, Curated, photo_link
from data.errors import explained
from data.identify import Particulars
from data.layouts import RawRow, Reject
from data.locations import Location
from data.versions import SPLITS, DataVersion, Split

_COLUMNS = [
    *("id", "file_name", "width", "height", "format", "mode", "bytes", "jpeg_quality", "quantisation", "declared"),
    *("phash", "source", "generator", "group"),
]


@dataclass(frozen=True)
class VersionPictures:
    """Pictures in shards, named ``FILE#ROW`` with the file's whole path. Rows asked for in the order in which they lie
    cost one reading of each shard.
    """

    location: Location

    def read_all(self, names: Sequence[str]) -> Iterator[tuple[str, bytes | None]]:
        for name in names:
            path, row = name.rsplit("#", 1)
            yield name, _images(Location(self.location.scheme, path))[int(row)].as_py()


@lru_cache(maxsize=4)
def _images(file: Location) -> pa.ChunkedArray:
    with explained(str(file)):
        return pq.read_table(file.path, columns=["image"], filesystem=file.arrow_filesystem, partitioning=None)["image"]


@dataclass(frozen=True)
class Merged:
    """Candidates of both, by id where they lie, and which split they are in."""

    candidates: list[Candidate]
    pins: dict[str, Split]
    names: dict[str, str]


def merge(stock: DataVersion, platform: DataVersion) -> Merged:
    """Human pictures of ``stock`` and all of ``platform``."""
    merged = Merged([], {}, {})
    for version, label in ((stock, "stock"), (platform, "platform")):
        name = version.manifest.name
        for split in SPLITS:
            for path in version.files(split):
                columns = [*_COLUMNS, "label"] if name == "aivshuman" else _COLUMNS
                with explained(path):
                    table = pq.read_table(
                        path, columns=columns, filesystem=version.location.arrow_filesystem, partitioning=None
                    )
                for row_number, row in enumerate(table.to_pylist()):
                    if row.get("label", "human") != "human":
                        continue
                    links = {f"group:{name}:{row.pop('group')}"}
                    if name == "flickr30k":
                        links.add(photo_link(photo_number(row["file_name"])))
                    raw = RawRow(f"{name}/{row.pop('file_name')}", row.pop("source"), row.pop("generator"), label)
                    row.pop("label", None)
                    # equal pixels in other bytes were looked for when the version was made
                    particulars = Particulars(**row, pixels=row["id"])
                    merged.candidates.append(Candidate(raw, particulars, frozenset(links)))
                    merged.pins[particulars.id] = split
                    merged.names[particulars.id] = f"{path}#{row_number}"
    return merged


def balanced(pictures: Sequence[Curated], seed: int) -> tuple[list[Curated], list[Reject]]:
    """In each split as many of each label as the rarest has there, chosen by a hash of the id; the others."""
    sides: dict[Split, dict[str | None, list[Curated]]] = defaultdict(lambda: defaultdict(list))
    for picture in pictures:
        sides[picture.split][picture.row.label].append(picture)
    kept, rejects = [], []
    for split, by_label in sides.items():
        limit = min(len(members) for members in by_label.values()) if len(by_label) > 1 else 0
        for label, members in by_label.items():
            members.sort(key=lambda p: hashlib.sha256(f"{seed}:balance:{p.particulars.id}".encode()).digest())
            kept += members[:limit]
            detail = f"{split} has fewer of the other label"
            rejects += [Reject(p.row.file_name, "balance", detail, p.particulars.id, label) for p in members[limit:]]
    return sorted(kept, key=lambda picture: picture.particulars.id), rejects
