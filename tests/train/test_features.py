"""Features computed once, in processes of Ray's: what these reserve and see, and whom they let go first."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data

from data.errors import DataError
from data.locations import Location
from data.session import RaySettings, ray_session
from data.versions import open_version
from train import captioner, captioning, detector, features, giving_way
from train.features import compute_features
from train.giving_way import Resource
from train.stream import Batch

ROWS, SHARDS = 128, 8


@dataclass(frozen=True)
class Numbers:
    """A source whose pictures are the rows' numbers."""

    groups: tuple[int, ...] = (ROWS,) * SHARDS
    window: int = 4096

    def load(self, epoch: int, rows: np.ndarray) -> Iterator[Batch]:
        yield {"pixels": rows[:, None], "row": rows}


class Slow:
    """An encoder that takes its time and changes nothing, where no GPU is to be seen."""

    def load(self) -> Callable[[np.ndarray], np.ndarray]:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""

        def encode(values: np.ndarray) -> np.ndarray:
            time.sleep(0.6)
            return values

        return encode


def test_a_replica_that_waits_gets_the_cpus_and_nothing_is_computed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"_ASK_S": 0.05, "_SETTLED_S": 0.5}.items():
        monkeypatch.setattr(giving_way, name, value)
    place = Location.of(str(tmp_path / "features"))
    had: set[str] = set()

    def waiting(resource: Resource) -> Mapping[str, str]:
        """A replica that comes when the first shard is there, and starts when all CPUs are free."""
        shards = {entry.name for entry in place.files()}
        if had or not shards:
            return {}
        if ray.available_resources().get("CPU", 0.0) == ray.cluster_resources()["CPU"]:
            had.update(shards)
        return {"a": "Captioner"}

    with ray_session(RaySettings(num_cpus=1, object_store_bytes=100 * 2**20)):
        features = compute_features(Numbers(), Slow(), place, batch=ROWS, cpus=1.0, give_way_s=0.1, ask=waiting)
    assert 1 <= len(had) < SHARDS
    said = capsys.readouterr().out
    assert "stopped, serving wants room for Captioner" in said
    assert f"features of the frozen tower: {(SHARDS - len(had)) * ROWS}/{(SHARDS - len(had)) * ROWS}" in said
    (block, *_) = features.load(0, np.arange(ROWS * SHARDS - 1, 0, -200))
    assert block["features"][:, 0].tolist() == np.arange(ROWS * SHARDS - 1, 0, -200, dtype=np.float16).tolist()


