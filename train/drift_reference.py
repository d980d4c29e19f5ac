"""What a detector's training pictures look like to it: the reference that its revision is watched for drift with.

In: a detector's checkpoint, and the prepared version that it was trained on. Out: ``drift.safetensors`` in the
checkpoint's folder, or where ``--output`` says: projected embeddings, margins and file facts of some hundred pictures,
and thresholds whose false alarms are counted on pictures held out (``deployments.drift_statistic`` says how). Pictures
are taken as they are in the version, in its proportions: what comes otherwise to the application is drift, even if the
detector copes with it.

The file is part of the checkpoint: with it the folder has another revision. Make it before the checkpoint is
registered. The same settings and pictures give the same file.

    python -m train.drift_reference --checkpoint ~/models/detector --data PREPARED/aivshuman
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from pydantic import Field

from data.errors import DataError
from data.versions import DataVersion, Split, open_version
from deployments.checkpoints import CheckpointError, resolve
from deployments.detector import DetectorModel
from deployments.drift_statistic import FILE, DriftSettings, Reference, make_reference, picture_statistics
from deployments.images import ADMITTED, Picture, decode
from deployments.views import render
from train.aivshuman import family


class DriftReferenceConfig(DriftSettings):
    """Make the reference of a detector."""

    checkpoint: str = Field(description="folder or URI of the detector")
    data: str = Field(description="prepared aivshuman NAME/VERSION, or NAME for its newest version")
    splits_used: list[Split] = Field(["train", "val"], description="splits whose pictures are looked at")
    pictures: int = Field(2000, ge=32, description="pictures looked at, at most, drawn by their hash")
    output: Path | None = Field(None, description="file that is written; unset: in the checkpoint's folder")
    batch_size: int = Field(8, ge=1)
    threads: int = Field(2, ge=1)


@dataclass(frozen=True)
class Observed:
    """What a detector was given and said of pictures, row by row."""

    embeddings: np.ndarray
    margins: np.ndarray
    statistics: np.ndarray

    def __getitem__(self, rows: Any) -> Observed:
        return Observed(self.embeddings[rows], self.margins[rows], self.statistics[rows])

    def __len__(self) -> int:
        return len(self.margins)


def observe(model: DetectorModel, pictures: Iterable[bytes], count: int, batch_size: int = 8) -> Observed:
    """Look at encoded pictures.

    Raises:
        CheckpointError: the detector has no last linear layer.
    """
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    views: list[np.ndarray] = []
    facts: list[np.ndarray] = []
    said, done = time.monotonic(), 0

    def look() -> None:
        logits, embeddings = model.outputs(np.stack(views))
        if embeddings is None:
            raise CheckpointError(
                f"{model.checkpoint.uri}: what its last layer reads cannot be had: no linear layer makes its logits, "
                "or its engine file was exported without it (python -m train.export)"
            )
        found.append((embeddings.astype(np.float32), model.margins(logits), np.stack(facts)))

    for data in pictures:
        picture: Picture = decode(data, ADMITTED)
        views.append(render(picture.image, model.views))
        facts.append(picture_statistics(picture, views[-1][0]))
        if len(views) == batch_size:
            look()
            done, views, facts = done + len(views), [], []
            if time.monotonic() - said > 10:
                said = time.monotonic()
                print(f"looked at {done}/{count} pictures", flush=True)
    if views:
        look()
    embeddings, margins, statistics = (np.concatenate(part) for part in zip(*found, strict=True))
    return Observed(embeddings, margins, statistics)


def read_pictures(
    version: DataVersion, splits: Sequence[Split], most: int
) -> tuple[list[dict[str, Any]], Iterator[bytes]]:
    """Pictures of a version, drawn by their hash: what is known of each, and their bytes in the same order."""
    rows = [
        {"split": split, "row": number} | row
        for split in splits
        for number, row in enumerate(version.table(split, ["id", "label", "source", "generator"]).to_pylist())
    ]
    chosen = {row["id"] for row in sorted(rows, key=lambda row: row["id"])[:most]}
    rows = [row for row in rows if row["id"] in chosen]

    def contents() -> Iterator[bytes]:
        for split in splits:
            for path in version.files(split):
                with pq.ParquetFile(path, filesystem=version.location.arrow_filesystem) as file:
                    for batch in file.iter_batches(64, columns=["id", "image"]):
                        for id_, image in zip(batch["id"].to_pylist(), batch["image"], strict=True):
                            if id_ in chosen:
                                yield image.as_py()

    return rows, contents()


def kind_of(row: dict[str, Any]) -> str:
    """``photo``, or the family of the picture's generator."""
    return "photo" if row["label"] == "human" else family(row["generator"] or "unknown")


def make(config: DriftReferenceConfig) -> tuple[Path, Reference]:
    """Make the reference and write its file.

    Raises:
        CheckpointError, DataError: there is no such checkpoint or version, or the pictures are too few.
    """
    checkpoint = resolve(config.checkpoint)
    if config.output is None and checkpoint.folder != Path(config.checkpoint).expanduser().absolute():
        raise CheckpointError(
            f"{config.checkpoint} is no folder of yours, and a fetched checkpoint is never changed: give --output"
        )
    torch.set_num_threads(config.threads)
    version = open_version(config.data)
    rows, contents = read_pictures(version, config.splits_used, config.pictures)
    observed = observe(DetectorModel(checkpoint), contents, len(rows), config.batch_size)
    facts = {
        "data": {"name": version.manifest.name, "version": version.manifest.version, "splits": config.splits_used},
        "kinds": dict(sorted(Counter(map(kind_of, rows)).items())),
    }
    settings = DriftSettings.model_validate(config.model_dump(include=set(DriftSettings.model_fields)))
    try:
        reference = make_reference(
            observed.embeddings, observed.margins, observed.statistics, settings, facts, lambda line: print(line)
        )
    except ValueError as error:
        raise DataError(str(error)) from error
    file = config.output or checkpoint.folder / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    reference.save(file)
    return file, reference


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    from pydantic_settings import CliApp

    try:
        file, reference = make(CliApp.run(DriftReferenceConfig, cli_args=arguments))
    except (CheckpointError, DataError) as error:
        sys.exit(f"error: {error}")
    told = reference.facts["bootstrap"]
    print(
        f"{file}: {len(reference.rows)} of {reference.facts['pictures']} pictures; {told['alarms']} false alarms in "
        f"{told['pictures']} undisturbed ones (bootstrap)"
    )


if __name__ == "__main__":
    main()
