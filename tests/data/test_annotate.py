"""Bulk annotation as a whole on one small Ray: the serving models' answers, kills, every kind of place, and a job."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app import cluster
from data.annotate import AnnotateSettings, annotate
from data.annotations import FOLDER, read_annotations
from data.errors import DataError
from data.session import RaySettings, ray_session
from tests.conftest import ROOT, RunningApplication
from tests.data.made import S3Server, encoded, picture, s3_server
from tests.jobs import Jobs
from tests.train.small_models import small_captioner, small_detector

#: Real engines start several times: minutes on two cores.
pytestmark = pytest.mark.proof

SAMPLES = sorted((ROOT / "samples").glob("*.jpg"))


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Before the Ray, whose workers inherit the way to it."""
    with s3_server(tmp_path_factory.mktemp("s3") / "root") as server, pytest.MonkeyPatch.context() as patch:
        (server.folder / "bucket").mkdir()
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def own_ray(s3: S3Server) -> Iterator[None]:
    with ray_session(RaySettings(num_cpus=2, object_store_bytes=200 * 2**20)):
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options with a detector and a captioner that load at once."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "tasks": ("detect", "caption"),
        "detector": {"uri": str(small_detector(folder / "detector")), "actors": 1},
        "captioner": {"uri": str(small_captioner(folder / "captioner")), "actors": 1},
        "shard_pictures": 4,
    }


def folder_of(place: Path, count: int) -> Path:
    place.mkdir(parents=True)
    for number in range(count):
        (place / f"{number:03}.jpg").write_bytes(encoded(picture(number)))
    return place


def run(place: Path | str, output: Path | str, options: dict[str, Any]) -> dict[str, Any]:
    return annotate(AnnotateSettings.model_validate({"input": str(place), "output": str(output)} | options))


def answers(output: Path | str) -> dict[str, tuple[Any, ...]]:
    """What the records say, without how long it took; each id once."""
    records = list(read_annotations(str(output)))
    found = {r.id: (r.sha256, r.detection, r.caption, r.tags, r.models, r.errors) for r in records}
    assert len(found) == len(records)
    return found


# --------------------------------------------------------------------------------------------------- the real models


