"""What a run tells operators while it trains."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.util import metrics

from deployments.metrics import METRICS
from train.gauges import Gauges
from train.job import LoopConfig
from train.watch import Watch


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, dict[str, str]]]:
    """What Ray's gauges were set to."""
    told: list[tuple[str, float, dict[str, str]]] = []
    monkeypatch.setattr(metrics.Gauge, "set", lambda self, value, tags: told.append((self.info["name"], value, tags)))
    return told


def watch(folder: Path, gauges: Gauges | None) -> Watch:
    """A watch that has seen steps 1 to 4 in two seconds."""
    made = Watch(LoopConfig(batch_size=16), 10, folder, say=lambda _: None, gauges=gauges)
    made.began, made.ended, made.began_step = 0.0, 2.0, 0
    trainer: Any = SimpleNamespace(max_steps=10, optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])])
    made._tell(trainer, [3, 4], [0.75, 0.5])
    return made


def test_step_loss_speed_and_data_of_a_run(told: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    watch(tmp_path, Gauges("run-7", "aivshuman 0123456789ab"))
    run = {"run": "run-7"}
    assert told == [
        ("deeptrust_training_step", 4, run),
        ("deeptrust_training_loss", 0.5, run),
        ("deeptrust_training_samples_per_second", 32.0, run),
        ("deeptrust_training_data", 1, run | {"version": "aivshuman 0123456789ab"}),
    ]
    assert all(set(tags) == set(METRICS[name.removeprefix("deeptrust_")].labels) for name, _, tags in told)


def test_where_ray_does_not_run_nothing_is_told(
    told: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    watch(tmp_path, Gauges("run-7", "aivshuman 0123456789ab"))
    watch(tmp_path, None)
    assert told == []
