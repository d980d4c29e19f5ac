"""The two sides of the comparison differ in what is watched and kept, and in nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.config import AppArgs, read_serve_config
from benchmarks.observability import ObservabilityConfig, environment, interval, write_side
from deployments import metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config() -> ObservabilityConfig:
    return ObservabilityConfig(config=ROOT / "serve_config.cpu.yaml")


def test_the_sides_are_the_committed_configuration_but_for_what_is_watched(
    config: ObservabilityConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PORT", raising=False)
    on, off = (read_serve_config(write_side(config, side, tmp_path)) for side in ("on", "off"))  # type: ignore[arg-type]
    assert on["logging_config"] == {"encoding": "JSON"} and off["logging_config"]["log_level"] == "ERROR"
    (mine,), (theirs,) = on["applications"], off["applications"]
    assert AppArgs.model_validate(mine["args"]).store.keep == "all"
    assert AppArgs.model_validate(theirs["args"]).store.keep == "off"
    assert mine["deployments"] == theirs["deployments"] and mine["args"]["limits"] == theirs["args"]["limits"]
    scaling = [one["autoscaling_config"] for one in mine["deployments"] if "autoscaling_config" in one]
    assert all(one["max_replicas"] == one["min_replicas"] or one["min_replicas"] == 0 for one in scaling)


def test_a_sides_environment_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "8000")
    monkeypatch.delenv("DEEPTRUST_TRACES", raising=False)
    with environment("on", tmp_path):
        assert os.environ["DEEPTRUST_TRACES"] == str(tmp_path / "traces") and "PORT" not in os.environ
        assert not metrics.Metrics()._off
    with environment("off", tmp_path):
        assert "DEEPTRUST_TRACES" not in os.environ
        metrics.Metrics().record("no metric has this name", 1.0)  # and none is asked for it
    assert os.environ["PORT"] == "8000" and "DEEPTRUST_METRICS" not in os.environ


def test_the_interval_holds_the_mean_and_narrows() -> None:
    few, many = (interval([0.95, 1.0, 0.99, 0.97] * times) for times in (1, 8))
    for mean, low, high in (few, many):
        assert low < mean < high and mean == pytest.approx(0.9773, abs=1e-3)
    assert many[2] - many[1] < few[2] - few[1]
    # six pairs as they were measured: a bootstrap would say 0.93 to 1.08
    mean, low, high = interval([1.0883, 0.9165, 0.9096, 1.1686, 0.9376, 0.9915])
    assert low < 0.90 and high > 1.10 and mean == pytest.approx(0.998, abs=0.01)
