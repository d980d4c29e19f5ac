"""The stages of bulk annotation, each a step that Ray Data runs on one shard at a time.

    Reader -> DetectorStage -> CaptionerStage -> TaggerStage -> publish

In: a row of the plan. Out: a parquet file of records. Between two stages a shard is one block: a record (JSON) and the
views that a later model wants for each picture. The models are those that serve (``deployments``), with the same
batches whenever a shard is done again.

Knows no command line and does not know which shards there are.
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.annotate_plan import COLUMNS, Kind, parquet_file, shard_name
from data.annotations import FOLDER, to_table
from data.errors import DataError, as_data_error
from data.locations import Location
from deployments.annotation import Annotation, Provenance, Stage
from deployments.checkpoints import Checkpoint, resolve
from deployments.images import ImageError, ImageLimits, decode
from deployments.processor import COMPUTING
from deployments.provenance import read_provenance
from deployments.replica import NotFinite
from deployments.tagger import TaggerSettings
from deployments.views import ViewSpec, render

#: Files of a shard that are fetched ahead while one is decoded.
_AHEAD = 8
_HASH_CHUNK = 2**20

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class ModelName:
    """A checkpoint as the plan pins it."""

    uri: str
    revision: str

    def open(self) -> Checkpoint:
        """The checkpoint on this machine.

        Raises:
            DataError: the URI names another revision by now, or here.
        """
        checkpoint = resolve(self.uri)
        if checkpoint.revision != self.revision:
            raise DataError(
                f"{self.uri} is revision {checkpoint.revision} here and {self.revision} where the annotation was "
                "begun: name the model by a pinned version"
            )
        return checkpoint


class Reader:
    """A row of the plan -> its pictures: fetched, decoded, their provenance read, their views rendered.

    Each picture becomes one row, whatever is wrong with it: what cannot be read or decoded has an error in its record
    and blank views.
    """

    def __init__(self, place: Location, kind: Kind, limits: ImageLimits, views: dict[str, ViewSpec]) -> None:
        self._place, self._kind, self._limits, self._views = place, kind, limits, views

    def __call__(self, shard: pa.Table) -> Batch:
        row = shard.to_pylist()[0]
        size = row["pictures"]
        rows: Batch = {
            "shard": np.full(size, row["shard"], np.int64),
            "record": np.empty(size, object),
            "provenance": np.empty(size, object),
        }
        rows |= {stage: np.zeros((size, *spec.shape), np.uint8) for stage, spec in self._views.items()}
        found = self._files(row) if self._kind == "files" else self._parquet_rows(row)
        for index, (name, content) in enumerate(_ahead(found)):
            record, provenance = self._read(name, content, {stage: rows[stage][index] for stage in self._views})
            rows["record"][index] = record.model_dump_json()
            rows["provenance"][index] = provenance.model_dump_json() if provenance else ""
        return rows

    def _read(self, name: str, content: _Content, views: dict[str, np.ndarray]) -> tuple[Annotation, Provenance | None]:
        record = Annotation(id=name, sha256=content.sha256)
        if content.data is None:
            record.failed("decode", content.code, content.detail)
            return record, None
        started = time.perf_counter()
        try:
            picture = decode(content.data, self._limits)
        except ImageError as error:
            record.failed("decode", error.code, error.detail)
            return record, None
        provenance = read_provenance(content.data, picture.format)
        rendered = {spec: render(picture.image, spec) for spec in set(self._views.values())}
        for stage, spec in self._views.items():
            views[stage][:] = rendered[spec]
        record.timings_ms["decode"] = _milliseconds(started)
        return record, provenance

    def _files(self, row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for name in row["names"]:
            location = self._place / name
            yield name, lambda location=location: _fetch(location, self._place, self._limits.max_bytes)

    def _parquet_rows(self, row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        name, first = row["names"][0], row["first"]
        location = parquet_file(self._place, name)
        with location.open() as file:
            parquet = pq.ParquetFile(file)
            columns = COLUMNS & set(parquet.schema_arrow.names)
            table = parquet.read_row_group(row["row_group"], columns=sorted(columns)).slice(first, row["pictures"])
        number = sum(parquet.metadata.row_group(group).num_rows for group in range(row["row_group"])) + first
        for offset in range(table.num_rows):
            value = {column: table[column][offset].as_py() for column in columns}
            yield _identity(value, name, number + offset), lambda value=value: self._content(value, location.parent)

    def _content(self, row: dict[str, Any], folder: Location) -> _Content:
        image: Any = row.get("image")
        path: str | None = row.get("path")
        if isinstance(image, dict):  # as Hugging Face's datasets write pictures
            image, path = image.get("bytes"), image.get("path") or path
        if image is not None:
            return _Content(image, hashlib.sha256(image).hexdigest())
        if not path:
            return _Content.missing("the row has neither bytes nor a path")
        if "://" not in path and not path.startswith("/"):
            path = posixpath.normpath(path)
            if path.startswith(".."):
                return _Content.missing("its path leads out of the folder of the parquet file")
            return _fetch(folder / path, folder, self._limits.max_bytes)
        location = Location.of(path)
        return _fetch(location, location.parent, self._limits.max_bytes)


@dataclass(frozen=True)
class _Content:
    """A picture's bytes, or why there are none."""

    data: bytes | None
    sha256: str
    code: str = ""
    detail: str = ""

    @classmethod
    def missing(cls, detail: str) -> _Content:
        """There is nothing to hash but nothing."""
        return cls(None, hashlib.sha256().hexdigest(), "unreadable", detail)


