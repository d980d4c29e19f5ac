"""Proofs that take minutes: one worker and two see the same losses under DDP and FSDP, and whatever is killed, a run
ends with as many steps as an undisturbed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.training import Driver
from data.session import RaySettings, ray_session
from tests.train.small import labelled_version, tiny_vit
from train import captioner, detector
from train.captioning import CaptionerTraining
from train.detector import DetectorTraining

pytestmark = pytest.mark.proof


def _run(folder: Path, data: Path, model: Path) -> dict[str, Any]:
    """Settings of a run of 10 epochs, whatever it trains."""
    return {
        "data": str(data),
        "model": str(model),
        "output": str(folder / "out"),
        "storage": str(folder / "runs"),
        "epochs": 10,
        "batch_size": 8,
        "learning_rate": 2e-3,
        "record": False,
        "threads": 1,
        "num_cpus": 4,
    }


def settings(folder: Path, **changes: Any) -> DetectorTraining:
    """A detector's, of 12 steps an epoch."""
    values = _run(folder, folder / "data" / "aivshuman", folder / "vit") | {"head": "keep"}
    return DetectorTraining.model_validate(values | changes)


def captioner_settings(folder: Path, photos: Path, blip: Path, **changes: Any) -> CaptionerTraining:
    """A captioner's."""
    return CaptionerTraining.model_validate(_run(folder, photos, blip) | {"dropout": 0.0} | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    labelled_version(tmp_path / "data", train=96, val=16)
    tiny_vit(tmp_path / "vit", ("human", "ai"))
    return tmp_path


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("model", ["detector", "captioner"])
def test_one_worker_and_two_see_the_same_losses(folder: Path, photos: Path, blip: Path, model: str) -> None:
    train: Any = detector.train if model == "detector" else captioner.train
    curves = {}
    with ray_session(RaySettings(num_cpus=4)):
        for strategy in ("ddp", "fsdp"):
            for count in (1, 2):
                name = f"{strategy}{count}"
                changes = {"strategy": strategy, "num_workers": count, "lanes": 2, "max_steps": 50, "augment": False}
                changes |= {"name": name, "output": str(folder / name)}
                run: Any = (
                    settings(folder, **changes)
                    if model == "detector"
                    else captioner_settings(folder, photos, blip, **changes)
                )
                outcome = train(run)
                assert outcome.steps == 50
                curves[strategy, count] = np.array([loss for _, loss in outcome.losses])
    first = curves["ddp", 1]
    assert first[-5:].mean() < 0.9 * first[:5].mean()
    for key, curve in curves.items():
        assert np.abs(curve / first - 1).max() <= 1e-3, key


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("victim", "strategy"), [("worker", "ddp"), ("driver", "ddp"), ("worker", "fsdp")])
def test_whatever_is_killed_the_run_ends_with_as_many_steps(folder: Path, victim: str, strategy: str) -> None:
    run = settings(folder, name="killed", num_workers=2, checkpoint_every=5, strategy=strategy)
    driver = Driver(run, folder / "log")
    try:
        driver.wait_for(30)
        if victim == "worker":
            driver.kill_worker()
        else:
            driver.kill()
            driver = Driver(run, folder / "log")
        ended = driver.finish()
    finally:
        if driver.process.poll() is None:
            driver.kill()
    assert ended["steps"] == 120
    assert ended["resumed_after"] and 0 < ended["resumed_after"][0] < 120
    assert ended["val_auc"] > 0.9
    assert (folder / "out" / "card.json").is_file()
