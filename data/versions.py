"""A prepared data set: the folder ``NAME/VERSION/`` that ``data.prepare`` publishes and everybody else reads.

In: the place of a version. Out: its manifest, and its splits as pyarrow tables or Ray datasets. A version is finished
when it has a ``manifest.json``, and consists of the files that the manifest lists and no others:

    aivshuman/0f3a9c27b1de/
      train/00000.parquet ...   val/...   test/...   production/...
      rejects/00000.parquet     what was left out, with the reason
      manifest.json

``test`` is for evaluation alone; ``production`` is what the simulator sends to a running application. Knows nothing of
how a version was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.errors import DataError, explained
from data.locations import Location

if TYPE_CHECKING:
    import ray.data

Split = Literal["train", "val", "test", "production"]
SPLITS: tuple[Split, ...] = get_args(Split)
DatasetName = Literal["aivshuman", "flickr30k", "source"]
MANIFEST = "manifest.json"
#: Of the layout described here; a reader refuses any other.
LAYOUT = 1

_PICTURE = [
    pa.field("id", pa.string(), nullable=False),  # sha256 of the bytes, hexadecimal
    pa.field("image", pa.binary(), nullable=False),  # the file as it was found
    pa.field("file_name", pa.string(), nullable=False),  # relative to the input, with /
    pa.field("width", pa.int32(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("format", pa.string(), nullable=False),  # by content: JPEG, PNG, WEBP, GIF, TIFF, AVIF, HEIC
    pa.field("mode", pa.string(), nullable=False),  # Pillow's, as stored: RGB, L, CMYK, P, ...
    pa.field("bytes", pa.int64(), nullable=False),
    pa.field("jpeg_quality", pa.int32()),  # libjpeg's scale, estimated from the tables; null for other formats
    pa.field("quantisation", pa.string()),  # hash of the JPEG tables; null for other formats
    pa.field("declared", pa.list_(pa.string()), nullable=False),  # traces of origin, "exif:Make=Canon"
    pa.field("phash", pa.string(), nullable=False),  # 64-bit perceptual hash, 16 hexadecimal digits
    pa.field("source", pa.string(), nullable=False),
    pa.field("generator", pa.string()),  # "photo" for real pictures, null when not known
    pa.field("group", pa.string(), nullable=False),  # smallest id of its near-duplicates, twins and same photos
    pa.field("split", pa.string(), nullable=False),
]
_LABEL = [pa.field("label", pa.string(), nullable=False)]  # human or ai; stock or platform
_CAPTIONS = [
    pa.field("captions", pa.list_(pa.string()), nullable=False),  # cleaned
    pa.field("raw_captions", pa.list_(pa.string()), nullable=False),  # as written, same order
]
SCHEMAS: dict[DatasetName, pa.Schema] = {
    "aivshuman": pa.schema(_PICTURE + _LABEL),
    "flickr30k": pa.schema(_PICTURE + _CAPTIONS),
    "source": pa.schema(_PICTURE + _LABEL),
}
REJECTS = pa.schema(
    [
        pa.field("file_name", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),  # a short code
        pa.field("detail", pa.string(), nullable=False),
        pa.field("id", pa.string()),
        pa.field("label", pa.string()),
    ]
)


class Check(BaseModel):
    """One validation rule and what came of it."""

    passed: bool
    detail: str


class Manifest(BaseModel):
    """What ``manifest.json`` says of a version."""

    model_config = ConfigDict(extra="forbid")

    layout: int = LAYOUT
    name: DatasetName
    version: str = Field(description="12 hexadecimal digits: hash of content and settings")
    created_at: str = Field(description="UTC, ISO 8601")
    settings: dict[str, Any] = Field(description="what the version depends on besides the input's content")
    seed: int
    input: str = Field(description="where the raw data lay")
    input_fingerprint: str = Field(
        description="hash of the input's listing (names, sizes, times of change), of the "
        "settings, and of layout and revision of the program"
    )
    input_rows: int = Field(description="rows of the raw lists, and verified items; each is in a split or in rejects")
    counts: dict[str, int] = Field(description="pictures of each split")
    image_bytes: dict[str, int] = Field(description="bytes of the pictures of each split")
    class_balance: dict[str, dict[str, int]] = Field(description="split -> label -> pictures; empty without labels")
    captions: dict[str, int] = Field(description="captions of each split; empty without captions")
    sources: dict[str, int] = Field(description="source -> pictures")
    verified: dict[str, int] = Field(
        default_factory=dict,
        description="split -> how many of its pictures came back from reviewers; empty: none asked",
    )
    generators: dict[str, int] = Field(description="generator -> pictures; `unknown` for null")
    groups: dict[str, int] = Field(description="`groups`, `larger_than_one`, `largest`")
    rejects: dict[str, int] = Field(description="reason -> rows")
    checks: dict[str, Check]
    files: dict[str, list[str]] = Field(description="split or `rejects` -> parquet files, relative to the version")


@dataclass(frozen=True)
class DataVersion:
    """A finished version."""

    location: Location
    manifest: Manifest

    @property
    def schema(self) -> pa.Schema:
        return SCHEMAS[self.manifest.name]

    def files(self, split: str) -> list[str]:
        """Paths of a split's parquet files (or of ``rejects``) as ``location.filesystem`` takes them, in order.

        Raises:
            DataError: there is no such split.
        """
        if split not in (*SPLITS, "rejects"):
            raise DataError(f"{split!r} is no split: choose one of {', '.join(SPLITS)}, or rejects")
        return [(self.location / name).path for name in self.manifest.files.get(split, [])]

    def table(self, split: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of a split in memory; name the columns unless the pictures themselves are wanted."""
        schema = REJECTS if split == "rejects" else self.schema
        wanted = pa.schema([schema.field(name) for name in columns]) if columns is not None else schema
        with explained(str(self.location)):
            tables = [
                pq.read_table(path, columns=wanted.names, filesystem=self.location.arrow_filesystem, partitioning=None)
                for path in self.files(split)
            ]
        return pa.concat_tables(tables).cast(wanted) if tables else wanted.empty_table()

    def read(self, split: str, columns: Sequence[str] | None = None) -> ray.data.Dataset:
        """A split as a streaming Ray dataset, in the order of its files when execution preserves order.

        Raises:
            DataError: the split is empty.
        """
        import ray.data

        files = self.files(split)
        if not files:
            raise DataError(f"split {split} of {self.location} is empty: prepare it with a share for {split}")
        dataset = ray.data.read_parquet(files, filesystem=self.location.arrow_filesystem, partitioning=None)
        return dataset if columns is None else dataset.select_columns(list(columns))


