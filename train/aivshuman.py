"""Labelled pictures of the AI-vs-Human layout: a folder with ``train.csv``, the pictures it names and, if known,
``sources.csv``.

In: the folder. Out: pictures that decode, once each, with label, source, generator, group and split, and the rows left
out with the reason. The layout is the Kaggle data set's (``file_name``, ``label`` 0 human or 1 AI); ``sources.csv``
(``file_name``, ``source``, ``generator``) is optional.

Knows no model; ``data.splits`` decides about groups and splits.
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.splits import assign_splits, near_duplicate_groups, perceptual_hash

#: Shares of the split. One fifth is never trained on; validation sets temperature and thresholds.
FRACTIONS = {"train": 0.64, "val": 0.16, "test": 0.2}
#: Below this short side a picture holds too little to tell anything from.
MIN_SIDE_PX = 64
#: Names that mean the same generator in the data set that is used here; one must not be "unseen" while the other is
#: trained on.
_SAME_GENERATOR = {
    "Stable Diffusion 1.x (2022)": "stable-diffusion-1.x",
    "stable-diffusion-1.4": "stable-diffusion-1.x",
}


@dataclass(frozen=True)
class LabelledPicture:
    """One picture of the data set."""

    id: str
    path: Path
    label: int
    source: str
    generator: str
    group: int
    split: str


@dataclass(frozen=True)
class Reject:
    """A row that was left out."""

    file_name: str
    reason: str


def family(generator: str) -> str:
    """A generator's name with its near relatives'."""
    return _SAME_GENERATOR.get(generator, generator)


def open_rgb(path: Path) -> Image.Image:
    """The decoded picture as RGB.

    Raises:
        OSError: missing, truncated, or not a picture.
    """
    with Image.open(path) as image:
        return image.convert("RGB")


def read_pictures(folder: Path, seed: int = 0) -> tuple[list[LabelledPicture], list[Reject]]:
    """All usable pictures in the order of their ids, and the rows left out.

    Left out: files that are missing or do not decode, pictures below ``MIN_SIDE_PX``, bytes that occur with both
    labels, and repeated bytes.
    """
    origin: dict[str, tuple[str, str]] = {}
    if (folder / "sources.csv").is_file():
        with (folder / "sources.csv").open(newline="") as file:
            origin = {row["file_name"]: (row["source"], row["generator"]) for row in csv.DictReader(file)}
    with (folder / "train.csv").open(newline="") as file:
        rows = [(row["file_name"], int(row["label"])) for row in csv.DictReader(file)]

    rejects: list[Reject] = []
    found: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, set[int]] = {}
    for name, label in rows:
        try:
            image = open_rgb(folder / name)
        except (OSError, SyntaxError) as error:  # Pillow reports some damaged PNGs as SyntaxError
            rejects.append(Reject(name, f"unreadable: {type(error).__name__}"))
            continue
        if min(image.size) < MIN_SIDE_PX:
            rejects.append(Reject(name, f"too small: {image.width}x{image.height}"))
            continue
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        labels.setdefault(digest, set()).add(label)
        if digest in found:
            rejects.append(Reject(name, "repeated bytes"))
            continue
        found[digest] = (name, label, perceptual_hash(image))
    for digest in [digest for digest, seen in labels.items() if len(seen) > 1]:
        rejects.append(Reject(found.pop(digest)[0], "contradictory labels"))

    ids = sorted(found)
    groups = near_duplicate_groups([found[id_][2] for id_ in ids])
    origins = [origin.get(found[id_][0], ("unknown", "photo" if found[id_][1] == 0 else "unknown")) for id_ in ids]
    strata = [(found[id_][1], *origin_) for id_, origin_ in zip(ids, origins, strict=True)]
    splits = assign_splits(ids, groups, strata, FRACTIONS, seed)
    pictures = [
        LabelledPicture(id_, folder / found[id_][0], found[id_][1], source, generator, group, split)
        for id_, (source, generator), group, split in zip(ids, origins, groups, splits, strict=True)
    ]
    return pictures, rejects


def dataset_version(pictures: list[LabelledPicture]) -> str:
    """Twelve hexadecimal digits over content, labels and split: same data, same version."""
    lines = sorted(f"{picture.id} {picture.label} {picture.split}" for picture in pictures)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
