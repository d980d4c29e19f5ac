"""Caption data in the Kaggle layout of Flickr30k, its text rules, its split by photo, and BLEU and CIDEr.

In: a folder with ``Images/`` and ``captions.txt`` (header ``image,caption``, one row a caption). Out: a
``CaptionedPhoto`` for each picture, in a fixed split. Knows no model.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "val", "test"]

_NOT_A_WORD = re.compile(r"[^a-z0-9' ]+")


@dataclass(frozen=True)
class CaptionedPhoto:
    """One photo and every caption that people wrote for it."""

    name: str
    captions: tuple[str, ...]


def normalise(caption: str, max_words: int = 30) -> str:
    """Lower case, no punctuation, single spaces, at most ``max_words`` words: the form that is learnt and scored."""
    text = _NOT_A_WORD.sub(" ", caption.lower().replace("-", " "))
    words = [word for word in (piece.strip("'") for piece in text.split()) if word and word != "s"]
    return " ".join(words[:max_words])


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
            if row["caption"] and normalise(row["caption"]):
                by_photo[row["image"]].append(row["caption"].strip())
    return [CaptionedPhoto(name, tuple(by_photo[name])) for name in sorted(by_photo) if (images / name).is_file()]


def split_photos(
    photos: Sequence[CaptionedPhoto], test: int = 1000, val: int = 500
) -> dict[Split, list[CaptionedPhoto]]:
    """Split by photo, independent of order and machine: the ``test`` smallest sha256 of the photo's number, then
    ``val``.

    The number is the file name up to the first underscore: Flickr8k appends a secret that Flickr30k leaves away,
    and the same photo must fall on the same side whichever of the two it comes from.
    """

    def key(photo: CaptionedPhoto) -> str:
        number = Path(photo.name).stem.split("_")[0]
        return hashlib.sha256(number.encode()).hexdigest()

    ordered = sorted(photos, key=key)
    return {"test": ordered[:test], "val": ordered[test : test + val], "train": ordered[test + val :]}


def score_captions(generated: Mapping[str, str], references: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """Corpus BLEU-1..4 and CIDEr of one generated caption a photo against its human captions.

    Tokenisation is ``normalise`` on both sides (lower case, punctuation dropped, split at spaces), not the PTB
    tokeniser of the COCO tools. Scorers: pycocoevalcap (Papineni et al. 2002; Vedantam et al. 2015).

    Raises:
        ValueError: the two do not name the same photos.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    if set(generated) != set(references):
        raise ValueError("generated captions and references are of different photos")
    hypotheses = {name: [normalise(text)] for name, text in generated.items()}
    truths = {name: [normalise(text) for text in texts] for name, texts in references.items()}
    bleu, _ = Bleu(4).compute_score(truths, hypotheses, verbose=0)
    cider, _ = Cider().compute_score(truths, hypotheses)
    return {f"bleu{order}": float(value) for order, value in enumerate(bleu, 1)} | {"cider": float(cider)}