def _fetch(location: Location, folder: Location, max_bytes: int) -> _Content:
    """A file's bytes. One that is too large is hashed and not kept.

    Raises:
        DataError: the whole folder is gone or does not answer, which is no fault of the picture.
    """
    try:
        with location.filesystem.open(location.path, "rb") as file:
            return _take(file, max_bytes)
    except (FileNotFoundError, IsADirectoryError):
        if not folder.exists():
            raise DataError(f"{folder} is not there any more: bring it back and run the same again") from None
        return _Content.missing("the file is not there any more")
    except PermissionError as error:
        if not location.is_local and as_data_error(error, str(location)) is None:
            raise
        return _Content.missing("access to the file is refused")
    except OSError as error:
        found = as_data_error(error, str(location))
        if found is not None:
            raise found from error
        return _Content.missing(f"the file cannot be read: {error.strerror or type(error).__name__}")


def _take(file: IO[bytes], max_bytes: int) -> _Content:
    data = file.read(max_bytes + 1)
    digest = hashlib.sha256(data)
    if len(data) <= max_bytes:
        return _Content(data, digest.hexdigest())
    size = len(data)
    while chunk := file.read(_HASH_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    detail = f"The file has {size} bytes; at most {max_bytes} are accepted."
    return _Content(None, digest.hexdigest(), "too_large", detail)


def _identity(row: dict[str, Any], file: str, number: int) -> str:
    """A row's own id, else its path, else where it stands."""
    for column in ("id", "path"):
        if row.get(column) is not None:
            return str(row[column])
    return f"{file}#{number}"


def _ahead(pictures: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, _Content]]:
    """Fetch a few pictures ahead of the one that is being decoded; in order."""
    with ThreadPoolExecutor(_AHEAD, thread_name_prefix="fetch") as threads:
        waiting: list[tuple[str, Any]] = []
        for name, fetch in pictures:
            waiting.append((name, threads.submit(fetch)))
            if len(waiting) > _AHEAD:
                first, future = waiting.pop(0)
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


class _ModelStage:
    """A stage whose model is loaded once in each actor.

    There are more actors than cores, so that no core is ever without work. A later stage goes first: what is begun is
    finished before more is begun. With equal shares the one process of the tagger would be left behind by those before
    it, and at last run alone, on one core of all.
    """

    stage: Stage
    #: Beyond the niceness of what computes: with 5 more it gets a third of the time, when there is not enough for both.
    yields: int

    def __init__(self) -> None:
        os.nice(COMPUTING + self.yields)

    @staticmethod
    def _records(batch: Batch) -> list[Annotation]:
        return [Annotation.model_validate_json(text) for text in batch["record"]]

    def _time(self, records: list[Annotation], started: float) -> None:
        """A batch's time, shared by its pictures."""
        for record in records:
            record.timings_ms[self.stage] = round(_milliseconds(started) / len(records), 1)

    @staticmethod
    def _done(batch: Batch, records: list[Annotation]) -> Batch:
        return batch | {"record": np.array([record.model_dump_json() for record in records], object)}


