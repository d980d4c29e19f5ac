"""Verified items of reviewers as rows of a data set: ``python -m data.prepare ... --feedback FILE``.

In: parquet files as ``deployments.verified`` describes them, and the raw data that they go beside. Out: a row for each
item that says what this data set learns (a label; captions), and a reader for the pictures of both. Of several files
the last one that has a picture counts.

**Where they fall.** An older version is never changed, and no group of its changes sides: with feedback, the newest
version made without this feedback is looked at as if it had been named with ``--with-version``. So whatever is near to
a picture that it holds out (val, test, production) is held out too and never trained on. Groups of verified pictures
alone, which no older version has, are divided by the shares, whatever ``--split`` says of the raw data.

Knows no store, no reviewer and no Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data.captions import clean_caption
from data.errors import DataError, explained
from data.layouts import RawRow
from data.locations import Location
from data.passes import Pictures
from data.publish import digest
from deployments.verified import LABELS, NotVerified, check_schema

_FOLDER = "verified/"
_DEFAULT_SOURCE = "review"


@dataclass(frozen=True)
class Feedback:
    """Verified items that a data set can use."""

    rows: list[RawRow]
    items: int
    """Pictures in the files; those that say nothing that this data set learns are no rows."""
    places: dict[str, tuple[Location, int, int]]
    """File name of a row -> file, row group, and row in it."""

    @property
    def digest(self) -> str:
        """Hash of what is said; where the files lie and who reviewed does not count."""
        said = [[row.file_name, row.source, row.generator, row.label, row.captions] for row in self.rows]
        return digest(sorted(said, key=lambda row: str(row[0])))[:16]


@dataclass(frozen=True)
class WithFeedback:
    """A reader of raw pictures and verified ones, each by its file name."""

    raw: Pictures
    places: dict[str, tuple[Location, int, int]]

    @property
    def location(self) -> Location:
        return self.raw.location

    def read_all(self, names: Sequence[str]) -> Iterator[tuple[str, bytes | None]]:
        raw = self.raw.read_all([name for name in names if name not in self.places])
        for name in names:
            if name in self.places:
                file, group, row = self.places[name]
                yield name, _images(file, group)[row].as_py()
            else:
                yield next(raw)


def read_feedback(places: Sequence[str], learns: Literal["label", "captions"]) -> Feedback:
    """The items of all files, by sha256.

    Raises:
        DataError: a file is not there, or is none of verified items.
    """
    rows: dict[str, RawRow] = {}
    where: dict[str, tuple[Location, int, int]] = {}
    items: set[str] = set()
    for place in places:
        file = Location.of(place)
        if not file.is_file():
            raise DataError(f"{file} does not exist: give a file of `python -m app.review export` as --feedback")
        for sha256, at, row in _rows_of(file, learns):
            items.add(sha256)
            name = f"{_FOLDER}{sha256}"
            rows.pop(name, None)
            if row.label if learns == "label" else row.captions:
                rows[name], where[name] = row, at
    return Feedback([rows[name] for name in sorted(rows)], len(items), {name: where[name] for name in rows})


def _rows_of(file: Location, learns: str) -> Iterator[tuple[str, tuple[Location, int, int], RawRow]]:
    seen: set[str] = set()
    with explained(str(file)), _opened(file) as parquet:
        try:
            check_schema(parquet.schema_arrow, str(file))
        except NotVerified as error:
            raise DataError(str(error)) from None
        for group in range(parquet.num_row_groups):
            columns = ["sha256", "label", "captions", "source", "generator"]
            for number, row in enumerate(parquet.read_row_group(group, columns).to_pylist()):
                sha256, label = row["sha256"], row["label"]
                if label not in (None, *LABELS):
                    raise DataError(f"{file}: label {label!r} of {sha256} is none of {', '.join(LABELS)}: export again")
                if sha256 in seen:
                    raise DataError(f"{file} has {sha256} twice: export again")
                seen.add(sha256)
                generator = row["generator"] or ("photo" if label == "human" else None)
                raw = RawRow(f"{_FOLDER}{sha256}", row["source"] or _DEFAULT_SOURCE, generator)
                if learns == "label":
                    raw = replace(raw, label=label)
                else:
                    raw = replace(raw, captions=tuple(text for text in row["captions"] or () if clean_caption(text)))
                yield sha256, (file, group, number), raw


def _opened(file: Location) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file.path, filesystem=file.arrow_filesystem)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{file} is no parquet file ({str(error)[:200]}): give one of `python -m app.review export` as --feedback"
        ) from error


@lru_cache(maxsize=2)
def _images(file: Location, group: int) -> pa.ChunkedArray:
    with explained(str(file)), _opened(file) as parquet:
        return parquet.read_row_group(group, ["image"])["image"]
