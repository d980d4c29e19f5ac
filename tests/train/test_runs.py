"""Whole runs through Ray Train: one that the clock stopped goes on and ends as a checkpoint that serves; features of a
frozen tower are computed once; a loss that is no number ends a run with its reason. Each run starts its workers anew,
which takes most of a minute on two cores: these are proofs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.session import RaySettings, ray_session
from data.versions import open_version
from deployments.captioner import CaptionerModel
from deployments.checkpoints import open_checkpoint
from deployments.detector import DetectorModel
from deployments.images import decode
from deployments.views import render
from tests.train.small import coloured, flags, traced
from tests.train.test_captioner import job_of, module_of, named
from tests.train.test_detector import arguments
from train import captioner, detector
from train.augment import BlipAugment
from train.captioner import main as main_captioner
from train.detector import DetectorTraining, main, prepare_job
from train.stream import Pictures
from train.tracking import TrackingConfig, connect

pytestmark = pytest.mark.proof


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    with ray_session(RaySettings(num_cpus=4, object_store_bytes=200 * 2**20)):
        yield


def test_a_run_that_the_clock_stopped_goes_on_and_its_checkpoint_serves(
    ray_here: None, version: Path, vit: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recorded = {
        "record": True,
        "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db",
        "tracking.artifacts": tmp_path / "artifacts",
        "tracking.system-metrics-s": 0,
    }
    main(arguments(version, vit, tmp_path, time_limit="1s", **recorded))
    assert "the same command goes on" in capfd.readouterr().out
    assert not (tmp_path / "out").exists()
    main(arguments(version, vit, tmp_path, **recorded))
    assert "trained in 48 steps" in capfd.readouterr().out

    checkpoint = open_checkpoint(tmp_path / "out", "test")
    card = checkpoint.card
    assert card.task == "detection" and card.labels == ["human", "ai"]
    assert card.thresholds.human_below <= card.thresholds.ai_above
    assert card.dataset["version"] == version.name
    assert card.metrics["val_auc"] > 0.8
    model = DetectorModel(checkpoint)
    views = np.stack([render(decode(traced(number, number % 2)).image, model.views) for number in range(100, 120)])
    probabilities = model.detect(views)
    assert probabilities[1::2].mean() > probabilities[::2].mean() + 0.2

    client = connect(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    (run,) = client.search_runs([client.get_experiment_by_name("detector").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.inputs.dataset_inputs[0].dataset.digest == version.name
    assert {"val_auc", "train_loss", "samples_per_s"} <= set(run.data.metrics)
    logged = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"checkpoint", "samples.png"} <= logged

    # what is finished is not trained again, and other settings are another run
    shutil.rmtree(tmp_path / "out")
    main(arguments(version, vit, tmp_path, **recorded))
    assert "nothing was trained; give another --name" in capfd.readouterr().out
    assert open_checkpoint(tmp_path / "out", "test").revision == checkpoint.revision
    assert len(client.search_runs([run.info.experiment_id])) == 1
    with pytest.raises(SystemExit):
        main(arguments(version, vit, tmp_path, learning_rate=1e-3))
    assert "learning_rate" in capfd.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run_with_the_reason(
    ray_here: None, version: Path, vit: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tracked = {"record": True, "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db", "tracking.system-metrics-s": 0}
    with pytest.raises(SystemExit) as ended:
        main(arguments(version, vit, tmp_path, learning_rate=1e30, gradient_clip=0, warmup=0, **tracked))
    assert ended.value.code == 1
    assert "the loss is" in capfd.readouterr().err
    client = connect(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    (run,) = client.search_runs([client.get_experiment_by_name("detector").experiment_id])
    assert run.info.status == "FAILED" and "the loss is" in run.data.tags["deeptrust.failure"]
    assert not (tmp_path / "out").exists()


def test_a_frozen_tower_is_asked_once_and_gives_the_same_logits(
    ray_here: None, version: Path, vit: Path, tmp_path: Path
) -> None:
    config = DetectorTraining(
        data=str(version), model=str(vit), output=str(tmp_path / "out"), freeze="tower", cache=str(tmp_path / "cache"),
        augment=False, threads=1,
    )  # fmt: skip
    job = detector.with_features(prepare_job(config, open_version(version))[0])
    assert job.features is not None
    module = job.module(10)
    module.freeze_unreached(job.example(module))
    assert {name for name, _ in module.named_trained()} == {"classifier.weight", "classifier.bias"}
    rows = np.arange(5)
    pictures = next(Pictures.of(job.version, "train", job.views).load(0, rows))
    features = next(job.features[0].load(0, rows))
    with torch.no_grad():
        whole = module.logits(module.model, module.prepare(pictures))
        split = module.logits(module.model, module.prepare(features))
    assert torch.allclose(whole, split, atol=0.02)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")}
    detector.with_features(job)
    assert written == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")}


def test_a_run_on_tokens_of_a_frozen_tower_gives_a_captioner_that_serves(
    ray_here: None, photos: Path, blip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = {
        "data": photos,
        "model": blip,
        "output": tmp_path / "out",
        "storage": tmp_path / "runs",
        "cache": tmp_path / "cache",
        "freeze": "tower",
        "epochs": 40,
        "batch-size": 8,
        "learning-rate": 1e-2,
        "validate-every": 60,
        "record": False,
        "threads": 1,
        "length-penalty": 0.7,
    }
    main_captioner(flags(values))
    assert "trained in 240 steps" in capfd.readouterr().out
    checkpoint = open_checkpoint(tmp_path / "out", "test")
    assert checkpoint.card.generation["length_penalty"] == 0.7
    assert checkpoint.card.dataset["version"] == photos.name
    before, after = (load_file(folder / "model.safetensors") for folder in (blip, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("vision_model"))
    model = CaptionerModel(checkpoint)
    numbers = range(100, 112)
    captions = model.caption(np.stack([render(decode(coloured(number)[0]).image, model.views) for number in numbers]))
    assert named(captions, numbers) >= 10, captions


def test_tokens_of_the_frozen_tower_are_those_of_the_whole_model(
    ray_here: None, photos: Path, blip: Path, tmp_path: Path
) -> None:
    job = captioner.with_features(job_of(photos, blip, freeze="tower", cache=str(tmp_path / "cache")))
    assert job.features is not None
    module = module_of(job)
    module.freeze_unreached(job.example(module))
    assert all(name.startswith("text_decoder") for name, _ in module.named_trained())
    module.eval()
    rows = np.arange(8)
    whole = module.prepare_judged(next(job.val_pictures().load(0, rows)))
    split = module.prepare_judged(next(job.features[1].load(0, rows)))
    with torch.no_grad():
        tokens = module.model.vision_model(module.pixels(whole["pixels"])).last_hidden_state
    assert torch.allclose(split["features"].float(), tokens, atol=5e-3, rtol=5e-3)
    # of another picture they are others: rows 0 to 3 have four colours
    assert (tokens[:4, None] - tokens[None, :4]).abs().mean((2, 3)).fill_diagonal_(1).min() > 0.1
    assert len(module.judge(module.model, split)) == 8


def test_another_epoch_sees_another_version_of_a_photo_under_a_frozen_tower(
    ray_here: None, photos: Path, blip: Path, tmp_path: Path
) -> None:
    one = captioner.with_features(job_of(photos, blip, freeze="tower", cache=str(tmp_path / "cache")))
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")}
    job = captioner.with_features(
        job_of(photos, blip, freeze="tower", cache=str(tmp_path / "cache"), variants=2, augment=True)
    )
    assert kept.items() <= {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")}.items()
    assert one.features is not None and job.features is not None
    assert job.features[1] == one.features[1], "validation sees the photo alone"
    rows = np.arange(8)
    epochs = [next(job.features[0].load(epoch, rows))["features"] for epoch in range(4)]
    assert np.array_equal(epochs[0], next(one.features[0].load(0, rows))["features"])
    assert np.array_equal(epochs[0], epochs[2]) and np.array_equal(epochs[1], epochs[3])
    module = module_of(job).eval()
    augmented = module.prepare_judged(next(job.train_pictures(BlipAugment()).load(1, rows)))
    with torch.no_grad():
        tokens = module.model.vision_model(module.pixels(augmented["pixels"])).last_hidden_state
    assert torch.allclose(torch.from_numpy(epochs[1]).float(), tokens, atol=5e-3, rtol=5e-3)
    assert np.abs(epochs[1] - epochs[0]).mean((1, 2)).min() > 0.01
