"""Prepared versions, made by the real pipeline on a real Ray: what is in them, and that nothing but content and
settings decides what they are.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data.captions import clean_caption, photo_number
from data.curate import starter_captioner_splits
from data.errors import DataError
from data.layouts import read_flickr30k
from data.prepare import AivshumanConfig, Flickr30kConfig, SourceConfig, main, prepare
from data.raw import RawInput
from data.session import RaySettings, ray_session
from data.versions import SCHEMAS, SPLITS, DataVersion, open_version, versions
from tests.data.made import KEPT_BESIDES, REJECTED, ROOT, S3Server, make_aivshuman, make_flickr, s3_server, zipped

#: Three blocks of the pipeline.
PICTURES = 600
MODEST = RaySettings(num_cpus=2, object_store_bytes=100 * 2**20)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3") / "root") as server:
        (server.folder / "bucket").mkdir()
        yield server


@pytest.fixture(scope="module")
def ray(s3: S3Server) -> Iterator[None]:
    """One Ray for all tests here; its workers know the S3 server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        with ray_session(MODEST):
            yield


@dataclass(frozen=True)
class Made:
    """Raw data and the version made of them."""

    raw: Path
    version: DataVersion


@pytest.fixture(scope="module")
def dirty(ray: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("dirty")
    raw = make_aivshuman(folder / "raw", PICTURES)
    prepared = prepare(AivshumanConfig(input=str(raw), output=str(folder / "out")))
    assert prepared.fresh
    assert prepared.identified.pictures == PICTURES + 11  # each file once
    return Made(raw, prepared.version)


@pytest.fixture(scope="module")
def photos(ray: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("photos")
    raw = make_flickr(folder / "raw", range(200))
    prepared = prepare(Flickr30kConfig(input=str(raw), output=str(folder / "out")))
    return Made(raw, prepared.version)


def test_the_command_writes_the_quality_report_of_a_version_that_has_none(dirty: Made) -> None:
    folder = Path(dirty.version.location.path)
    output = str(folder.parent.parent)
    main(["aivshuman", "--input", str(dirty.raw), "--output", output, "--no-report"])
    assert not (folder / "report.html").exists()
    main(["aivshuman", "--input", str(dirty.raw), "--output", output])
    assert dirty.version.manifest.version in (folder / "report.html").read_text()


def everything(version: DataVersion) -> list[dict]:
    return [row for split in SPLITS for row in version.table(split).to_pylist()]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a version but what has a date and the input's place in it."""
    dated = {"manifest.json", "report.html", "report.json"}
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in dated)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# -------------------------------------------------------------------------------------------------- what a version is


def test_every_defect_is_found_and_every_good_picture_kept(dirty: Made) -> None:
    rejects = dirty.version.table("rejects").to_pylist()
    assert {row["file_name"]: row["reason"] for row in rejects} == REJECTED
    kept = {row["file_name"] for row in everything(dirty.version)}
    plain = {f"train_data/{number:04d}.jpg" for number in range(PICTURES)} - {"train_data/0001.jpg"}
    # of two files with the same pixels the smaller one stays
    assert kept == (plain | KEPT_BESIDES | {"train_data/0001.jpg"})
    assert dirty.version.manifest.rejects == dict(Counter(REJECTED.values()) | {"contradictory_labels": 2})


def test_rows_say_what_the_files_are(dirty: Made) -> None:
    rows = {row["file_name"]: row for row in everything(dirty.version)}
    for row in rows.values():
        original = (dirty.raw / row["file_name"]).read_bytes()
        assert row["image"] == original
        assert row["id"] == hashlib.sha256(original).hexdigest()
        assert row["bytes"] == len(original)
    assert (rows["train_data/png.jpg"]["format"], rows["train_data/png.jpg"]["jpeg_quality"]) == ("PNG", None)
    assert rows["train_data/cmyk.jpg"]["mode"] == "CMYK"
    assert rows["train_data/gray.jpg"]["group"] == rows["train_data/0003.jpg"]["group"]
    assert rows["train_data/resized.jpg"]["group"] == rows["train_data/0002.jpg"]["group"]
    plain = rows["train_data/0010.jpg"]
    assert (plain["label"], plain["source"], plain["generator"]) == ("human", "there", "photo")
    assert (plain["width"], plain["height"], plain["jpeg_quality"]) == (96, 72, 90)


def test_splits_are_as_asked_and_shards_small_and_in_order(dirty: Made) -> None:
    version = dirty.version
    counts = version.manifest.counts
    total = sum(counts.values())
    assert {
        split: pytest.approx(share * total, abs=6)
        for split, share in {"production": 0.1, "test": 0.15, "train": 0.6, "val": 0.15}.items()
    } == counts
    for split in SPLITS:
        ids = []
        for path in version.files(split):
            file = pq.ParquetFile(path)
            assert file.schema_arrow.equals(SCHEMAS["aivshuman"])
            assert file.metadata.num_row_groups == 1
            assert file.metadata.num_rows <= 256
            ids += file.read(["id"])["id"].to_pylist()
        assert ids == sorted(ids)
        assert set(version.table(split, ["split"])["split"].to_pylist()) == {split}
    assert sum(len(version.files(split)) for split in SPLITS) > 4


def test_no_group_is_on_two_sides(dirty: Made, photos: Made) -> None:
    for version in (dirty.version, photos.version):
        rows = everything(version)
        brute_force(rows)
        assert {row["group"] for row in rows} <= {row["id"] for row in rows}, "a group is named by one of its own"


def brute_force(rows: list[dict]) -> None:
    """Compare every pair of hashes: near ones are in one group, and a group is in one split."""
    import numpy as np

    hashes = np.array([int(row["phash"], 16) for row in rows], dtype=np.uint64)
    for row, value in zip(rows, hashes, strict=True):
        for index in np.flatnonzero(np.bitwise_count(hashes ^ value) <= 6):
            assert (row["group"], row["split"]) == (rows[index]["group"], rows[index]["split"])
    sides = {(row["group"], row["split"]) for row in rows}
    assert len(sides) == len({group for group, _ in sides})
    assert len({row["id"] for row in rows}) == len(rows)


def test_a_version_is_opened_by_its_place_or_its_name(dirty: Made) -> None:
    version = dirty.version
    for place in (version.location, version.location.parent, str(version.location)):
        assert open_version(place).manifest == version.manifest
    dataset = version.read("val", ["id", "label"])
    assert sorted(row["id"] for row in dataset.iter_rows()) == version.table("val", ["id"])["id"].to_pylist()
    with pytest.raises(DataError, match="no split"):
        version.files("validation")
    with pytest.raises(DataError, match="no prepared data set"):
        open_version(dirty.raw)


def test_captions_are_kept_together_cleaned_and_raw(photos: Made) -> None:
    rows = everything(photos.version)
    assert len(rows) == 200
    for row in rows:
        number = int(row["file_name"].removeprefix("Images/").removesuffix(".jpg")) - 1000
        assert row["raw_captions"] == [f'A dog, number {number}, "runs" for the {place}th time .' for place in range(5)]
        assert row["captions"] == [clean_caption(text) for text in row["raw_captions"]]
    assert sum(photos.version.manifest.captions.values()) == 1000


def test_the_defects_of_real_data(shared_data: Path, ray: None, tmp_path: Path) -> None:
    """What was found in a set that is dirty on purpose: each defect under its reason, and no other picture lost."""
    expected = json.loads((Path(__file__).parent / "aivshuman_mini.json").read_text())
    version = prepare(AivshumanConfig(input=str(shared_data / "aivshuman-mini"), output=str(tmp_path))).version
    rejects = version.table("rejects").to_pylist()
    assert {short(row["file_name"]): row["reason"] for row in rejects} == expected["rejected"]
    assert version.manifest.rejects["contradictory_labels"] == 2
    columns = ["id", "file_name", "phash", "group", "split", "label"]
    rows = [row for split in SPLITS for row in version.table(split, columns).to_pylist()]
    with (shared_data / "aivshuman-mini/train.csv").open() as file:
        listed = {row["file_name"] for row in csv.DictReader(file)}
    assert {row["file_name"] for row in rows} == {n for n in listed if short(n) not in expected["rejected"]}
    assert (len(rows), version.manifest.input_rows) == (expected["kept"], expected["rows"])
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(short(row["file_name"]))
    assert sorted(sorted(names) for names in groups.values() if len(names) > 1) == expected["groups"]
    brute_force(rows)


def short(file_name: str) -> str:
    return file_name.rsplit("/", 1)[-1][:9]


def test_the_starter_captioners_split_is_its_own(shared_data: Path) -> None:
    from train.captions import read_captions, split_photos

    folder = shared_data / "flickr8k-224"
    ours = starter_captioner_splits(read_flickr30k(RawInput.of(str(folder))).rows)
    theirs = {
        photo_number(p.name): split for split, found in split_photos(read_captions(folder)).items() for p in found
    }
    assert ours == theirs


@pytest.mark.proof
def test_the_starter_detectors_split_is_its_own(shared_data: Path, ray: None, tmp_path: Path) -> None:
    from train.aivshuman import read_pictures

    folder = shared_data / "aivshuman-mini"
    version = prepare(AivshumanConfig(input=str(folder), output=str(tmp_path), split="starter")).version
    ours = {row["id"]: row["split"] for split in SPLITS for row in version.table(split, ["id", "split"]).to_pylist()}
    theirs = {picture.id: picture.split for picture in read_pictures(folder)[0]}
    assert len(ours.keys() & theirs.keys()) >= 1268
    assert [id_ for id_ in ours.keys() & theirs.keys() if ours[id_] != theirs[id_]] == []
    assert {ours[id_] for id_ in ours.keys() - theirs.keys()} <= {"train"}


# ------------------------------------------------------------------------------------- nothing else decides about it


def test_a_second_run_does_nothing(dirty: Made) -> None:
    output = Path(dirty.version.location.path).parent.parent
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    again = prepare(AivshumanConfig(input=str(dirty.raw), output=str(output)))
    assert not again.fresh
    assert again.version.manifest == dirty.version.manifest
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_times_of_change_do_not_make_a_version_but_content_and_settings_do(photos: Made, tmp_path: Path) -> None:
    raw = shutil.copytree(photos.raw, tmp_path / "raw")
    for path in raw.rglob("*"):
        os.utime(path, (1, 1))
    output = Path(photos.version.location.path).parent.parent
    same = prepare(Flickr30kConfig(input=str(raw), output=str(output)))
    assert (same.fresh, same.version.manifest.version) == (False, photos.version.manifest.version)
    other = prepare(Flickr30kConfig(input=str(raw), output=str(output), seed=1))
    assert (other.fresh, other.version.manifest.version != photos.version.manifest.version) == (True, True)
    captions = (raw / "captions.txt").read_text()
    (raw / "captions.txt").write_text(captions.replace("A dog, number 7,", "A cat, number 7,"))
    changed = prepare(Flickr30kConfig(input=str(raw), output=str(output)))
    found = {version.manifest.version for version in versions(output / "flickr30k")}
    assert len(found) == 3
    assert open_version(output / "flickr30k").manifest.version == changed.version.manifest.version
    assert not (output / "flickr30k/.work").exists()


def test_what_another_revision_of_the_program_left_is_not_used(
    ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make_flickr(tmp_path / "raw", range(24))
    config = Flickr30kConfig(input=str(raw), output=str(tmp_path / "out"))
    before = prepare(config)
    with pytest.raises(DataError, match="enough_pictures"):
        prepare(config.model_copy(update={"seed": 1, "min_pictures": 25}))  # leaves the particulars
    monkeypatch.setattr("data.publish._REVISION", 1000)
    after = prepare(config)
    assert (before.fresh, after.fresh, after.identified.pictures) == (True, True, 24)
    assert after.version.manifest.version != before.version.manifest.version
    assert not prepare(config).fresh


def test_a_zip_gives_the_same_version(photos: Made, tmp_path: Path) -> None:
    packed = zipped(photos.raw, tmp_path / "set.zip", "flickr30k/")
    prepared = prepare(Flickr30kConfig(input=str(packed), output=str(tmp_path / "out")))
    assert prepared.fresh
    assert prepared.version.manifest.version == photos.version.manifest.version
    assert content(Path(prepared.version.location.path)) == content(Path(photos.version.location.path))


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.proof)])
def test_s3_gives_the_same_version(photos: Made, s3: S3Server, packed: bool, tmp_path: Path) -> None:
    if packed:
        zipped(photos.raw, s3.folder / "bucket/set.zip")
    else:
        shutil.copytree(photos.raw, s3.folder / "bucket/raw", dirs_exist_ok=True)
    place = "s3://bucket/set.zip" if packed else "s3://bucket/raw"
    prepared = prepare(Flickr30kConfig(input=place, output=f"s3://bucket/out-{packed}"))
    assert prepared.fresh
    assert prepared.version.manifest.version == photos.version.manifest.version
    copied = s3.folder / f"bucket/out-{packed}/flickr30k" / prepared.version.manifest.version
    assert content(copied) == content(Path(photos.version.location.path))
    again = prepare(Flickr30kConfig(input=place, output=f"s3://bucket/out-{packed}"))
    assert not again.fresh
    assert prepared.version.read("val", ["id"]).count() == photos.version.manifest.counts["val"]
    assert not (s3.folder / f"bucket/out-{packed}/flickr30k/.work").exists()


