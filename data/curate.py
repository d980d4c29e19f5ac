"""Which pictures stay, which belong together, and on which side of the split each falls.

In: rows of the raw lists with their particulars. Out: the pictures kept, each with its group and split, and rejects.
Everything follows from content, settings and seed. Knows no files and no Ray.

1. Files of the same bytes, or of the same pixels in other bytes: one stays. Same pixels under two labels: none does,
   one of the labels is wrong and nobody can tell which.
2. A group is what may not be divided: near-duplicates by perceptual hash, a real picture and its generated twin, the
   same photo by its number; and whatever is linked to these.
3. Splits are given by the shares, or pinned: by published lists, by the starter models' training, by where another
   corpus has the same photo. A group that pins tear apart keeps one side, and its members on another are rejected.
   Groups of verified pictures alone are divided by the shares, whatever gives the others theirs.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data.captions import photo_order
from data.identify import Particulars
from data.layouts import RawRow, Reject
from data.splits import DisjointSets, assign_splits, near_duplicate_groups
from data.versions import SPLITS, Split

#: Suffixes that are right for a format.
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "HEIC": (".heic", ".heif"),
}
#: The starter detector's own division, and the smallest side that it was trained on.
_STARTER_SHARES = {"train": 0.64, "val": 0.16, "test": 0.2}
_STARTER_MIN_SIDE_PX = 64
_STARTER_DISTANCE = 6
#: The starter captioner's own division, in photos.
_STARTER_TEST, _STARTER_VAL = 1000, 500
_TRAINED_FIRST: tuple[Split, ...] = ("train", "val", "test", "production")
_HELD_OUT_FIRST: tuple[Split, ...] = ("test", "val", "production", "train")


class SplitSettings(BaseModel):
    """How pictures are divided."""

    model_config = ConfigDict(extra="forbid")

    split: Literal["shares", "published", "starter"] = Field(
        "shares",
        description="`shares`: by the shares below; `published`: the lists of `--lists`; `starter`: as the starter "
        "models were trained, so that their training pictures never come into test",
    )
    production_share: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="held out first, for the simulator; 0.1 by default, with other splits than `shares` 0 (there it "
        "comes out of train for `published`, out of test for `starter`)",
    )
    test_share: float = Field(0.15, ge=0, lt=1, description="held out first, for evaluation")
    val_share: float = Field(0.2, ge=0, lt=1, description="of the rest; what is left is train")
    max_distance: int = Field(6, ge=0, le=15, description="bits of the perceptual hash in which near-duplicates differ")
    seed: int = Field(0, description="another seed is another split")

    @model_validator(mode="after")
    def _something_is_left(self) -> SplitSettings:
        if self.production + self.test_share >= 1:
            raise ValueError(
                "production_share and test_share leave nothing to train on: they must add up to less than 1"
            )
        return self

    @property
    def production(self) -> float:
        """The production share in force."""
        if self.production_share is not None:
            return self.production_share
        return 0.1 if self.split == "shares" else 0.0

    def shares(self) -> dict[str, float]:
        """Split -> share; they add up to 1."""
        rest = 1 - self.production - self.test_share
        return {
            "production": self.production,
            "test": self.test_share,
            "train": rest * (1 - self.val_share),
            "val": rest * self.val_share,
        }


@dataclass(frozen=True)
class Candidate:
    """A valid picture and the row that names it."""

    row: RawRow
    particulars: Particulars
    links: frozenset[str] = frozenset()
    """Pictures with a link in common are in one group."""
    verified: bool = False
    """It came back from reviewers and is in no raw list."""


@dataclass(frozen=True)
class Known:
    """A picture of another data set and the split it is in there."""

    id: str
    phash: str
    links: frozenset[str]
    split: Split


@dataclass(frozen=True)
class Curated:
    """A picture that stays."""

    row: RawRow
    particulars: Particulars
    group: str
    split: Split
    verified: bool = False


def remove_duplicates(candidates: Iterable[Candidate]) -> tuple[list[Candidate], list[Reject]]:
    """One candidate for each picture, in the order of ids, and the others."""
    same: dict[tuple[str, str, int, int], list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        what = candidate.particulars
        same[what.phash, what.pixels, what.width, what.height].append(candidate)
    kept: list[Candidate] = []
    rejects: list[Reject] = []
    for alike in same.values():
        alike.sort(key=_preference)
        first = alike[0]
        if len({candidate.row.label for candidate in alike}) > 1:
            names = ", ".join(f"{c.row.file_name} is {c.row.label}" for c in alike[:4])
            rejects += [_reject(c, "contradictory_labels", f"one picture, several labels: {names}") for c in alike]
            continue
        links = frozenset().union(*(_links(candidate) for candidate in alike))
        kept.append(Candidate(first.row, first.particulars, links, first.verified))
        for other in alike[1:]:
            if other.particulars.id == first.particulars.id:
                rejects.append(_reject(other, "duplicate", f"same bytes as {first.row.file_name}"))
            else:
                rejects.append(_reject(other, "duplicate_pixels", f"same pixels as {first.row.file_name}"))
    return sorted(kept, key=lambda candidate: candidate.particulars.id), rejects


def _preference(candidate: Candidate) -> tuple[bool, bool, int, str, str]:
    """Of several files of one picture, the one to keep: from a raw list, named as what it is, then the smallest."""
    what, name = candidate.particulars, candidate.row.file_name
    misnamed = PurePosixPath(name).suffix.lower() not in _SUFFIXES.get(what.format, ())
    return candidate.verified, misnamed, what.bytes, what.id, name


def _links(candidate: Candidate) -> frozenset[str]:
    row = candidate.row
    own = [f"twin:{row.twin}"] if row.twin else []
    own += [photo_link(row.photo)] if row.photo else []
    return candidate.links.union(own)


def photo_link(number: str) -> str:
    """The link between files of one Flickr photo."""
    return f"photo:{number}"


def _reject(candidate: Candidate, reason: str, detail: str) -> Reject:
    return Reject(candidate.row.file_name, reason, detail, candidate.particulars.id, candidate.row.label)


def divide(
    candidates: Sequence[Candidate],
    settings: SplitSettings,
    pins: Mapping[str, Split] | None = None,
    others: Sequence[Known] = (),
) -> tuple[list[Curated], list[Reject]]:
    """Group and split pictures.

    Args:
        candidates: as ``remove_duplicates`` returns them.
        settings: shares, distance and seed.
        pins: id -> split that lists or the starter models prescribe.
        others: pictures of other data sets, whose split goes before ``pins``.

    Returns:
        the pictures kept in the order of their ids, and members of groups torn apart by pins.
    """
    pins = pins or {}
    sets = _sets(candidates, others, settings.max_distance)
    members: dict[int, list[int]] = defaultdict(list)
    foreign: dict[int, set[Split]] = defaultdict(set)
    for index in range(len(candidates)):
        members[sets.root(index)].append(index)
    for offset, known in enumerate(others, len(candidates)):
        foreign[sets.root(offset)].add(known.split)

    order = _HELD_OUT_FIRST if settings.split == "published" else _TRAINED_FIRST
    chosen: dict[int, Split] = {}
    torn: dict[int, str] = {}
    for root, indices in members.items():
        own = {pins[candidates[i].particulars.id] for i in indices if candidates[i].particulars.id in pins}
        abroad = foreign.get(root, set())
        if len(abroad) > 1:
            sides = " and ".join(sorted(abroad))
            torn |= dict.fromkeys(indices, f"its group lies in {sides} of other data sets")
            continue
        if not own and not abroad:
            continue
        chosen[root] = next(iter(abroad)) if abroad else next(split for split in order if split in own)
        for index in indices:
            pin = pins.get(candidates[index].particulars.id)
            if pin not in (None, chosen[root]):
                torn[index] = f"it belongs to {pin}, its group to {chosen[root]}"

    kept = [index for index in range(len(candidates)) if index not in torn]
    roots = [sets.root(index) for index in kept]
    ids = [candidates[index].particulars.id for index in kept]
    splits = _assigned(candidates, kept, roots, settings, chosen)
    if settings.split != "shares" and settings.production:
        donor: Split = "train" if settings.split == "published" else "test"
        fixed = {root for root in roots if foreign.get(root)}
        fixed.update(root for root, index in zip(roots, kept, strict=True) if candidates[index].verified)
        splits = _with_production(ids, roots, splits, settings, donor, fixed)
    names: dict[int, str] = {}
    for root, id_ in zip(roots, ids, strict=True):
        names[root] = min(names.get(root, id_), id_)
    curated = [
        Curated(
            candidates[index].row,
            candidates[index].particulars,
            names[root],
            _as_split(split),
            candidates[index].verified,
        )
        for index, root, split in zip(kept, roots, splits, strict=True)
    ]
    return curated, [_reject(candidates[index], "torn_group", detail) for index, detail in sorted(torn.items())]


def _assigned(
    candidates: Sequence[Candidate],
    kept: Sequence[int],
    roots: Sequence[int],
    settings: SplitSettings,
    chosen: Mapping[int, Split],
) -> list[str]:
    """The split of each candidate of ``kept``, whose groups are ``roots``: first the raw ones as if there were no
    verified ones, which take no part in what that gives.
    """
    raw = {root for root, index in zip(roots, kept, strict=True) if not candidates[index].verified}
    by_id: dict[str, str] = {}
    for verified in (False, True):
        members = [(root, i) for root, i in zip(roots, kept, strict=True) if (root not in raw) == verified]
        shares = settings.shares() if verified or settings.split == "shares" else {"train": 1.0}
        ids = [candidates[index].particulars.id for _, index in members]
        strata = [stratum(candidates[index].row) for _, index in members]
        splits = assign_splits(ids, [root for root, _ in members], strata, shares, settings.seed, chosen)
        by_id |= zip(ids, splits, strict=True)
    return [by_id[candidates[index].particulars.id] for index in kept]


def _as_split(name: str) -> Split:
    return next(split for split in SPLITS if split == name)


def stratum(row: RawRow) -> tuple[str, str, str]:
    """What splits are balanced by."""
    return row.label or "", row.source, row.generator or "unknown"


def _sets(candidates: Sequence[Candidate], others: Sequence[Known], max_distance: int) -> DisjointSets:
    """Candidates first, then others: near in hash, the same bytes, or linked."""
    hashes = [int(c.particulars.phash, 16) for c in candidates] + [int(known.phash, 16) for known in others]
    links = [_links(c) | {c.particulars.id} for c in candidates] + [known.links | {known.id} for known in others]
    sets = DisjointSets(len(hashes))
    for index, first in enumerate(near_duplicate_groups(hashes, max_distance)):
        sets.join(index, first)
    first_with: dict[str, int] = {}
    for index, own in enumerate(links):
        for link in own:
            sets.join(index, first_with.setdefault(link, index))
    return sets


def _with_production(
    ids: Sequence[str],
    roots: Sequence[int],
    splits: list[str],
    settings: SplitSettings,
    donor: Split,
    fixed: set[int],
) -> list[str]:
    """Whole groups of ``donor`` moved to production until it has its share of all pictures."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, (root, split) in enumerate(zip(roots, splits, strict=True)):
        if split == donor and root not in fixed:
            groups[root].append(index)
    ordered = sorted(
        groups.values(),
        key=lambda indices: hashlib.sha256(
            f"{settings.seed}:production:{min(ids[i] for i in indices)}".encode()
        ).digest(),
    )
    wanted, moved = settings.production * len(ids), 0
    for indices in ordered:
        if moved >= wanted:
            break
        moved += len(indices)
        for index in indices:
            splits[index] = "production"
    return splits


