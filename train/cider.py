"""CIDEr of single captions, fast enough to be a reward: the n-gram statistics of the references are computed once.

In: the cleaned human captions of every training photo. Out: for a photo and a caption, CIDEr-D (Vedantam et al. 2015;
the same formula as pycocoevalcap's, times 10, sigma 6) with document frequencies over the training photos, and, where
captions are there to find pictures, less what it scores against the captions of photos that are like it (CIDErBtw;
Wang, Xu, Wang, Chan, ECCV 2020). Knows no model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ORDERS, _SIGMA = 4, 6.0
#: No cleaned caption holds such a word.
_END = "</s>"
Vector = list[dict[tuple[str, ...], float]]


class CiderReward:
    """Scores captions against the references of a photo.

    Args:
        with_ends: the end of a caption counts as a word. Without it nothing is lost by ending in "in a", which most
            photos have somewhere, and what is rewarded learns to.
        distinct: how much of the mean score against the references of ``like`` photos is taken away. At 0 what is
            rewarded is what can be said of most pictures, and captions become alike.
        like: how many photos, those whose references are most like its own.
    """

    def __init__(
        self, references: Sequence[Sequence[str]], with_ends: bool = False, distinct: float = 0.0, like: int = 5
    ) -> None:
        self._with_ends = with_ends
        counted = [[self._counted(text) for text in texts] for texts in references]
        frequency: Counter[tuple[str, ...]] = Counter()
        for texts in counted:
            frequency.update({gram for grams in texts for gram in grams})
        photos = math.log(max(2, len(references)))
        self._rarity = {gram: photos - math.log(count) for gram, count in frequency.items()}
        self._unknown = photos
        self._references = [[self._vector(grams) for grams in texts] for texts in counted]
        self._distinct = distinct
        self._like = self.alike(like) if distinct else []

    def _counted(self, text: str, has_ended: bool = True) -> Counter[tuple[str, ...]]:
        return _ngrams([*text.split(), *([_END] if self._with_ends and has_ended else [])])

    def _vector(self, grams: Counter[tuple[str, ...]]) -> tuple[Vector, list[float], int]:
        vector: Vector = [{} for _ in range(_ORDERS)]
        for gram, count in grams.items():
            vector[len(gram) - 1][gram] = count * self._rarity.get(gram, self._unknown)
        norms = [math.sqrt(sum(value * value for value in part.values())) for part in vector]
        # pycocoevalcap measures length in bigrams
        return vector, norms, sum(count for gram, count in grams.items() if len(gram) == 2)

    def __call__(self, photo: int, caption: str, has_ended: bool = True) -> float:
        """Score of a caption; ``has_ended``: and it was not cut off at the longest that may be written."""
        vector = self._vector(self._counted(caption, has_ended))
        score = self._score(vector, photo)
        if self._distinct and (others := self._like[photo]):
            score -= self._distinct * sum(self._score(vector, other) for other in others) / len(others)
        return score

    def alike(self, count: int) -> list[list[int]]:
        """For each photo, ``count`` others whose references are most like its own, the most like first: by the cosine
        of their n-grams' weights, every order and reference alike.
        """
        from scipy.sparse import csr_matrix

        columns: dict[tuple[str, ...], int] = {}
        rows, places, values = [], [], []
        for row, texts in enumerate(self._references):
            for vector, norms, _ in texts:
                for part, norm in zip(vector, norms, strict=True):
                    for gram, value in part.items():
                        rows.append(row)
                        places.append(columns.setdefault(gram, len(columns)))
                        values.append(value / (norm or 1.0))
        size = len(self._references)
        weights = csr_matrix((values, (rows, places)), shape=(size, max(1, len(columns))), dtype=np.float32)
        lengths = np.sqrt(np.asarray(weights.multiply(weights).sum(axis=1)))
        weights = csr_matrix(weights.multiply(1 / np.maximum(lengths, 1e-12)))
        count = min(count, size - 1)
        found: list[list[int]] = []
        for first in range(0, size, 512):  # a block's likeness to all others at a time
            block = (weights[first : first + 512] @ weights.T).toarray()
            block[np.arange(len(block)), first + np.arange(len(block))] = -1.0
            found.extend(np.argsort(-block, axis=1, kind="stable")[:, :count].tolist())
        return found

    def _score(self, caption: tuple[Vector, list[float], int], photo: int) -> float:
        own, norms, length = caption
        total = 0.0
        for other, other_norms, other_length in self._references[photo]:
            closeness = math.exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))
            for order in range(_ORDERS):
                if norms[order] and other_norms[order]:
                    theirs = other[order]
                    product = sum(
                        min(value, theirs[gram]) * theirs[gram] for gram, value in own[order].items() if gram in theirs
                    )
                    total += product / (norms[order] * other_norms[order]) * closeness
        return 10.0 * total / _ORDERS / max(1, len(self._references[photo]))


def _ngrams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[first : first + order])
        for order in range(1, _ORDERS + 1)
        for first in range(len(words) - order + 1)
    )
