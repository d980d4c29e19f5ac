"""Verified items of reviewers: what is read of their files, what is refused, and on which side they fall."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.curate import Candidate, Known, SplitSettings, divide, remove_duplicates
from data.errors import DataError
from data.feedback import WithFeedback, read_feedback
from data.identify import Particulars
from data.layouts import RawRow
from data.prepare import AivshumanConfig, Flickr30kConfig, prepare
from data.raw import RawInput
from data.session import RaySettings, ray_session
from deployments.verified import SCHEMA
from tests.data.made import encoded, make_aivshuman, make_flickr, picture


def item(data: bytes, label: str | None = "ai", *captions: str, **more: Any) -> dict[str, Any]:
    row = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "image": data,
        "label": label,
        "captions": list(captions),
        "tags": None,
        "reviewers": ["someone@example.org"],
        "verified_at": datetime(2026, 11, 1, tzinfo=UTC),
        "source": None,
        "generator": None,
    }
    return row | more


def write(path: Path, *items: dict[str, Any], schema: pa.Schema = SCHEMA, group: int = 2) -> str:
    pq.write_table(pa.Table.from_pylist(list(items), schema), path, row_group_size=group)
    return str(path)


def test_items_become_rows_and_their_pictures_are_read_beside_the_raw_ones(tmp_path: Path) -> None:
    raw = make_aivshuman(tmp_path / "raw", 4, defects=False)
    pictures = [encoded(picture(100 + number)) for number in range(5)]
    first = write(
        tmp_path / "1.parquet", item(pictures[0]), item(pictures[1], "human", "a dog"), item(pictures[2], None)
    )
    second = write(tmp_path / "2.parquet", item(pictures[0], "human"), item(pictures[3], "ai", generator="new"))
    found = read_feedback([first, second], "label")
    said = {row.file_name.removeprefix("verified/"): (row.label, row.source, row.generator) for row in found.rows}
    names = [hashlib.sha256(data).hexdigest() for data in pictures]
    assert found.items == 4
    assert said == {
        names[0]: ("human", "review", "photo"),  # the later file counts
        names[1]: ("human", "review", "photo"),
        names[3]: ("ai", "review", "new"),
    }
    reader = WithFeedback(RawInput.of(str(raw)), found.places)
    asked = [f"verified/{names[3]}", "train_data/0001.jpg", f"verified/{names[0]}", "gone.jpg", "train_data/0000.jpg"]
    files = raw / "train_data"
    assert list(reader.read_all(asked)) == list(
        zip(
            asked,
            [pictures[3], (files / "0001.jpg").read_bytes(), pictures[0], None, (files / "0000.jpg").read_bytes()],
            strict=True,
        )
    )
    captions = read_feedback([first], "captions")
    assert [(row.captions, row.label) for row in captions.rows] == [(("a dog",), None)]


def test_the_digest_is_of_what_is_said_and_not_of_where_it_lies(tmp_path: Path) -> None:
    items = [item(encoded(picture(number))) for number in range(3)]
    one = read_feedback([write(tmp_path / "1.parquet", *items)], "label")
    other = read_feedback([write(tmp_path / "2.parquet", *reversed(items), group=1)], "label")
    changed = read_feedback([write(tmp_path / "3.parquet", items[0] | {"label": "human"}, *items[1:])], "label")
    assert one.digest == other.digest != changed.digest


def test_files_that_are_none_of_verified_items_are_refused(tmp_path: Path) -> None:
    good = item(encoded(picture(0)))
    other = SCHEMA.set(SCHEMA.get_field_index("label"), pa.field("label", pa.int32()))
    cases = {
        "does not exist": str(tmp_path / "none.parquet"),
        "lacks label": write(tmp_path / "a", good, schema=SCHEMA.remove(SCHEMA.get_field_index("label"))),
        "has more, which nobody reads": write(tmp_path / "b", good, schema=SCHEMA.append(pa.field("more", pa.int32()))),
        "label holds int32 instead of string": write(tmp_path / "c", good | {"label": 1}, schema=other),
        "'maybe' of": write(tmp_path / "d", good | {"label": "maybe"}),
        "twice": write(tmp_path / "e", good, good),
    }
    (tmp_path / "f").write_bytes(b"no parquet")
    for message, place in (cases | {"is no parquet file": str(tmp_path / "f")}).items():
        with pytest.raises(DataError, match=message):
            read_feedback([place], "label")


# ----------------------------------------------------------------------------------------------------- which side


def candidate(number: int, verified: bool = False, label: str = "ai") -> Candidate:
    id_ = hashlib.sha256(str(number).encode()).hexdigest()
    what = Particulars(id_, 64, 48, "JPEG", "RGB", 1000, 90, "q", [], id_[:16], id_[:8])
    return Candidate(RawRow(f"{number}.jpg", "source", "g", label), what, verified=verified)


@pytest.mark.parametrize("split", ["shares", "starter", "published"])
def test_verified_pictures_change_no_side_of_the_raw_ones_and_are_divided_by_the_shares(split: Any) -> None:
    raw, verified = [candidate(n) for n in range(300)], [candidate(n, verified=True) for n in range(300, 500)]
    settings = SplitSettings(split=split)
    alone = {p.particulars.id: p.split for p in divide(raw, settings)[0]}
    both, torn = divide(raw + verified, settings)
    assert not torn and {p.particulars.id: p.split for p in both if not p.verified} == alone
    fed_back = [p.split for p in both if p.verified]
    assert len(fed_back) == 200
    assert {name: abs(fed_back.count(name) / 200 - share) < 0.02 for name, share in settings.shares().items()} == (
        dict.fromkeys(settings.shares(), True)
    )


def test_what_is_near_to_a_picture_that_is_held_out_is_held_out(tmp_path: Path) -> None:
    others = [
        Known(f"{number}", candidate(number).particulars.phash, frozenset(), side)
        for number, side in enumerate(("train", "val", "test", "production"))
    ]
    kept, torn = divide([candidate(number, verified=True) for number in range(4)], SplitSettings(), others=others)
    assert not torn and {p.row.file_name: p.split for p in kept} == {
        f"{number}.jpg": side for number, side in enumerate(("train", "val", "test", "production"))
    }


def test_a_picture_of_the_raw_lists_stays_one_and_reviewers_who_contradict_them_take_it_out() -> None:
    same, against = candidate(1, verified=True), candidate(2, verified=True, label="human")
    kept, rejects = remove_duplicates([candidate(0), same, candidate(1), candidate(2), against])
    assert [(c.row.file_name, c.verified) for c in kept] == [
        (c.row.file_name, False) for c in sorted([candidate(0), candidate(1)], key=lambda c: c.particulars.id)
    ]
    assert sorted(reject.reason for reject in rejects) == ["contradictory_labels"] * 2 + ["duplicate"]


def test_the_next_version_has_them_counts_them_and_leaves_every_older_side_alone(tmp_path: Path) -> None:
    raw, output = make_aivshuman(tmp_path / "raw", 40, defects=False), str(tmp_path / "out")
    photos = make_flickr(tmp_path / "photos", range(40))
    with ray_session(RaySettings(num_cpus=2, object_store_bytes=100 * 2**20)):
        before = prepare(AivshumanConfig(input=str(raw), output=output)).version
        sides = {row["id"]: row["split"] for split in before.manifest.counts for row in _rows(before, split)}
        held = next(row for row in _rows(before, "val") if row["label"] == "ai")
        again = encoded(picture(int(held["file_name"][-8:-4])), quality=70)  # near to a picture of val
        fresh = [encoded(picture(3000 + number)) for number in range(24)]
        file = write(
            tmp_path / "verified.parquet",
            item(again, "ai"),
            item(b"no picture at all"),
            *(item(data, "human" if number % 2 else "ai") for number, data in enumerate(fresh)),
        )
        config = AivshumanConfig(input=str(raw), output=output, feedback=[file], max_rejected_share=0.1)
        made = prepare(config)
        after = made.version
        rows = {row["id"]: row for split in after.manifest.counts for row in _rows(after, split)}
        assert made.fresh and after.manifest.version != before.manifest.version
        assert {id_: rows[id_]["split"] for id_ in sides} == sides
        assert rows[hashlib.sha256(again).hexdigest()]["split"] == "val"
        assert rows[hashlib.sha256(again).hexdigest()]["group"] == rows[held["id"]]["group"]
        assert {hashlib.sha256(data).hexdigest() for data in fresh} < set(rows)
        assert sum(after.manifest.verified.values()) == 25 and after.manifest.verified["test"] > 0
        assert after.manifest.input_rows == 66 and after.manifest.rejects == {"not_an_image": 1}
        assert before.manifest.verified == {}
        assert not prepare(config).fresh
        captioned = write(tmp_path / "captions.parquet", *(item(data, None, "A dog runs.") for data in fresh[:12]))
        photo_config = Flickr30kConfig(input=str(photos), output=output, feedback=[captioned])
        learnt = prepare(photo_config).version
        assert sum(learnt.manifest.verified.values()) == 12


def _rows(version: Any, split: str) -> list[dict[str, Any]]:
    return version.table(split, ["id", "split", "file_name", "label", "group"]).to_pylist()