def command(*arguments: str, home: Path | None = None) -> subprocess.Popen[str]:
    """The command line in a process of its own, with a Ray of its own and nobody's Kaggle credentials."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KAGGLE_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "data.prepare", *arguments],
        cwd=ROOT,
        env=environment | ({"HOME": str(home)} if home else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.proof
def test_one_cpu_and_a_kill_give_the_same_version(dirty: Made, tmp_path: Path) -> None:
    arguments = ("aivshuman", "--input", str(dirty.raw), "--output", str(tmp_path / "out"))
    single = (*arguments, "--num-cpus", "1", "--object-store-bytes", str(100 * 2**20))
    killed = command(*single)
    work = tmp_path / "out/aivshuman/.work"
    while not list(work.glob("particulars-*/*.parquet")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert versions(tmp_path / "out/aivshuman") == []
    finished = command(*single)
    output, errors = finished.communicate(timeout=300)
    assert finished.returncode == 0, errors
    assert "were identified by an earlier run" in output
    version = open_version(tmp_path / "out/aivshuman")
    assert version.manifest.version == dirty.version.manifest.version
    assert content(Path(version.location.path)) == content(Path(dirty.version.location.path))
    assert not work.exists()


def test_a_shard_that_is_there_is_not_written_again(dirty: Made, tmp_path: Path) -> None:
    """A run killed while it wrote: its shards count, its half-written file does not."""
    version = dirty.version.manifest.version
    staging = tmp_path / f"out/aivshuman/.work/version-{version}/train"
    staging.mkdir(parents=True)
    first = Path(dirty.version.files("train")[0])
    shutil.copy(first, staging)
    (staging / "00001.parquet.abcd.part").write_bytes(b"half")
    stamp = staging.joinpath(first.name).stat().st_mtime_ns
    prepared = prepare(AivshumanConfig(input=str(dirty.raw), output=str(tmp_path / "out")))
    assert prepared.fresh
    assert prepared.written.pictures == sum(prepared.version.manifest.counts.values()) - 256
    assert Path(prepared.version.files("train")[0]).stat().st_mtime_ns == stamp
    assert prepared.version.manifest.version == version
    assert content(Path(prepared.version.location.path)) == content(Path(dirty.version.location.path))


# ---------------------------------------------------------------------------------------------- splits that are given


def test_photos_of_another_corpus_fall_where_they_are_there(photos: Made, tmp_path: Path) -> None:
    raw = make_flickr(tmp_path / "raw", range(100, 260), secret="_5ec3e7")
    config = Flickr30kConfig(
        input=str(raw),
        output=str(tmp_path / "out"),
        with_version=[str(photos.version.location)],
        source_name="flickr8k",
    )
    rows = everything(prepare(config).version)
    there = {row["file_name"].split("/")[1].split(".")[0]: row["split"] for row in everything(photos.version)}
    both = [row for row in rows if row["file_name"].split("/")[1].split("_")[0] in there]
    assert (len(rows), len(both)) == (160, 100)
    assert all(row["split"] == there[row["file_name"].split("/")[1].split("_")[0]] for row in both)
    assert {row["source"] for row in rows} == {"flickr8k"}


def test_published_lists(photos: Made, tmp_path: Path) -> None:
    for split, numbers in {
        "train": range(1000, 1150),
        "val": range(1150, 1170),
        "test_2016": range(1170, 1195),
    }.items():
        (tmp_path / f"split_{split}.txt").write_text("".join(f"{number}.jpg\n" for number in numbers))
    config = Flickr30kConfig(
        input=str(photos.raw), output=str(tmp_path / "out"), split="published", lists=str(tmp_path)
    )
    version = prepare(config).version
    assert version.manifest.counts == {"train": 155, "val": 20, "test": 25, "production": 0}
    names = version.table("test", ["file_name"])["file_name"].to_pylist()
    assert sorted(names) == [f"Images/{number}.jpg" for number in range(1170, 1195)]
    with pytest.raises(DataError, match="is empty"):
        version.read("production")
    with pytest.raises(DataError, match="belong together"):
        prepare(config.model_copy(update={"lists": None}))
    (tmp_path / "split_val.txt").write_text("1000.jpg\n")
    with pytest.raises(DataError, match="disagree"):
        prepare(config)


@pytest.mark.proof
def test_the_source_set_is_made_of_the_other_two(dirty: Made, photos: Made, tmp_path: Path) -> None:
    config = SourceConfig(
        aivshuman=str(dirty.version.location), flickr30k=str(photos.version.location), output=str(tmp_path)
    )
    prepared = prepare(config)
    rows = everything(prepared.version)
    assert prepared.version.schema.equals(SCHEMAS["source"])
    origin = {row["id"]: row for version in (dirty.version, photos.version) for row in everything(version)}
    for row in rows:
        assert row["image"] == origin[row["id"]]["image"]
        assert row["split"] == origin[row["id"]]["split"]
        assert row["label"] == ("stock" if origin[row["id"]].get("label") == "human" else "platform")
        assert origin[row["id"]].get("label") != "ai"
    brute_force(rows)
    balance = prepared.version.manifest.class_balance
    assert all(counts["stock"] == counts["platform"] for counts in balance.values())
    assert prepared.version.manifest.rejects == {"balance": 302 + 200 - len(rows)}
    assert not prepare(config).fresh
    with pytest.raises(DataError, match="is a version of flickr30k: give one of aivshuman"):
        prepare(config.model_copy(update={"aivshuman": str(photos.version.location)}))


# --------------------------------------------------------------------------------------------------------- bad input


def test_a_rule_that_fails_publishes_nothing(dirty: Made, tmp_path: Path) -> None:
    config = AivshumanConfig(input=str(dirty.raw), output=str(tmp_path), max_rejected_share=0.01)
    with pytest.raises(DataError, match=r"few_rejects \(.*--allow-failed"):
        prepare(config)
    assert versions(tmp_path / "aivshuman") == []
    allowed = prepare(config.model_copy(update={"allow_failed": ["few_rejects"]}))
    assert allowed.fresh
    assert not allowed.version.manifest.checks["few_rejects"].passed
    assert allowed.version.manifest.version == dirty.version.manifest.version


def test_a_picture_that_changes_under_way_is_noticed(photos: Made, tmp_path: Path, ray: None) -> None:
    raw = shutil.copytree(photos.raw, tmp_path / "raw")
    config = Flickr30kConfig(input=str(raw), output=str(tmp_path / "out"), max_group_share=0.001, min_pictures=201)
    with pytest.raises(DataError, match="enough_pictures"):
        prepare(config)  # leaves the particulars
    victim = raw / "Images/1003.jpg"
    status, data = victim.stat(), bytearray(victim.read_bytes())
    data[-10] ^= 1
    victim.write_bytes(data)
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match=r"Images/1003\.jpg .* changed while it was being prepared"):
        prepare(config.model_copy(update={"min_pictures": 8}))
    assert versions(tmp_path / "out/flickr30k") == []


def test_s3_that_is_not_there_or_refuses(photos: Made, s3: S3Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no bucket for s3://nowhere/raw"):
        prepare(Flickr30kConfig(input="s3://nowhere/raw", output=str(tmp_path)))
    with pytest.raises(DataError, match="no bucket for s3://nowhere/out"):
        prepare(Flickr30kConfig(input=str(photos.raw), output="s3://nowhere/out"))


def test_the_command_ends_with_the_message_and_a_status(tmp_path: Path) -> None:
    cases = {
        "does not exist": ("--input", str(tmp_path / "none"), "--output", str(tmp_path / "out")),
        "give either --input": ("--output", str(tmp_path / "out")),
        "--test-share: Input should be less than 1": ("--output", str(tmp_path / "out"), "--test-share", "2"),
        "leave nothing to train on": ("--output", "x", "--test-share", "0.6", "--production-share", "0.4"),
        "no Kaggle credentials": ("--download", "--output", str(tmp_path / "out")),
    }
    running = {message: command("aivshuman", *arguments, home=tmp_path) for message, arguments in cases.items()}
    for message, process in running.items():
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2, errors
        assert message in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.parquet"))


@pytest.mark.skipif(not shutil.which("unshare") or os.getuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk(dirty: Made, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    script = (
        f"mount -t tmpfs -o size=1m tmpfs {disk} && {sys.executable} -m data.prepare aivshuman --num-cpus 1 "
        f"--object-store-bytes {100 * 2**20} --input {dirty.raw} --output {disk}; "
        f"code=$?; ls -A {disk}/aivshuman; exit $code"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert f"disk is full at {disk}" in done.stderr
    assert done.stdout.splitlines()[-1] == ".work"
