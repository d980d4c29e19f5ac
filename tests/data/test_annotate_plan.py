"""The plan of a bulk annotation: what is read, in which shards, and what a second start notices; records as parquet."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data.annotate import AnnotateSettings, _Progress, annotate
from data.annotate_plan import (
    finished_shards,
    list_input,
    open_plan,
    remove_partial_files,
    shard_name,
    shard_size,
    unfinished,
)
from data.annotate_stages import Publisher, Reader
from data.annotations import FOLDER, SCHEMA, from_row, read_annotations, to_table
from data.errors import DataError
from data.locations import Location
from deployments.annotation import (
    Annotation,
    Caption,
    Detection,
    HeatMap,
    Provenance,
    Signal,
    StageError,
)
from deployments.images import ImageLimits
from deployments.views import ViewSpec
from tests.data.made import encoded, picture, s3_server

SETTINGS: dict[str, Any] = {"models": {"detector": "d#1"}, "tasks": ["detect"]}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five pictures in two folders, and what an archive has besides."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("a.jpg", "b.PNG", "2020/a.jpg", "2020/05/c.jpeg", "2020/05/d.webp")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number)))
    for name in ("notes.txt", ".hidden.jpg", "2020/Thumbs.db"):
        (folder / name).write_text("not a picture")
    return folder


def plan(place: Path, output: Path, size: int | None = 2, **settings: Any):
    location = Location.of(place)
    return open_plan(Location.of(output), location, list_input(location), size, SETTINGS | settings)


def shards(output: Path, done: set[int] | None = None) -> list[dict[str, Any]]:
    tables = unfinished(Location.of(output), done or set(), 2)
    return [row for table in tables for row in table.to_pylist()]


# ------------------------------------------------------------------------------------------------------------- input


def test_pictures_are_found_in_all_subfolders_and_nothing_else(photos: Path, tmp_path: Path) -> None:
    listing = list_input(Location.of(photos))
    assert [entry.name for entry in listing.entries] == [
        "2020/05/c.jpeg", "2020/05/d.webp", "2020/a.jpg", "a.jpg", "b.PNG",
    ]  # fmt: skip
    assert (listing.kind, listing.others) == ("files", 3)
    assert [entry.name for entry in list_input(Location.of(photos), suffixes=[".txt"]).entries] == ["notes.txt"]


def test_an_input_that_cannot_be_annotated_is_refused_with_what_to_do(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "one.parquet")
    version = tmp_path / "version"
    (version / "train").mkdir(parents=True)
    (version / "manifest.json").write_text("{}")
    (version / "train" / "0.parquet").write_bytes((tmp_path / "one.parquet").read_bytes())
    both = tmp_path / "both"
    both.mkdir()
    for name in ("one.parquet", "photos/a.jpg"):
        (both / Path(name).name).write_bytes((tmp_path / name).read_bytes())
    for place, message in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "no picture"),
        (photos / "a.jpg", "is a file"),
        (version, r"prepared version.*version/production"),
        (both, "--kind files or --kind parquet"),
    ):
        with pytest.raises(DataError, match=message):
            list_input(Location.of(place))
    assert list_input(Location.of(both), "parquet").kind == "parquet"
    pq.write_table(pa.table({"id": ["x"]}), tmp_path / "one.parquet")
    with pytest.raises(DataError, match=r"neither a column `image`.*only id"):
        plan(tmp_path / "one.parquet", tmp_path / "out")
    (tmp_path / "one.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a parquet file"):
        plan(tmp_path / "one.parquet", tmp_path / "out")


def test_names_that_are_not_utf8_are_refused_as_their_bytes(photos: Path) -> None:
    for name in (b"caf\xe9.jpg", b"notes \xe9.txt"):
        Path(os.fsdecode(os.fsencode(photos / "2020") + b"/" + name)).write_bytes(encoded(picture(9)))
    with pytest.raises(DataError, match=r"1 of 6 names .*\(b'2020/caf\\xe9\.jpg'\): rename") as raised:
        list_input(Location.of(photos))
    assert str(raised.value).isascii()
    for number in range(9):
        Path(os.fsdecode(os.fsencode(photos) + b"/%d \xff.jpg" % number)).touch()
    with pytest.raises(DataError, match=r"10 of 15 names .*b'0 \\xff\.jpg', .*, \.\.\.\)"):
        list_input(Location.of(photos))
    with pytest.raises(DataError, match=r"b'/caf\\xe9\.parquet' is not UTF-8"):
        list_input(Location.of(os.fsdecode(b"/caf\xe9.parquet")))


@pytest.fixture
def fresh_client() -> Iterator[None]:
    """A process keeps its S3 client: neither take another test's, whose server is gone, nor leave one behind."""
    yield


