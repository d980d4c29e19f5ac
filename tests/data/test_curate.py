"""Duplicates, groups and splits: one picture stays of each, no group is divided, pins are kept."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest
from pydantic import ValidationError

from data.curate import (
    Candidate,
    Curated,
    Known,
    SplitSettings,
    divide,
    remove_duplicates,
    starter_captioner_splits,
)
from data.identify import Particulars
from data.layouts import RawRow
from data.splits import near_duplicate_groups


def candidate(
    name: str,
    label: str | None = "human",
    phash: int | None = None,
    pixels: str | None = None,
    twin: str | None = None,
    photo: str | None = None,
    content: str | None = None,
    size: int = 1000,
) -> Candidate:
    id_ = hashlib.sha256((content or name).encode()).hexdigest()
    value = int(id_[:16], 16) if phash is None else phash
    what = Particulars(id_, 64, 48, "JPEG", "RGB", size, 90, "q", [], f"{value:016x}", pixels or id_[:8])
    return Candidate(RawRow(name, "source", "photo" if label == "human" else "g", label, twin=twin, photo=photo), what)


def far(number: int) -> int:
    """A hash that is near no other number's."""
    return int(hashlib.sha256(str(number).encode()).hexdigest()[:16], 16)


def by_name(pictures: Sequence[Curated]) -> dict[str, Curated]:
    return {picture.row.file_name: picture for picture in pictures}


def test_of_equal_pictures_one_stays() -> None:
    kept, rejects = remove_duplicates(
        [
            candidate("b.jpg", content="same"),
            candidate("a.jpg", content="same"),
            candidate("wrong.png", content="p1", phash=5, pixels="p", size=10),
            candidate("large.jpg", content="p2", phash=5, pixels="p", size=900),
            candidate("small.jpg", content="p3", phash=5, pixels="p", size=800),
            candidate("alone.jpg", content="p4", phash=5, pixels="other"),
        ]
    )
    assert {c.row.file_name for c in kept} == {"a.jpg", "small.jpg", "alone.jpg"}
    assert {(r.file_name, r.reason) for r in rejects} == {
        ("b.jpg", "duplicate"),
        ("wrong.png", "duplicate_pixels"),
        ("large.jpg", "duplicate_pixels"),
    }
    assert [c.particulars.id for c in kept] == sorted(c.particulars.id for c in kept)


def test_one_picture_under_two_labels_goes_altogether() -> None:
    kept, rejects = remove_duplicates(
        [
            candidate("a.jpg", "human", content="same", phash=7, pixels="p"),
            candidate("b.jpg", "ai", content="same", phash=7, pixels="p"),
            candidate("c.jpg", "human", content="re-encoded", phash=7, pixels="p"),
            candidate("d.jpg", "human"),
        ]
    )
    assert [c.row.file_name for c in kept] == ["d.jpg"]
    assert {r.reason for r in rejects} == {"contradictory_labels"}
    assert len(rejects) == 3


def test_a_rejected_duplicate_hands_its_twin_on() -> None:
    kept, _ = remove_duplicates(
        [
            candidate("a.jpg", content="same"),
            candidate("b.jpg", content="same", twin="1"),
            candidate("c.jpg", "ai", twin="1"),
        ]
    )
    pictures, _ = divide(kept, SplitSettings())
    assert by_name(pictures)["a.jpg"].group == by_name(pictures)["c.jpg"].group


def test_groups_are_near_duplicates_twins_and_photos_and_what_these_link() -> None:
    pictures, _ = divide(
        [
            candidate("a.jpg", phash=0),
            candidate("b.jpg", phash=0b111111),
            candidate("c.jpg", "ai", phash=0b111111111111, twin="1"),
            candidate("d.jpg", "human", phash=1 << 60 | 0xFFFF << 20, twin="1", photo="7"),
            candidate("e.jpg", photo="7"),
            candidate("f.jpg", photo="8"),
        ],
        SplitSettings(),
    )
    found = by_name(pictures)
    together = [found[f"{name}.jpg"] for name in "abcde"]
    assert {p.group for p in together} == {min(p.particulars.id for p in together)}
    assert found["f.jpg"].group == found["f.jpg"].particulars.id
    assert len({p.split for p in together}) == 1


def test_no_pair_is_near_across_splits_whatever_the_pictures() -> None:
    generator = random.Random(3)
    hashes = [generator.getrandbits(64) for _ in range(150)]
    for _ in range(250):
        value = generator.choice(hashes)
        for bit in generator.sample(range(64), generator.randint(0, 7)):
            value ^= 1 << bit
        hashes.append(value)
    candidates = [candidate(f"{n}.jpg", ("human", "ai")[n % 2], phash=value) for n, value in enumerate(hashes)]
    candidates.sort(key=lambda c: c.particulars.id)
    pictures, torn = divide(candidates, SplitSettings(test_share=0.25, production_share=0.2))
    assert len(pictures) == 400
    assert torn == []
    assert len({picture.split for picture in pictures}) == 4
    for first in pictures:
        for second in pictures:
            near = (int(first.particulars.phash, 16) ^ int(second.particulars.phash, 16)).bit_count() <= 6
            assert not near or (first.split, first.group) == (second.split, second.group)