def starter_detector_splits(candidates: Iterable[Candidate]) -> dict[str, Split]:
    """id -> the split that the starter detector was trained with: its own rule, computed again.

    Args:
        candidates: every valid picture, before duplicates are removed.
    """
    by_id: dict[str, Candidate] = {}
    labels: dict[str, set[str | None]] = defaultdict(set)
    for candidate in candidates:
        what = candidate.particulars
        if min(what.width, what.height) >= _STARTER_MIN_SIDE_PX:
            by_id.setdefault(what.id, candidate)
            labels[what.id].add(candidate.row.label)
    ids = sorted(id_ for id_ in by_id if len(labels[id_]) == 1)
    groups = near_duplicate_groups([int(by_id[id_].particulars.phash, 16) for id_ in ids], _STARTER_DISTANCE)
    splits = assign_splits(ids, groups, [stratum(by_id[id_].row) for id_ in ids], _STARTER_SHARES, seed=0)
    return {id_: _as_split(split) for id_, split in zip(ids, splits, strict=True)}


def starter_captioner_splits(rows: Iterable[RawRow]) -> dict[str, Split]:
    """Photo number -> the split that the starter captioner was trained with: the 1,000 smallest sha256 of the number
    are test, the next 500 validation.
    """
    numbers = [row.photo for row in rows if row.photo]
    ordered = sorted(numbers, key=photo_order)
    splits: dict[str, Split] = {}
    for place, number in enumerate(ordered):
        split: Split = "test" if place < _STARTER_TEST else "val" if place < _STARTER_TEST + _STARTER_VAL else "train"
        splits.setdefault(number, split)
    return splits
