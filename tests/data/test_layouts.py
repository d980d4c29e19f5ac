"""Every row of the lists becomes a row or a reject with its reason, in each layout; broken lists are refused."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from data.captions import clean_caption, photo_number
from data.errors import DataError
from data.layouts import read_aivshuman, read_flickr30k
from data.raw import RawInput
from tests.data.made import encoded, make_aivshuman, make_flickr, picture, zipped


def raw(folder: Path) -> RawInput:
    return RawInput.of(str(folder))


def write_list(path: Path, rows: list[tuple[str, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_kaggle_layout(tmp_path: Path) -> None:
    listed = read_aivshuman(raw(make_aivshuman(tmp_path / "set", pictures=8)))
    by_name = {row.file_name: row for row in listed.rows}
    assert listed.listed == 8 + 14
    first = by_name["train_data/0001.jpg"]
    assert (first.label, first.source, first.generator) == ("ai", "here", "generator-1")
    assert by_name["train_data/0002.jpg"].label == "human"
    assert by_name["train_data/0002.jpg"].generator == "photo"
    assert sorted((r.file_name, r.reason) for r in listed.rejects) == [
        ("train_data/0004.jpg", "bad_label"),
        ("train_data/gone.jpg", "missing"),
        ("train_data/stray.jpg", "not_listed"),
    ]
    assert all(row.twin is None for row in listed.rows)  # neighbours have one label too often


def test_columns_are_found_by_name_and_folders_below_are_searched(tmp_path: Path) -> None:
    write_list(tmp_path / "a/b/train.csv", [("label", "more", "file_name"), ("1.0", "x", "train_data/1.jpg")])
    write_list(tmp_path / "a/b/test.csv", [("id",), ("test_data_v2/2.jpg",)])
    touch(tmp_path, "a/b/train_data/1.jpg", "a/b/test_data_v2/2.jpg")
    listed = read_aivshuman(raw(tmp_path), default_source="kaggle")
    assert [(row.file_name, row.label, row.source, row.generator) for row in listed.rows] == [
        ("train_data/1.jpg", "ai", "kaggle", None)
    ]
    assert listed.rejects == []
    packed = read_aivshuman(RawInput.of(str(zipped(tmp_path / "a", tmp_path / "set.zip", "other/"))))
    assert [row.file_name for row in packed.rows] == ["train_data/1.jpg"]


def test_the_original_systems_layout(tmp_path: Path) -> None:
    for number, name in enumerate(("training", "validation", "testing", "testing_online")):
        write_list(tmp_path / f"{name}.csv", [("", "file_name", "label"), ("0", f"{number}.jpg", str(number % 2))])
        touch(tmp_path, f"Images/{number}.jpg")
    listed = read_aivshuman(raw(tmp_path))
    assert [(row.file_name, row.label) for row in listed.rows] == [
        (f"Images/{number}.jpg", ("human", "ai")[number % 2]) for number in range(4)
    ]


def test_twins_are_found_by_row_by_folder_and_by_column(tmp_path: Path) -> None:
    def pairs(rule: str = "auto") -> dict[str, str | None]:
        return {row.file_name: row.twin for row in read_aivshuman(raw(tmp_path), twins=rule).rows}

    names = [f"train_data/{number}.jpg" for number in range(20)]
    touch(tmp_path, *names, "real/x.jpg", "fake/x.jpg")
    rows = [(str(number), name, str((number + number // 2) % 2)) for number, name in enumerate(names)]
    write_list(tmp_path / "train.csv", [("", "file_name", "label"), *rows])
    found = pairs()
    assert all(found[names[k]] == found[names[k + 1]] is not None for k in range(0, 20, 2))
    assert len(set(found.values())) == 10
    assert set(pairs("none").values()) == {None}
    # in another order the row number, not the place, tells the neighbour
    write_list(tmp_path / "train.csv", [("", "file_name", "label"), *sorted(rows, key=lambda row: row[1])])
    assert len({frozenset(n for n, t in pairs().items() if t == twin) for twin in found.values()}) == 10
    # labels that agree among neighbours: another order, no pairs, unless asked for
    mixed = [(number, name, "1" if int(number) < 7 else "0") for number, name, _ in rows]
    write_list(tmp_path / "train.csv", [("", "file_name", "label"), *mixed])
    assert set(pairs().values()) == {None}
    assert [name for name, twin in pairs("rows").items() if twin] == names[6:8]
    write_list(tmp_path / "train.csv", [("file_name", "label"), ("real/x.jpg", "0"), ("fake/x.jpg", "1")])
    assert set(pairs().values()) == {"name:x"}
    write_list(tmp_path / "train.csv", [("file_name", "label", "pair"), (names[0], "0", "a"), (names[5], "1", "a")])
    assert set(pairs().values()) == {"pair:a"}


@pytest.mark.parametrize("older", [False, True])
def test_captions_in_both_layouts(tmp_path: Path, older: bool) -> None:
    make_flickr(tmp_path, range(4), older=older)
    listed = read_flickr30k(raw(tmp_path))
    assert [row.photo for row in listed.rows] == ["1000", "1001", "1002", "1003"]
    assert listed.rows[1].captions[2] == 'A dog, number 1, "runs" for the 2th time .'
    assert all(len(row.captions) == 5 and row.generator == "photo" for row in listed.rows)


def test_defects_of_caption_lists(tmp_path: Path) -> None:
    touch(tmp_path, "flickr30k_images/flickr30k_images/1.jpg", "flickr30k_images/1.jpg", "flickr30k_images/4.jpg")
    touch(tmp_path, "flickr30k_images/3.jpg")
    tmp_path.joinpath("results.csv").write_text(
        "image_name| comment_number| comment\n"
        "1.jpg| 0| A cat .\n1.jpg| 4   A dog runs .\n2.jpg| 0| Gone .\n3.jpg| 0| .\n"
    )
    listed = read_flickr30k(raw(tmp_path))
    assert [(row.file_name, row.captions) for row in listed.rows] == [
        ("flickr30k_images/1.jpg", ("A cat .", "A dog runs ."))
    ]
    assert {(r.file_name, r.reason) for r in listed.rejects} == {
        ("Images/2.jpg", "missing"),
        ("flickr30k_images/3.jpg", "no_captions"),
        ("flickr30k_images/4.jpg", "not_listed"),
    }


def test_a_caption_is_cleaned_and_a_photo_has_its_number() -> None:
    assert clean_caption('  A man\'s T-shirt says "Hi!" .') == "a man's t shirt says hi"
    assert clean_caption("It 's " + "long " * 50) == "it" + " long" * 29
    assert clean_caption(clean_caption("A dog, and A CAT.")) == "a dog and a cat"
    assert photo_number("Images/1000268201_693b08cb0e.jpg") == photo_number("1000268201.jpg") == "1000268201"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no train\.csv"),
        (",name,label\n0,1.jpg,0\n", "lacks file_name; its columns are '', 'name', 'label'"),
        ("", "lacks file_name, label; its columns are none"),
        (",file_name,label\n0,../../etc/passwd,0\n", r"names '\.\./\.\./etc/passwd', which leads out"),
        (",file_name,label\n0,/etc/passwd,0\n", "leads out"),
        (
            ",file_name,label\n0,none.jpg,0\n1,other.jpg,2\n",
            r"has no images that its list names \(1 bad_label, 1 missing\)",
        ),
        (",file_name,label\n", "the list is empty"),
        (b",file_name,label\n0,\xff\xfe.jpg,0\n", "is not UTF-8"),
    ],
)
def test_broken_lists_are_refused(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    (tmp_path / "train_data").mkdir()
    (tmp_path / "train_data/1.jpg").write_bytes(encoded(picture(1)))
    if content is not None:
        (tmp_path / "train.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message):
        read_aivshuman(raw(tmp_path))


def test_broken_caption_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        read_flickr30k(raw(tmp_path))
    (tmp_path / "captions.txt").write_text("picture,text\n1.jpg,a\n")
    with pytest.raises(DataError, match="must have the columns image,caption"):
        read_flickr30k(raw(tmp_path))
    (tmp_path / "captions.txt").write_text("image,caption\n../1.jpg,a\n")
    with pytest.raises(DataError, match="leads out"):
        read_flickr30k(raw(tmp_path))


def test_the_fingerprint_follows_content_and_settings(tmp_path: Path) -> None:
    folder = make_aivshuman(tmp_path / "set", pictures=8)

    def fingerprint(settings: str = "") -> str:
        return read_aivshuman(raw(folder)).fingerprint(settings)

    before = fingerprint()
    assert fingerprint() == before != fingerprint("other")
    (folder / "train_data/0003.jpg").write_bytes(encoded(picture(5)))
    changed = fingerprint()
    assert changed != before
    with (folder / "sources.csv").open("a") as file:
        file.write("train_data/none.jpg,a,b\n")
    assert fingerprint() != changed