def test_a_bucket_that_is_not_there_and_a_uri_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_client: None
) -> None:
    with s3_server(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(DataError, match="bucket"):
            annotate(AnnotateSettings(input="s3://nowhere/photos", output=str(tmp_path / "out")))
    with pytest.raises(DataError, match=r"no bucket|does not answer"):
        annotate(AnnotateSettings(input="s3://", output=str(tmp_path / "out")))


def test_relative_paths_are_refused_inside_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for places in ({"input": "photos", "output": "/out"}, {"input": str(tmp_path), "output": "out"}):
        with pytest.raises(DataError, match=r"relative path.*absolute path"):
            annotate(AnnotateSettings(**places))


def test_an_output_inside_of_the_input_is_refused(photos: Path) -> None:
    with pytest.raises(DataError, match="inside"):
        annotate(AnnotateSettings(input=str(photos), output=str(photos / "annotated")))


def test_tags_need_captions() -> None:
    with pytest.raises(ValidationError, match="needs `caption`"):
        AnnotateSettings(input="/a", output="/b", tasks=("tag",))


# -------------------------------------------------------------------------------------------------------------- plan


def test_every_picture_is_in_one_shard(photos: Path, tmp_path: Path) -> None:
    made = plan(photos, tmp_path / "out")
    assert (made.pictures, made.shards, made.shard_pictures) == (5, 3, 2)
    rows = shards(tmp_path / "out")
    assert [row["shard"] for row in rows] == [0, 1, 2]
    assert [name for row in rows for name in row["names"]] == [e.name for e in list_input(Location.of(photos)).entries]


def test_every_row_of_a_parquet_file_is_in_one_shard(tmp_path: Path) -> None:
    folder = tmp_path / "parquet"
    folder.mkdir()
    pq.write_table(pa.table({"path": [f"{n}.jpg" for n in range(23)]}), folder / "a.parquet", row_group_size=10)
    pq.write_table(pa.table({"path": ["x.jpg"]}), folder / "b.parquet")
    assert plan(folder, tmp_path / "out", 4).pictures == 24
    rows = [(row["names"][0], row["row_group"], row["first"], row["pictures"]) for row in shards(tmp_path / "out")]
    assert rows == [
        *(("a.parquet", group, first, count) for group in (0, 1) for first, count in ((0, 3), (3, 3), (6, 4))),
        ("a.parquet", 2, 0, 3),
        ("b.parquet", 0, 0, 1),
    ]


def test_a_row_group_too_large_to_be_read_for_every_shard_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.annotate_plan._LARGEST_ROW_GROUP", 20_000)
    file, images = tmp_path / "large.parquet", [os.urandom(1_000) for _ in range(40)]
    for name, column in (("bytes", images), ("hf", [{"bytes": image, "path": None} for image in images])):
        pq.write_table(pa.table({"image": column}), file)
        with pytest.raises(DataError, match=r"large\.parquet has a row group .*write it again with row_group_size=64"):
            plan(file, tmp_path / name)
        pq.write_table(pa.table({"image": column}), file, row_group_size=4)
        assert plan(file, tmp_path / name).pictures == 40
    # what is not read does not count
    pq.write_table(pa.table({"path": [f"{number}.jpg" for number in range(40)], "thumbnail": images}), file)
    assert plan(file, tmp_path / "others").pictures == 40


def test_shards_are_small_for_a_small_folder_and_bounded_for_an_archive() -> None:
    assert [shard_size(count) for count in (1, 100, 1000, 10**9)] == [8, 8, 16, 64]


def test_a_second_start_finds_the_plan_and_does_what_is_left(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = plan(photos, output)
    assert plan(photos, output) == plan(photos, output, None) == first
    records = output / FOLDER
    records.mkdir()
    (records / shard_name(1)).touch()
    (records / f"{shard_name(2)}.1234.part").touch()
    assert finished_shards(Location.of(output)) == {1}
    assert [row["shard"] for row in shards(output, {1})] == [0, 2]
    remove_partial_files(Location.of(output))
    assert [path.name for path in records.iterdir()] == [shard_name(1)]


def test_a_start_that_was_killed_before_its_plan_held_is_begun_anew(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    plan(photos, output)
    (output / "plan.json").unlink()
    (output / "plan.parquet").write_bytes(b"half")
    for name in ("plan.parquet", "plan.json"):
        (output / f"{name}.01234567.part").write_bytes(b"half")
    assert plan(photos, output).pictures == len([name for row in shards(output) for name in row["names"]]) == 5


def _add(photos: Path) -> None:
    (photos / "new.jpg").write_bytes(encoded(picture(9)))


def _change(photos: Path) -> None:
    (photos / "a.jpg").write_bytes(encoded(picture(9)))


@pytest.mark.parametrize("change", [_add, _change, lambda photos: (photos / "a.jpg").unlink()])
def test_an_input_that_has_changed_since_is_noticed(photos: Path, tmp_path: Path, change) -> None:
    plan(photos, tmp_path / "out")
    change(photos)
    with pytest.raises(DataError, match="has changed since"):
        plan(photos, tmp_path / "out")


def test_an_output_of_something_else_is_refused(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    plan(photos, output)
    with pytest.raises(DataError, match=r"holds the annotation of .*photos"):
        plan(photos / "2020", output)
    with pytest.raises(DataError, match=r"models was \{'detector': 'd#1'\}, is \{'detector': 'd#2'\}"):
        plan(photos, output, models={"detector": "d#2"})
    with pytest.raises(DataError, match="shard_pictures was 2, is 3"):
        plan(photos, output, 3)
    with pytest.raises(DataError, match="not empty"):
        plan(photos / "2020", photos)
    with pytest.raises(DataError, match="is a file"):
        plan(photos, photos / "a.jpg")
    (output / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        plan(photos, output)


# ----------------------------------------------------------------------------------------------------------- reading


def read(place: Path, output: Path, limits: ImageLimits | None = None) -> list[dict[str, Any]]:
    """Every shard as the reader leaves it, picture by picture."""
    listing = list_input(Location.of(place))
    reader = Reader(Location.of(place), listing.kind, limits or ImageLimits(), {"detector": ViewSpec(size_px=32)})
    rows = []
    for table in unfinished(Location.of(output), set(), 1):
        batch = reader(table)
        assert batch["detector"].shape == (table["pictures"][0].as_py(), 1, 32, 32, 3)
        rows += [
            {"record": Annotation.model_validate_json(record), "views": views, "provenance": provenance}
            for record, views, provenance in zip(batch["record"], batch["detector"], batch["provenance"], strict=True)
        ]
    return rows


def errors(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {row["record"].id: [f"{e.stage} {e.code}" for e in row["record"].errors] for row in rows}


def test_what_cannot_be_read_is_a_record_with_an_error(photos: Path, tmp_path: Path) -> None:
    good = (photos / "a.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(good[: len(good) // 2])
    (photos / "empty.jpg").touch()
    (photos / "text.jpg").write_text("hello")
    (photos / "huge.jpg").write_bytes(good + bytes(3 * 2**20))
    plan(photos, tmp_path / "out", 3)
    (photos / "b.PNG").unlink()
    rows = read(photos, tmp_path / "out", ImageLimits(max_bytes=2 * 2**20))
    assert {name: found for name, found in errors(rows).items() if found} == {
        "b.PNG": ["decode unreadable"],
        "cut.jpg": ["decode truncated"],
        "empty.jpg": ["decode empty_body"],
        "huge.jpg": ["decode too_large"],
        "text.jpg": ["decode not_an_image"],
    }
    for row in rows:
        assert bool(row["views"].any()) == bool(row["provenance"]) == (not row["record"].errors)
    by_id = {row["record"].id: row["record"] for row in rows}
    assert len(by_id) == 9
    for name in ("a.jpg", "cut.jpg", "huge.jpg"):
        digest = subprocess.run(["sha256sum", photos / name], capture_output=True, text=True, check=True).stdout
        assert by_id[name].sha256 == digest.split()[0]


def test_a_folder_that_vanishes_stops_the_run_instead_of_failing_every_picture(photos: Path, tmp_path: Path) -> None:
    plan(photos, tmp_path / "out")
    listing = list_input(Location.of(photos))
    reader = Reader(Location.of(photos), listing.kind, ImageLimits(), {})
    photos.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="not there any more"):
        reader(next(unfinished(Location.of(tmp_path / "out"), set(), 1)))


def test_rows_of_parquet_are_read_by_bytes_or_by_path(photos: Path, tmp_path: Path) -> None:
    data = (photos / "a.jpg").read_bytes()
    rows = [
        {"id": "bytes", "image": data, "path": None},
        {"id": "relative", "image": None, "path": "2020/a.jpg"},
        {"id": "absolute", "image": None, "path": str(photos / "a.jpg")},
        {"id": "gone", "image": None, "path": "2020/none.jpg"},
        {"id": "escapes", "image": None, "path": "2020/../../secret.jpg"},
        {"id": "nothing", "image": None, "path": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), photos / "index.parquet", row_group_size=4)
    pq.write_table(
        pa.table({"image": [{"bytes": data, "path": "x"}, {"bytes": b"", "path": None}]}), photos / "hf.parquet"
    )
    for name in ("index", "hf"):
        plan(photos / f"{name}.parquet", tmp_path / name)
    assert errors(read(photos / "index.parquet", tmp_path / "index")) == {
        "bytes": [], "relative": [], "absolute": [],
        "gone": ["decode unreadable"], "escapes": ["decode unreadable"], "nothing": ["decode unreadable"],
    }  # fmt: skip
    assert errors(read(photos / "hf.parquet", tmp_path / "hf")) == {
        "hf.parquet#0": [], "hf.parquet#1": ["decode empty_body"],
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- records


def records() -> list[Annotation]:
    """A record with everything in it, and one with next to nothing."""
    signal = Signal(kind="exif", name="Software", value="a camera", declares_ai=False)
    return [
        Annotation(
            id="a/b.jpg",
            sha256="ab" * 32,
            detection=Detection(
                label="ai",
                ai_probability=0.75,
                provenance=Provenance(c2pa="absent", declared_ai=None, signals=[signal]),
                heat_map=HeatMap(method="grad-cam", grid=[[0.0, 1.0]], png=None),
            ),
            caption=Caption(text="a dog"),
            tags=["dog", "animal", "photo"],
            models={"detector": "d#1", "captioner": "c#1", "tagger": "t#1", "prompt": "tags-1"},
            timings_ms={"decode": 1.0, "detector": 2.0, "captioner": 3.0, "tagger": 4.0, "total": 10.0},
        ),
        Annotation(id="b", sha256="cd" * 32, errors=[StageError(stage="decode", code="truncated", detail="cut off")]),
    ]


def test_records_come_back_as_they_were_written() -> None:
    assert list(map(from_row, to_table(records()).to_pylist())) == records()


def test_the_schema_has_every_field_of_the_record_and_no_other() -> None:
    def names(kind: pa.DataType) -> Any:
        if pa.types.is_list(kind):
            return [names(kind.value_type)]
        return {field.name: names(field.type) for field in kind} if pa.types.is_struct(kind) else None

    def expected(value: Any) -> Any:
        if isinstance(value, list):
            return [expected(value[0])]
        return {name: expected(one) for name, one in value.items()} if isinstance(value, dict) else None

    full, failed = (record.model_dump() for record in records())
    full["errors"] = failed["errors"]
    assert {field.name: names(field.type) for field in SCHEMA} == expected(full)


def test_duckdb_pandas_and_pyarrow_read_the_records(tmp_path: Path) -> None:
    text = [record.model_dump_json() for record in records()]
    batch = {"shard": pandas.Series([7, 7]).to_numpy(), "record": pandas.Series(text, dtype=object).to_numpy()}
    summary = Publisher(Location.of(tmp_path))(batch)
    assert {name: value.tolist() for name, value in summary.items()} == {"shard": [7], "pictures": [2], "failed": [1]}
    folder = tmp_path / FOLDER
    query = f"select id, detection.ai_probability, tags[1], errors[1].code from '{folder}/*.parquet' order by id"
    assert duckdb.sql(query).fetchall() == [("a/b.jpg", 0.75, "dog", None), ("b", None, None, "truncated")]
    frame = pandas.read_parquet(folder)
    assert frame["caption"][0] == {"text": "a dog"}
    assert list(frame["tags"][0]) == ["dog", "animal", "photo"]
    assert pq.read_table(folder).num_rows == 2
    assert [record.id for record in read_annotations(tmp_path)] == ["a/b.jpg", "b"]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with 64 kB."""
    folder = tmp_path / "full"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(full_disk: Path) -> None:
    (full_disk / "filler").write_bytes(os.urandom(60_000))
    text = [Annotation(id=os.urandom(500).hex(), sha256=os.urandom(32).hex()).model_dump_json() for _ in range(64)]
    batch = {"shard": pandas.Series([0] * 64).to_numpy(), "record": pandas.Series(text, dtype=object).to_numpy()}
    with pytest.raises(DataError, match=r"disk is full.*free some space"):
        Publisher(Location.of(full_disk))(batch)
    assert finished_shards(Location.of(full_disk)) == set()
    remove_partial_files(Location.of(full_disk))
    assert list((full_disk / FOLDER).iterdir()) == []


def test_progress_says_how_fast_it_is_and_how_long_it_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("data.annotate.time.monotonic", lambda: now)
    progress = _Progress(pictures=10_000, done=100, every_s=15)
    now = 60.0  # the models were loaded
    progress.add(50)
    for _ in range(5):
        now += 10
        progress.add(50)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # not more often than every 15 s
    assert lines[-1] == "annotated 350 of 10,000 pictures (3.5%), 5.00/s, 32 min left"
