"""Caption data in the Kaggle layout of Flickr30k, and its split by photo; text rules and scores are those of
``data.captions``.

In: a folder with ``Images/`` and ``captions.txt`` (header ``image,caption``, one row a caption). Out: a
``CaptionedPhoto`` for each picture, in a fixed split. Knows no model.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.captions import clean_caption, photo_number, photo_order

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class CaptionedPhoto:
    """One photo and every caption that people wrote for it."""

    name: str
    captions: tuple[str, ...]


def read_captions(folder: Path) -> list[CaptionedPhoto]:
    """All photos of a data set in the Kaggle layout that have a caption and a file, sorted by name.

    Raises:
        FileNotFoundError: no ``captions.txt`` or no ``Images`` in the folder.
        ValueError: the header is not ``image,caption``.
    """
    listing, images = folder / "captions.txt", folder / "Images"
    for needed in (listing, images):
        if not needed.exists():
            raise FileNotFoundError(f"{needed} is missing: expected the Kaggle layout, captions.txt beside Images/")
    by_photo: dict[str, list[str]] = defaultdict(list)
    with listing.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or not {"image", "caption"} <= set(reader.fieldnames):
            raise ValueError(f"{listing}: expected the columns image,caption, found {reader.fieldnames}")
        for row in reader:
            if row["caption"] and clean_caption(row["caption"]):
                by_photo[row["image"]].append(row["caption"].strip())
    return [CaptionedPhoto(name, tuple(by_photo[name])) for name in sorted(by_photo) if (images / name).is_file()]


def split_photos(
    photos: Sequence[CaptionedPhoto], test: int = 1000, val: int = 500
) -> dict[Split, list[CaptionedPhoto]]:
    """Split by photo, independent of order and machine: the ``test`` smallest sha256 of the photo's number, then
    ``val``.
    """
    ordered = sorted(photos, key=lambda photo: photo_order(photo_number(photo.name)))
    return {"test": ordered[:test], "val": ordered[test : test + val], "train": ordered[test + val :]}