def open_version(place: str | Path | Location) -> DataVersion:
    """The version at a place: ``NAME/VERSION``, or ``NAME`` for the one made last.

    Raises:
        DataError: there is none, it is unfinished, or another layout.
    """
    location = Location.of(place)
    if not (location / MANIFEST).exists():
        found = versions(location)
        if not found:
            raise DataError(
                f"{location} is no prepared data set: it has no {MANIFEST}; make one with `python -m data.prepare`"
            )
        return found[-1]
    return _opened(location)


def versions(place: str | Path | Location) -> list[DataVersion]:
    """Every finished version of the folder ``NAME``, the newest last."""
    location = Location.of(place)
    found = [_opened(location / name) for name in location.folders() if (location / name / MANIFEST).exists()]
    return sorted(found, key=lambda version: (version.manifest.created_at, version.manifest.version))


def _opened(location: Location) -> DataVersion:
    try:
        manifest = Manifest.model_validate_json((location / MANIFEST).read_bytes())
    except ValidationError as error:
        raise DataError(
            f"{location / MANIFEST} is not one of this program's: prepare the version again ({error})"
        ) from error
    if manifest.layout != LAYOUT:
        raise DataError(f"{location} has layout {manifest.layout}, this program reads {LAYOUT}: prepare it again")
    return DataVersion(location, manifest)
