"""Rules for captions: the cleaned form of one, how well one agrees with people's, the number that names a photo.

In: captions as somebody wrote them, a file name. Out: the text that is learnt and scored, BLEU and CIDEr, the number.
Knows no files and no model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

_NOT_A_WORD = re.compile(r"[^a-z0-9' ]+")


def clean_caption(caption: str, max_words: int = 30) -> str:
    """Lower case, no punctuation, single spaces, at most ``max_words`` words."""
    text = _NOT_A_WORD.sub(" ", caption.lower().replace("-", " "))
    words = [word for word in (piece.strip("'") for piece in text.split()) if word and word != "s"]
    return " ".join(words[:max_words])


def photo_number(file_name: str) -> str:
    """The number by which Flickr names a photo: the file name up to the first underscore.

    Flickr8k appends a secret that Flickr30k leaves away (``1000268201_693b08cb0e.jpg`` is ``1000268201.jpg``): the same
    photo has the same number in both.
    """
    return PurePosixPath(file_name).stem.split("_")[0]


def photo_order(number: str) -> str:
    """What photos are sorted by before they are split: the same on any machine, and for a photo in either corpus."""
    return hashlib.sha256(number.encode()).hexdigest()


def score_captions(generated: Mapping[str, str], references: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """Corpus BLEU-1..4 and CIDEr of one generated caption a photo against its human captions.

    Tokenisation is ``clean_caption`` on both sides (lower case, punctuation dropped, split at spaces), not the PTB
    tokeniser of the COCO tools. Scorers: pycocoevalcap (Papineni et al. 2002; Vedantam et al. 2015).

    Raises:
        ValueError: the two do not name the same photos.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    if set(generated) != set(references):
        raise ValueError("generated captions and references are of different photos")
    hypotheses = {name: [clean_caption(text)] for name, text in generated.items()}
    truths = {name: [clean_caption(text) for text in texts] for name, texts in references.items()}
    bleu, _ = Bleu(4).compute_score(truths, hypotheses, verbose=0)
    cider, _ = Cider().compute_score(truths, hypotheses)
    return {f"bleu{order}": float(value) for order, value in enumerate(bleu, 1)} | {"cider": float(cider)}
