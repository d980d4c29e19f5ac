"""Rules for captions: the cleaned form of one, and the number that names a photo.

In: a caption as somebody wrote it, a file name. Out: the text that is learnt and scored, the number. Knows no files and
no model.
"""

from __future__ import annotations

import re
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
