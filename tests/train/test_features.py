"""Features computed once, in processes of Ray's: whom they let go first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray

from data.locations import Location
from data.session import RaySettings, ray_session
from train import giving_way
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
    """An encoder that takes its time and changes nothing."""

    def load(self) -> Callable[[np.ndarray], np.ndarray]:
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
