"""A folder and a zip of it are the same input; a zip that is damaged or climbs out is refused."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

import pytest

from data.errors import DataError
from data.raw import RawInput, safe_name
from tests.data.made import zipped


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {"list.csv": "a", "pictures/1.jpg": "b" * 5000, "pictures/2.jpg": "c"}.items():
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "raw"


def test_a_zip_is_read_like_the_folder_in_it(folder: Path, tmp_path: Path) -> None:
    plain = RawInput.of(str(folder))
    packed = RawInput.of(str(zipped(folder, tmp_path / "raw.zip", "top/"))).below("top")
    assert [(e.name, e.size) for e in plain.files()] == [(e.name, e.size) for e in packed.files()]
    names = ["pictures/2.jpg", "none", "list.csv"]
    assert (
        list(plain.read_all(names))
        == list(packed.read_all(names))
        == [(names[0], b"c"), ("none", None), (names[2], b"a")]
    )
    for raw in (plain, packed):
        with pytest.raises(FileNotFoundError):
            raw.read("none")


@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/passwd", "a/../../evil", "C:/evil", "a\\..\\evil", ""])
def test_names_that_lead_out_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="leads out of its folder"):
        safe_name(name, "the list")
    assert safe_name("a/..b/c..jpg", "the list") == "a/..b/c..jpg"


@pytest.mark.parametrize("name", ["../evil.jpg", "/evil.jpg", "train_data/../../evil.jpg"])
def test_a_zip_that_climbs_out_is_refused(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "slip.zip", "w") as archive:
        archive.writestr("train.csv", ",file_name,label\n")
        archive.writestr(name, "x")
    with pytest.raises(DataError, match=r"slip\.zip names .*evil\.jpg.*leads out"):
        RawInput.of(str(tmp_path / "slip.zip")).files()
    assert not list(tmp_path.rglob("evil.jpg"))


def test_a_zip_with_a_link_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="holds a link"):
        RawInput.of(str(tmp_path / "link.zip")).files()


def test_a_damaged_zip_is_refused(folder: Path, tmp_path: Path) -> None:
    whole = zipped(folder, tmp_path / "whole.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.zip is no zip file or a damaged one.*fetch or pack it again"):
        RawInput.of(str(tmp_path / "cut.zip")).files()
    at = whole.index(b"b" * 100)
    (tmp_path / "bad.zip").write_bytes(whole[:at] + b"x" + whole[at + 1 :])
    raw = RawInput.of(str(tmp_path / "bad.zip"))
    with pytest.raises(DataError, match=r"pictures/1\.jpg in .*bad\.zip cannot be unpacked"):
        raw.read("pictures/1.jpg")


def test_what_is_no_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        RawInput.of(str(tmp_path / "nowhere"))
    (tmp_path / "list.txt").write_text("")
    with pytest.raises(DataError, match=r"neither a folder nor a \.zip"):
        RawInput.of(str(tmp_path / "list.txt"))