def test_a_shard_on_s3_is_fetched_once_for_its_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fetch(shard: Location) -> bytes:
        fetched.append(shard.name)
        return Path(shard.path).read_bytes()

    values = np.arange(ROWS * SHARDS, dtype=np.float16)[:, None]
    for shard in range(SHARDS):
        np.save(tmp_path / f"0-{shard:05d}.npy", values[shard * ROWS : (shard + 1) * ROWS])
    monkeypatch.setattr(Location, "is_local", False)
    monkeypatch.setattr(Location, "read_bytes", fetch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    stored = features.Features(Location.of(str(tmp_path)), (ROWS,) * SHARDS)
    rows = np.random.default_rng(0).permutation(ROWS * SHARDS)
    assert np.array_equal(np.concatenate([block["features"] for block in stored.load(0, rows)]), values[rows])
    assert sorted(fetched) == [f"0-{shard:05d}.npy" for shard in range(SHARDS)]
    assert list((tmp_path / "scratch").iterdir()) == []  # whatever ends the process, nothing is left


class Stage:
    """A Ray Data that computes each shard here, and what it was asked for."""

    def __init__(self, blocks: list[pa.Table]) -> None:
        self.blocks, self.asked = blocks, dict[str, Any]()

    def map_batches(self, function: Any, **options: Any) -> Stage:
        # what Ray Data itself refuses where there are GPUs
        assert isinstance(options["batch_size"], int)
        self.encode, self.asked = function(**options["fn_constructor_kwargs"]), options
        return self

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        return map(self.encode, self.blocks)


class Same:
    """An encoder that changes nothing."""

    def load(self) -> Callable[[np.ndarray], np.ndarray]:
        return lambda values: values


HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    """Every stage that Ray Data is given, without Ray."""
    found: list[Stage] = []

    def from_blocks(blocks: list[pa.Table]) -> Stage:
        found.append(Stage(blocks))
        return found[-1]

    monkeypatch.setattr(ray.data, "from_blocks", from_blocks)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    return found


@pytest.mark.parametrize(
    ("here", "gpus", "share", "size"),
    [
        (0, -1, 0, 3),
        (2, 0, 0, 3),
        (0, 1, 0, 3),
        (2, -1, 1, 2),  # no more than there are GPUs for
        (8, 2, 2, 3),
        (1, 0.5, 0.5, 2),
    ],
)
def test_a_process_that_encodes_reserves_its_gpu_or_sees_none(
    stages: list[Stage],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    here: float,
    gpus: float,
    share: float,
    size: int,
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0} | ({"GPU": here} if here else {}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///b")  # what `models:/` means goes with them
    compute_features(Numbers(), Same(), Location.of(str(tmp_path)), workers=3, gpus=gpus)
    (stage,) = stages
    assert stage.asked.get("num_gpus", 0) == share
    assert stage.asked["runtime_env"]["env_vars"] == ({} if share else HIDDEN) | {"MLFLOW_TRACKING_URI": "sqlite:///b"}
    assert stage.asked["num_cpus"] == 0.5 and stage.asked["compute"].max_size == size


def test_a_place_too_small_for_all_features_is_said_after_the_first_of_them(
    stages: list[Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2000))
    with pytest.raises(DataError, match=r"--cache"):
        compute_features(Numbers(), Same(), Location.of(str(tmp_path)))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("here", "least", "held"), [(2, 0, ("GPU", 2.0)), (2, 1, ("GPU", 1.0)), (1, 2, ("GPU", 1.0)), (0, 0, ("CPU", 1.5))]
)
def test_way_is_given_to_who_waits_for_what_is_held(
    stages: list[Stage],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    here: int,
    least: int,
    held: tuple[Resource, float],
) -> None:
    asked: list[Resource] = []
    rooms: list[tuple[Resource, float]] = []

    class Way:
        """Serving wants room at once, the first time."""

        def __init__(self, resource: Resource, *_: Any) -> None:
            asked.append(resource)
            self.to = "" if rooms else "Tagger"

        def __enter__(self) -> Way:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def wait_for_room(resource: Resource, amount: float, *_: Any) -> str:
        rooms.append((resource, amount))
        return "room"

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8, "GPU": here})
    monkeypatch.setattr(features, "GiveWay", Way)
    monkeypatch.setattr(features, "wait_for_room", wait_for_room)
    place = Location.of(str(tmp_path))
    compute_features(Numbers(), Same(), place, workers=3, least=least, gpus=-1, give_way_s=30)
    assert asked == [held[0]] * 2 and rooms == [held]
    assert len(place.files()) == SHARDS


@pytest.mark.parametrize("told", [0, 3])
@pytest.mark.parametrize("trainer", [detector, captioner])
def test_a_frozen_tower_has_the_threads_and_the_share_of_gpus_of_a_training_worker(
    version: Path, photos: Path, vit: Path, blip: Path, monkeypatch: pytest.MonkeyPatch, trainer: Any, told: int
) -> None:
    passed: list[dict[str, Any]] = []
    monkeypatch.setattr(features, "compute_features", lambda *_, **options: passed.append(options))
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    is_detector = trainer is detector
    settings: dict[str, Any] = {
        "data": str(version if is_detector else photos),
        "model": str(vit if is_detector else blip),
        "output": "x",
        "freeze": "tower",
        "num_workers": 2,
        "min_workers": 1,
        "gpus_per_worker": 2,
        "threads": told,
    }
    config = (detector.DetectorTraining if is_detector else captioning.CaptionerTraining).model_validate(settings)
    monkeypatch.setattr(detector, "with_statistics", lambda job: job)
    trainer.with_features(trainer.prepare_job(config, open_version(settings["data"]))[0])
    assert [each["threads"] for each in passed] == [told or 8] * 2
    assert all((each["workers"], each["least"], each["gpus"]) == (2, 1, 2) for each in passed)
