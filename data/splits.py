"""Groups of near-duplicate pictures, and a split that keeps each group on one side.

In: pictures (for their perceptual hash), then ids, hashes and strata. Out: a group and a split for each id. Everything
follows from the content and the seed: the same pictures give the same split on any machine and in any order.

Knows no files, no labels' meaning and no Ray.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

_SIDE_PX = 32
_HASH_SIDE = 8
_HASH_BITS = _HASH_SIDE**2
#: Hashes compared with as many others at once: 1,024 x 1,024 of 8 bytes are 8 MiB.
_ROWS_AT_ONCE = 1024


@lru_cache(maxsize=1)
def _dct_rows() -> np.ndarray:
    """The first rows of the orthogonal DCT-II, float64 ``(8, 32)``: all that the hash keeps."""
    k, n = np.arange(_HASH_SIDE)[:, None], np.arange(_SIDE_PX)[None]
    rows = np.cos(np.pi * (2 * n + 1) * k / (2 * _SIDE_PX)) * np.sqrt(2 / _SIDE_PX)
    rows[0] /= np.sqrt(2)
    return rows


def perceptual_hash(image: Image.Image) -> int:
    """64-bit DCT hash (Zauner 2010, "pHash"): stays within a few bits under re-encoding and resizing.

    Luminance at 32 x 32, the 8 x 8 lowest DCT coefficients, one bit each: above their median or not.
    """
    small = image.convert("L").resize((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS)
    rows = _dct_rows()
    # of flat and symmetric pictures many coefficients are 0, but for the last digits, in which processors differ
    low = np.round((rows @ np.asarray(small, dtype=np.float64) @ rows.T).ravel(), 6)
    # the constant term is brightness, far above the others, and says nothing about the picture
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_duplicate_groups(hashes: Sequence[int], max_distance: int = 6) -> list[int]:
    """Group of each hash: the index of the first member. Pictures within ``max_distance`` bits are in one group, and so
    are theirs.

    Two hashes that differ in at most ``d`` bits agree in at least one of ``d + 1`` bands, so only those that share a
    band are compared (multi-index hashing, Norouzi et al. 2012).

    Raises:
        ValueError: ``max_distance`` is negative or above 15.
    """
    if not 0 <= max_distance <= 15:
        raise ValueError(f"max_distance must be 0 to 15 bits, got {max_distance}")
    values, inverse = np.unique(np.asarray(hashes, dtype=np.uint64), return_inverse=True)
    linked = DisjointSets(len(values))
    edges = np.linspace(0, _HASH_BITS, max_distance + 2).astype(int)
    for low, high in pairwise(edges):
        band = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=band[order][:1] - np.uint64(1))) if len(order) else order
        for bucket in np.split(order, starts[1:]):
            for first, second in _near_pairs(values, bucket, max_distance):
                linked.join(first, second)
    # hashes come sorted: the first member of a group is the one that stands first in the caller's order
    firsts: dict[int, int] = {}
    return [firsts.setdefault(linked.root(int(value)), index) for index, value in enumerate(inverse)]


def _near_pairs(values: np.ndarray, bucket: np.ndarray, max_distance: int) -> Iterator[tuple[int, int]]:
    """Pairs of a bucket within the distance, a bounded number of comparisons in memory at a time."""
    for start in range(0, len(bucket), _ROWS_AT_ONCE):
        rows = bucket[start : start + _ROWS_AT_ONCE]
        for other in range(start, len(bucket), _ROWS_AT_ONCE):
            columns = bucket[other : other + _ROWS_AT_ONCE]
            near = np.bitwise_count(values[rows][:, None] ^ values[columns][None]) <= max_distance
            for row, column in zip(*np.nonzero(near), strict=True):
                if rows[row] < columns[column]:
                    yield int(rows[row]), int(columns[column])


class DisjointSets:
    """Which of ``count`` things belong together, joined pair by pair; a set is named by its smallest member."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def root(self, index: int) -> int:
        """The smallest member of the set of ``index``."""
        while self._parent[index] != index:
            self._parent[index] = self._parent[self._parent[index]]
            index = self._parent[index]
        return index

    def join(self, first: int, second: int) -> None:
        """Make one set of two."""
        low, high = sorted((self.root(first), self.root(second)))
        self._parent[high] = low


def assign_splits(
    ids: Sequence[str],
    groups: Sequence[Hashable],
    strata: Sequence[Hashable],
    fractions: Mapping[str, float],
    seed: int = 0,
    pinned: Mapping[Any, str] | None = None,
) -> list[str]:
    """The split of each id. A group is never divided; each stratum is divided as ``fractions`` say, as nearly as its
    groups allow.

    Within a stratum, groups come in the order of ``sha256(seed, smallest id)``, each going to the split that is
    furthest behind its share.

    Args:
        ids: content hashes, unique.
        groups: which group each id belongs to (``near_duplicate_groups``).
        strata: what to balance by, e.g. ``(label, source, generator)``; a group counts for its smallest id's stratum.
        fractions: split -> share; they add up to 1.
        pinned: groups whose split is given. They take no part in the shares of the others.

    Raises:
        ValueError: lengths differ, ids repeat, or shares do not add up to 1.
    """
    pinned = pinned or {}
    if not len(ids) == len(groups) == len(strata):
        raise ValueError(f"{len(ids)} ids, {len(groups)} groups and {len(strata)} strata")
    if len(set(ids)) != len(ids):
        raise ValueError("ids repeat; drop exact duplicates first")
    if abs(sum(fractions.values()) - 1) > 1e-9 or min(fractions.values()) < 0:
        raise ValueError(f"shares must be positive and add up to 1, got {dict(fractions)}")

    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    by_stratum: dict[Hashable, list[tuple[bytes, list[int]]]] = defaultdict(list)
    splits = [""] * len(ids)
    for group, indices in members.items():
        if group in pinned:
            for index in indices:
                splits[index] = pinned[group]
            continue
        first = min(indices, key=lambda index: ids[index])
        order = hashlib.sha256(f"{seed}:{ids[first]}".encode()).digest()
        by_stratum[strata[first]].append((order, indices))

    for stratum_groups in by_stratum.values():
        filled = dict.fromkeys(fractions, 0)
        done = 0
        for _, indices in sorted(stratum_groups):
            done += len(indices)
            split = max(fractions, key=lambda name: fractions[name] * done - filled[name])
            filled[split] += len(indices)
            for index in indices:
                splits[index] = split
    return splits
