"""Places: what may be named, what is written appears whole, and errors say what to do."""

from __future__ import annotations

import errno
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.errors import DataError, as_data_error
from data.locations import Location
from tests.data.made import S3Server, s3_server


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3") / "root") as server:
        (server.folder / "bucket").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment.items():
                patch.setenv(name, value)
            yield server


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty place, on each kind of storage."""
    if request.param == "local":
        return Location.of(tmp_path / "place")
    request.getfixturevalue("s3")
    return Location.of(f"s3://bucket/{tmp_path.name}")


def test_a_place_reads_as_it_is_written() -> None:
    assert str(Location.of("s3://bucket/a/b/")) == "s3://bucket/a/b"
    assert str(Location.of("file:///a/b")) == "/a/b"
    assert str(Location.of("/a/../b")) == "/b"
    assert Location.of("s3://bucket/a").parent / "c" == Location("s3", "bucket/c")
    assert (Location.of("/a/b.zip").name, Location.of("/a").parent) == ("b.zip", Location("file", "/"))
    assert pickle.loads(pickle.dumps(Location.of("s3://bucket/a"))) == Location("s3", "bucket/a")


@pytest.mark.parametrize(("text", "message"), [("gs://a/b", "only local"), ("s3://", "no bucket"), ("", "empty path")])
def test_other_places_are_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Location.of(text)


def test_a_relative_path_is_refused_inside_a_job_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert Location.of("out").path == str(Path.cwd() / "out")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(DataError, match=r"'out' is a relative path.*absolute path"):
        Location.of("out")
    assert Location.of("/out").path == "/out"


def test_files_folders_and_bytes(place: Location) -> None:
    assert not place.exists()
    assert place.folders() == []
    place.ready()
    (place / "a/one.bin").write_bytes(b"1")
    (place / "a/deeper/two.bin").write_bytes(b"22")
    (place / "b/three.txt").write_text("drei")
    assert [(entry.name, entry.size) for entry in place.files()] == [
        ("a/deeper/two.bin", 2),
        ("a/one.bin", 1),
        ("b/three.txt", 4),
    ]
    assert place.folders() == ["a", "b"]
    assert (place / "a").is_dir()
    assert (place / "a/one.bin").is_file()
    assert (place / "b/three.txt").read_text() == "drei"
    with pytest.raises(FileNotFoundError):
        (place / "a/none").read_bytes()
    before = {entry.name: entry.tag for entry in place.files()}
    (place / "a/one.bin").write_bytes(b"3")
    after = {entry.name: entry.tag for entry in place.files()}
    assert [name for name in after if after[name] != before[name]] == ["a/one.bin"]
    (place / "a").remove()
    (place / "none").remove()
    assert [entry.name for entry in place.files()] == ["b/three.txt"]


def test_what_lies_directly_in_a_folder(place: Location) -> None:
    assert place.entries() == {}
    (place / "a/one.bin").write_bytes(b"1")
    (place / "two.txt").write_text("2")
    assert place.entries() == {"a": False, "two.txt": True}
    if place.is_local:
        (place.local_path / "link").symlink_to("two.txt")
        assert place.entries()["link"] is False


def test_a_folder_is_had_by_one_until_it_ends(place: Location) -> None:
    refusal = ValueError("somebody has it")
    with place.alone(refusal):
        # given every descriptor that is not closed by itself
        outlives = subprocess.Popen(["sleep", "60"], close_fds=False)
        if place.is_local:
            with pytest.raises(ValueError, match="somebody has it"), place.alone(refusal):
                pass
    try:
        with place.alone(refusal):
            assert outlives.poll() is None
    finally:
        outlives.kill()
        outlives.wait()


def test_a_folder_is_published_whole_and_once(place: Location) -> None:
    for folder in ("first", "second"):
        (place / folder / "train/0.parquet").write_bytes(folder.encode())
        (place / folder / "manifest.json").write_text("{}")
    (place / "target/left over").write_text("by one that was killed")
    (place / "first").publish(place / "target")
    assert [entry.name for entry in (place / "target").files()] == ["manifest.json", "train/0.parquet"]
    assert not (place / "first").exists()
    with pytest.raises(DataError, match="finished already"):
        (place / "second").publish(place / "target")
    assert (place / "target/train/0.parquet").read_bytes() == b"first"


def test_a_link_out_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/real").write_text("y")
    (tmp_path / "in/inside").symlink_to(tmp_path / "in/real")
    assert [entry.name for entry in Location.of(tmp_path / "in").files()] == ["inside", "real"]
    (tmp_path / "in/out").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="leads out of"):
        Location.of(tmp_path / "in").files()


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    target = Location.of(tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        target.write_bytes(b"x")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file is in the way"):
        Location.of(tmp_path / "file/below").ready()


def test_a_bucket_that_is_not_there_or_refuses(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = Location.of("s3://nowhere/prefix")
    with pytest.raises(DataError, match="no bucket for s3://nowhere/prefix"):
        nowhere.files()
    with pytest.raises(DataError, match="no bucket"):
        nowhere.ready()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    from data import locations

    locations._filesystem.cache_clear()
    try:
        with pytest.raises(DataError, match="access to s3://bucket/prefix is refused"):
            Location.of("s3://bucket/prefix").files()
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        locations._filesystem.cache_clear()
        with pytest.raises(DataError, match="does not answer"):
            Location.of("s3://bucket/prefix").files()
    finally:
        locations._filesystem.cache_clear()


def test_errors_behind_errors_are_found() -> None:
    def raised(inner: Exception) -> Exception:
        try:
            try:
                raise inner
            except Exception as error:
                raise RuntimeError("a task failed") from error
        except RuntimeError as outer:
            return outer

    full = as_data_error(raised(OSError(errno.ENOSPC, "No space left on device")), "/out")
    assert full is not None
    assert "disk is full at /out" in str(full)
    own = DataError("say this")
    assert as_data_error(raised(own)) is own
    assert as_data_error(raised(ValueError("a bug"))) is None
    text = "OSError: [Errno 28] No space left on device\n\ndata.errors.DataError: the disk is full at /a\n\nraised"
    remote = as_data_error(RuntimeError(text), "/elsewhere")
    assert str(remote) == "the disk is full at /a"
