"""What a model is evaluated on: the test split of a prepared data set, or of a raw folder in a Kaggle layout.

In: a place: ``NAME/VERSION`` of ``data.prepare`` (local or ``s3://``), a folder with ``train.csv``, or one with
``captions.txt``. Raw folders are split by the fixed rules of ``train.aivshuman`` and ``train.captions``, so figures on
them stay comparable with earlier ones. Out: examples whose pictures are read one after another. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, get_args

from data.errors import DataError
from data.versions import MANIFEST, DatasetName, DataVersion, open_version
from train.gate import Judged


@dataclass(frozen=True)
class Example:
    """One picture and what is known about it; ``read`` gives the file's bytes."""

    id: str
    file_name: str
    read: Callable[[], bytes] = field(compare=False, repr=False)
    label: str | None = None
    captions: tuple[str, ...] = ()
    source: str = "unknown"
    generator: str | None = None
    group: str = ""


@dataclass(frozen=True)
class ExampleSet:
    """The test examples of a data set version."""

    name: str
    version: str
    uri: str
    examples: list[Example]
    prepared: DataVersion | None = None
    """The version that they are of; None: they are of a raw folder."""

    def header(self) -> dict[str, Any]:
        """For the report."""
        return {"name": self.name, "version": self.version, "uri": self.uri, "split": "test"}

    def beside(self, dataset: Mapping[str, Any]) -> DataVersion | None:
        """The version that a card's ``dataset`` names, if it lies beside the one of the examples."""
        name, version = dataset.get("name"), dataset.get("version")
        if self.prepared is None or name not in get_args(DatasetName) or not version:
            return None
        place = self.prepared.location.parent.parent / str(name) / str(version)
        return open_version(place) if (place / MANIFEST).exists() else None

    def keeps_sides_of(self, dataset: Mapping[str, Any]) -> bool:
        """Whether no example can be a picture that training on the version of a card's ``dataset`` saw: the examples
        are its own test split, or were divided with it."""
        name, version = dataset.get("name"), dataset.get("version")
        divided_with = self.prepared.manifest.settings.get("with_version", []) if self.prepared else []
        return version == self.version or f"{name}/{version}" in divided_with


def read_examples(place: str, kind: Judged, limit: int | None = None) -> ExampleSet:
    """The test examples at a place, the first ``limit`` by id (of captions in the Kaggle layout: of the fixed split).

    Raises:
        DataError: nothing is there, it has no test pictures, pictures of one class only, or it is data for the other
            kind of model.
    """
    folder = Path(place).expanduser()
    if (folder / "train.csv").is_file():
        found = _raw_pictures(folder)
    elif (folder / "captions.txt").is_file():
        found = _raw_captions(folder)
    else:
        found = _prepared(open_version(place), limit)
    if not found.examples:
        raise DataError(f"{place} has no test pictures: prepare it with a share for test")
    if kind == "detector" and any(example.label not in ("human", "ai") for example in found.examples):
        raise DataError(f"{place} is not labelled human and ai: a detector is evaluated on the aivshuman data set")
    if kind != "detector" and not all(example.captions for example in found.examples):
        raise DataError(f"{place} has no captions: a {kind} is evaluated on the flickr30k data set")
    found = replace(found, examples=found.examples[:limit])
    if kind == "detector" and len(labels := {str(example.label) for example in found.examples}) < 2:
        raise DataError(
            f"the {len(found.examples)} test pictures of {place} are all {labels.pop()}: a detector is judged on both "
            "classes; prepare it with a larger share for test, or raise --limit"
        )
    return found


def _prepared(version: DataVersion, limit: int | None) -> ExampleSet:
    columns = ["id", "file_name", "source", "generator", "group"]
    columns.append("captions" if version.manifest.name == "flickr30k" else "label")
    examples = []
    # of all files together: each picture's reader lives as long as its example
    images = lru_cache(maxsize=1)(partial(_images, version))
    for path in version.files("test"):
        rows = _Rows(version, path, images)
        for number, row in enumerate(rows.table(columns).to_pylist()):
            examples.append(
                Example(
                    row["id"],
                    row["file_name"],
                    rows.reader(number),
                    row.get("label"),
                    tuple(row.get("captions") or ()),
                    row["source"],
                    row["generator"],
                    row["group"],
                )
            )
    # chosen by id, but left in the order of the files: pictures are then read from one row group after another
    chosen = {example.id for example in sorted(examples, key=lambda example: example.id)[:limit]}
    kept = [example for example in examples if example.id in chosen]
    return ExampleSet(version.manifest.name, version.manifest.version, str(version.location), kept, version)


def _open(version: DataVersion, path: str) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, filesystem=version.location.arrow_filesystem)


def _images(version: DataVersion, path: str, group: int) -> Any:
    with _open(version, path) as file:
        return file.read_row_group(group, columns=["image"]).column("image")


class _Rows:
    """One parquet file; ``images`` gives the pictures of a file's row group, and keeps those asked for last."""

    def __init__(self, version: DataVersion, path: str, images: Callable[[str, int], Any]) -> None:
        self._version, self._path, self._images = version, path, images
        self._starts: list[int] | None = None

    def table(self, columns: list[str]) -> Any:
        with _open(self._version, self._path) as file:
            self._starts = [0]
            for group in range(file.num_row_groups):
                self._starts.append(self._starts[-1] + file.metadata.row_group(group).num_rows)
            return file.read(columns=columns)

    def reader(self, number: int) -> Callable[[], bytes]:
        def read() -> bytes:
            assert self._starts is not None
            group = max(place for place, start in enumerate(self._starts[:-1]) if start <= number)
            return self._images(self._path, group)[number - self._starts[group]].as_py()

        return read


def _raw_pictures(folder: Path) -> ExampleSet:
    from train.aivshuman import dataset_version, read_pictures

    pictures, _ = read_pictures(folder)
    examples = [
        Example(
            picture.id,
            picture.path.name,
            picture.path.read_bytes,
            "ai" if picture.label else "human",
            (),
            picture.source,
            picture.generator if picture.label else "photo",
            str(picture.group),
        )
        for picture in pictures
        if picture.split == "test"
    ]
    return ExampleSet(folder.name, dataset_version(pictures), str(folder), examples)


def _raw_captions(folder: Path) -> ExampleSet:
    from train.captions import read_captions, split_photos

    photos = read_captions(folder)
    examples = [
        Example(photo.name, photo.name, (folder / "Images" / photo.name).read_bytes, captions=photo.captions)
        for photo in split_photos(photos)["test"]
    ]
    return ExampleSet(folder.name, f"{len(photos)} photos, fixed split", str(folder), examples)


def batches(examples: list[Example], size: int) -> Iterator[list[Example]]:
    """The examples in groups of ``size``."""
    for first in range(0, len(examples), size):
        yield examples[first : first + size]