@pytest.fixture(scope="module")
def annotated(own_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample photos and a broken one, annotated by the three starter models."""
    place, output = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("annotated")
    for sample in SAMPLES:
        shutil.copy(sample, place)
    (place / "broken.jpg").write_bytes(SAMPLES[0].read_bytes()[:2000])
    one = {"actors": 1}
    starters = {
        "detector": {"uri": "starter:detector"} | one,
        "captioner": {"uri": "starter:captioner"} | one,
        "shard_pictures": 3,
    }
    manifest = run(place, output, starters)
    assert manifest["pictures"] == len(SAMPLES) + 1
    assert manifest["errors"] == {"decode: truncated": 1}
    return output


def test_every_photo_has_a_verdict_a_caption_and_tags(annotated: Path) -> None:
    records = {record.id: record for record in read_annotations(annotated)}
    assert sorted(records) == sorted([*(sample.name for sample in SAMPLES), "broken.jpg"])
    for name, record in records.items():
        complete = record.detection and record.caption and record.tags
        if name == "broken.jpg":
            assert [error.stage for error in record.errors] == ["decode"]
            assert not complete
        else:
            assert complete
            assert set(record.models) == {"detector", "captioner", "tagger", "prompt"}
            assert set(record.timings_ms) == {"decode", "detector", "captioner", "tagger", "total"}
            assert not record.errors


@pytest.mark.proof
@pytest.mark.application
def test_records_are_what_the_running_application_answers(annotated: Path, application: RunningApplication) -> None:
    same = 0
    for record in read_annotations(annotated):
        if record.errors:
            continue
        data = (ROOT / "samples" / record.id).read_bytes()
        answer = httpx.post(f"{application.url}/v1/analyze", content=data, timeout=120).json()
        ours = record.model_dump(mode="json")
        assert set(ours) == set(answer)
        for name in ("sha256", "models", "errors"):
            assert ours[name] == answer[name]
        served = answer["detection"]
        assert ours["detection"]["ai_probability"] == pytest.approx(served["ai_probability"], abs=0.02)
        assert ours["detection"]["provenance"] == served["provenance"]
        same += (ours["caption"], ours["tags"]) == (answer["caption"], answer["tags"])
    # in batches of another size, floating point may turn the choice between two words that are nearly as likely
    assert same >= len(SAMPLES) - 1


# ------------------------------------------------------------------------------------------------------ going on


@pytest.mark.proof
def test_a_driver_killed_at_work_loses_nothing_and_does_nothing_twice(
    own_ray: None, small: dict[str, Any], tmp_path: Path
) -> None:
    place, output = folder_of(tmp_path / "photos", 60), tmp_path / "out"
    options = ["--shard-pictures", "4", "--tasks", json.dumps(small["tasks"])]
    for stage in ("detector", "captioner"):
        options += [f"--{stage}.uri", small[stage]["uri"], f"--{stage}.actors", "1"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "data.annotate", "--input", str(place), "--output", str(output), *options],
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"},
        cwd=ROOT,
    )
    records = output / FOLDER
    while driver.poll() is None and not (records.is_dir() and list(records.glob("*.parquet"))):
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {path.name: path.stat().st_mtime_ns for path in records.glob("*.parquet")}
    assert before
    manifest = run(place, output, small)
    after = {path.name: path.stat().st_mtime_ns for path in records.iterdir()}
    assert len(after) == manifest["shards"] == 15
    assert before.items() <= after.items()
    assert sorted(answers(output)) == [f"{number:03}.jpg" for number in range(60)]


def test_what_is_missing_is_done_again_with_the_same_answers(
    own_ray: None, small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, output = folder_of(tmp_path / "photos", 10), tmp_path / "out"
    run(place, output, small)
    first, stamps = answers(output), {path: path.stat().st_mtime_ns for path in (output / FOLDER).iterdir()}
    manifest = (output / "manifest.json").read_text()
    run(place, output, small)
    assert "is complete, nothing is left to do" in capsys.readouterr().out
    assert (output / "manifest.json").read_text() == manifest
    missing = output / FOLDER / "00000001.parquet"
    missing.unlink()
    (output / "manifest.json").unlink()
    run(place, output, small)
    assert "6 pictures are done already" in capsys.readouterr().out
    assert answers(output) == first
    assert {path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp} == {missing}


def test_a_damaged_shard_is_noticed_before_the_annotation_counts_as_complete(
    own_ray: None, small: dict[str, Any], tmp_path: Path
) -> None:
    place, output = folder_of(tmp_path / "photos", 4), tmp_path / "out"
    run(place, output, small | {"tasks": ("detect",)})
    (output / "manifest.json").unlink()
    (output / FOLDER / "00000000.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"00000000\.parquet cannot be read.*run the same again"):
        run(place, output, small | {"tasks": ("detect",)})


# ------------------------------------------------------------------------------------------------------------ places


@pytest.mark.proof
def test_a_folder_a_bucket_and_parquet_give_the_same_answers(
    own_ray: None, s3: S3Server, small: dict[str, Any], tmp_path: Path
) -> None:
    place = folder_of(tmp_path / "photos", 9)
    run(place, tmp_path / "local", small)
    shutil.copytree(place, s3.folder / "bucket" / "photos")
    run("s3://bucket/photos", "s3://bucket/annotated", small)
    rows = [{"id": path.name, "image": path.read_bytes()} for path in sorted(place.iterdir())]
    # row groups of four: the same batches as in shards of four files
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "photos.parquet", row_group_size=4)
    run(tmp_path / "photos.parquet", tmp_path / "from-parquet", small)
    expected = answers(tmp_path / "local")
    assert len(expected) == 9
    assert answers("s3://bucket/annotated") == expected
    assert answers(tmp_path / "from-parquet") == expected
    with pytest.raises(DataError, match=r"holds the annotation of s3://bucket/photos"):
        run(place, "s3://bucket/annotated", small)


def test_the_command_ends_with_a_message_and_a_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data.annotate", "--input", str(tmp_path), "--output", str(tmp_path.parent / "o")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: there is no picture")
    assert "Traceback" not in ended.stderr


# --------------------------------------------------------------------------------------------------------------- job


@pytest.mark.proof
def test_a_job_that_is_stopped_and_submitted_again_finishes_with_the_same_answers(tmp_path: Path) -> None:
    place = tmp_path / "photos"
    place.mkdir()
    for turn in range(6):
        for sample in SAMPLES:
            shutil.copy(sample, place / f"{turn}-{sample.name}")
    port = cluster.free_port(8151)
    instance = cluster.start(port, num_cpus=2, object_store_bytes=400 * 2**20)
    try:
        jobs = Jobs(instance)

        def submit(name: str, output: Path, wait: bool = True) -> subprocess.CompletedProcess[str]:
            entry = ("data.annotate", "--input", str(place), "--output", str(output), "--shard-pictures", "4")
            return jobs.submit(name, *entry, wait=wait)

        assert "relative path" in (refused := submit("relative", Path("out"))).stdout + refused.stderr
        assert submit("whole", tmp_path / "whole").returncode == 0
        output = tmp_path / "stopped"
        assert submit("first", output, wait=False).returncode == 0
        jobs.stop_when("first", lambda: bool(list((output / FOLDER).glob("*.parquet"))))
        done = len(list((output / FOLDER).glob("*.parquet")))
        assert done < 12
        again = submit("second", output)
        assert again.returncode == 0, again.stdout
        assert "are done already" in again.stdout
        whole, resumed = answers(tmp_path / "whole"), answers(output)
        assert sorted(resumed) == sorted(path.name for path in place.iterdir())
        assert sum(whole[name] == resumed[name] for name in whole) >= len(whole) - 1
    finally:
        cluster.stop(port)