def test_shares_hold_in_each_stratum() -> None:
    candidates = [candidate(f"{n}.jpg", ("human", "ai")[n % 2]) for n in range(1000)]
    pictures, _ = divide(candidates, SplitSettings(production_share=0.1, test_share=0.2, val_share=0.25))
    for label in ("human", "ai"):
        counts = Counter(p.split for p in pictures if p.row.label == label)
        assert counts == {"production": 50, "test": 100, "train": 263, "val": 87} or all(
            abs(counts[split] - share) <= 2
            for split, share in {"production": 50, "test": 100, "train": 262.5, "val": 87.5}.items()
        )


def test_order_does_not_matter_and_the_seed_does() -> None:
    candidates = [candidate(f"{n}.jpg", phash=far(n // 2) ^ n % 2) for n in range(200)]

    def split(seed: int, order: Sequence[Candidate]) -> dict[str, tuple[str, str]]:
        pictures, _ = divide(order, SplitSettings(seed=seed))
        return {p.row.file_name: (p.split, p.group) for p in pictures}

    shuffled = random.Random(0).sample(candidates, len(candidates))
    assert split(0, candidates) == split(0, shuffled) != split(1, candidates)


def test_published_lists_are_honoured_and_what_doubles_a_held_out_photo_leaves_train() -> None:
    candidates = [candidate(f"{n}.jpg", None) for n in range(40)]
    candidates.append(candidate("double.jpg", None, phash=int(candidates[30].particulars.phash, 16) ^ 1))
    candidates.append(candidate("follows.jpg", None, phash=int(candidates[30].particulars.phash, 16) ^ 2))
    ids = [c.particulars.id for c in candidates]
    pins = dict.fromkeys(ids[:30], "train") | dict.fromkeys(ids[30:35], "test") | dict.fromkeys(ids[35:40], "val")
    pins[ids[40]] = "train"
    pictures, torn = divide(candidates, SplitSettings(split="published"), pins)
    found = by_name(pictures)
    assert all(found[f"{n}.jpg"].split == pins[ids[n]] for n in range(40))
    assert [(r.file_name, r.reason) for r in torn] == [("double.jpg", "torn_group")]
    assert found["follows.jpg"].split == "test"
    pictures, _ = divide(candidates, SplitSettings(split="published", production_share=0.1), pins)
    counts = Counter(p.split for p in pictures)
    assert (counts["production"], counts["test"], counts["val"]) == (5, 6, 5)


def test_what_the_starter_saw_stays_in_train() -> None:
    rows = [candidate(f"Images/{n}_secret.jpg", None, photo=str(n)) for n in range(1600)]
    numbers = starter_captioner_splits([c.row for c in rows])
    ordered = sorted(map(str, range(1600)), key=lambda n: hashlib.sha256(n.encode()).hexdigest())
    assert [numbers[n] for n in ordered] == ["test"] * 1000 + ["val"] * 500 + ["train"] * 100
    pins = {c.particulars.id: numbers[str(c.row.photo)] for c in rows}
    # a photo of test that nearly is one of train: the starter has seen it
    seen = next(c for c in rows if pins[c.particulars.id] == "train")
    double = next(i for i, c in enumerate(rows) if pins[c.particulars.id] == "test")
    rows[double] = candidate(rows[double].row.file_name, None, phash=int(seen.particulars.phash, 16) ^ 1)
    pictures, torn = divide(rows, SplitSettings(split="starter", production_share=0.1), pins)
    assert [r.file_name for r in torn] == [rows[double].row.file_name]
    counts = Counter(p.split for p in pictures)
    assert counts == {"test": 839, "production": 160, "val": 500, "train": 100}
    assert all(pins[p.particulars.id] in (p.split, "test") for p in pictures)


def test_the_same_photo_falls_where_another_corpus_has_it() -> None:
    candidates = [candidate(f"{n}.jpg", None, photo=str(n)) for n in range(60)]
    links = [frozenset((f"photo:{n}",)) for n in range(60)]
    others = [
        Known(f"other-{n}", f"{far(n):016x}", links[n], ("train", "test", "val", "production")[n % 4])
        for n in range(40)
    ]
    # near 50.jpg in hash, and the same bytes as 51.jpg
    near = f"{int(candidates[50].particulars.phash, 16) ^ 3:016x}"
    others += [
        Known("near", near, frozenset(), "val"),
        Known(candidates[51].particulars.id, "0" * 16, frozenset(), "test"),
    ]
    # the other corpora disagree about 52.jpg
    others += [Known("x", "f" * 16, links[52], "train"), Known("y", "e" * 8 + "1" * 8, links[52], "test")]
    pictures, torn = divide(candidates, SplitSettings(), others=others)
    found = by_name(pictures)
    for n in range(40):
        assert found[f"{n}.jpg"].split == others[n].split
    assert (found["50.jpg"].split, found["51.jpg"].split) == ("val", "test")
    assert [r.file_name for r in torn] == ["52.jpg"]
    sides: dict[str, set[str]] = defaultdict(set)
    for picture in pictures:
        sides[picture.group].add(picture.split)
    assert all(len(found) == 1 for found in sides.values())


def test_a_giant_bucket_of_equal_hashes_is_one_group() -> None:
    assert near_duplicate_groups([5] * 3000 + [5 ^ 3] * 10 + [0xFFFF << 40]) == [0] * 3010 + [3010]


def test_shares_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="leave nothing to train on"):
        SplitSettings(test_share=0.6, production_share=0.4)
    assert sum(SplitSettings().shares().values()) == pytest.approx(1)
    assert SplitSettings(split="starter").production == 0