class _PictureStage(_ModelStage):
    """Detector or captioner: the model and the answers are the replica's own, without Serve around it."""

    def __init__(self, model: ModelName, batch_size: int, threads: int) -> None:
        super().__init__()
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._replica = self._replica_class()()
        self._model = self._replica.load(model.open())
        self._batch_size = batch_size

    def _replica_class(self) -> Any:
        raise NotImplementedError

    def enter(self, record: Annotation, answer: dict[str, Any], provenance: str) -> None:
        raise NotImplementedError

    def __call__(self, batch: Batch) -> Batch:
        records = self._records(batch)
        # what another stage could not answer is no matter of this one
        chosen = [i for i, record in enumerate(records) if all(error.stage != "decode" for error in record.errors)]
        batch = dict(batch)
        views = batch.pop(self.stage)
        for first in range(0, len(chosen), self._batch_size):
            part, started = chosen[first : first + self._batch_size], time.perf_counter()
            answers = self._replica.answers(self._model, views[part])
            for index, answer in zip(part, answers, strict=True):
                if isinstance(answer, NotFinite):
                    records[index].failed(self.stage, "failed", f"the model failed: {answer}")  # as serving says it
                else:
                    self.enter(records[index], answer, batch["provenance"][index])
            self._time([records[index] for index in part], started)
        return self._done(batch, records)


class DetectorStage(_PictureStage):
    """Shards with the detector's views -> shards with verdicts."""

    stage: Stage = "detector"
    yields = 10

    def _replica_class(self) -> Any:
        from deployments.detector import Detector

        return Detector

    def enter(self, record: Annotation, answer: dict[str, Any], provenance: str) -> None:
        record.detected(answer, Provenance.model_validate_json(provenance))


class CaptionerStage(_PictureStage):
    """Shards with the captioner's views -> shards with captions."""

    stage: Stage = "captioner"
    yields = 5

    def _replica_class(self) -> Any:
        from deployments.captioner import Captioner

        return Captioner

    def enter(self, record: Annotation, answer: dict[str, Any], provenance: str) -> None:
        record.captioned(answer)


class TaggerStage(_ModelStage):
    """Shards with captions -> shards with tags; vLLM lives in the actor's own process and ends with it."""

    stage: Stage = "tagger"
    yields = 0

    def __init__(self, model: ModelName, settings: TaggerSettings) -> None:
        super().__init__()
        from deployments.offline_tagger import OfflineTagger

        self._tagger = OfflineTagger(model.open(), settings, own_process=settings.device != "cpu")

    def __call__(self, batch: Batch) -> Batch:
        records, started = self._records(batch), time.perf_counter()
        captioned = [record for record in records if record.caption]
        if captioned:
            answers = self._tagger.tag([record.caption.text for record in captioned if record.caption])
            for record, answer in zip(captioned, answers, strict=True):
                record.tagged(answer)
            self._time(captioned, started)
        return self._done(batch, records)


class Publisher:
    """A finished shard -> its file, which appears complete or not at all; and what it holds, for the progress."""

    def __init__(self, output: Location) -> None:
        self._records = output / FOLDER

    def __call__(self, batch: Batch) -> Batch:
        records = [Annotation.model_validate_json(text) for text in batch["record"]]
        for record in records:
            record.timings_ms["total"] = round(sum(record.timings_ms.values()), 1)
        content = io.BytesIO()
        pq.write_table(to_table(records), content, compression="zstd")
        (self._records / shard_name(int(batch["shard"][0]))).write_bytes(content.getvalue())
        return {
            "shard": batch["shard"][:1],
            "pictures": np.array([len(records)]),
            "failed": np.array([sum(bool(record.errors) for record in records)]),
        }


def _milliseconds(since: float) -> float:
    return round((time.perf_counter() - since) * 1000, 1)
