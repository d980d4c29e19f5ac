"""The detector's trainer: heads, weights and tiers of its data, and that what cannot be trained is told before anything
starts."""

from __future__ import annotations

import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.versions import open_version
from deployments.checkpoints import resolve
from deployments.detector import DetectorModel
from deployments.pixels import Normalisation
from deployments.views import render
from tests.train.small import flags, labelled_version
from tests.train.small_models import STRICT, small_classifier, small_detector, write_card
from train import command
from train.classifier import load_classifier, output_layer
from train.detector import DetectorJob, DetectorTraining, main, prepare_job, wants_new_head
from train.labels import LABELS, InTiers, few_of_each, read_annotations
from train.loop import export, fit_locally
from train.module import TrainingError


def arguments(version: Path, vit: Path, folder: Path, **changes: object) -> list[str]:
    values: dict[str, object] = {
        "data": version,
        "model": vit,
        "output": folder / "out",
        "storage": folder / "runs",
        "epochs": 8,
        "batch-size": 8,
        "learning-rate": 3e-3,
        "damage.min-long-side-px": 64,
        "damage.min-quality": 70,
        "record": False,
        "threads": 1,
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    return flags(values)


# --------------------------------------------------------------------------------------------- errors before a start


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere/there/is/none"}, "no such checkpoint"),
        ({"data": "/nowhere/aivshuman"}, "no prepared data set"),
        ({"batch_size": 9, "num_workers": 2}, "does not divide"),
        ({"num_workers": 3, "batch_size": 12, "min_workers": 2}, "multiple of 2"),
        ({"ema": 0.9, "strategy": "fsdp"}, "--ema"),
        ({"ema": 0.9, "precision": "bf16-true"}, "--ema"),
        ({"strategy": "fsdp", "precision": "16-mixed"}, "bf16-mixed"),
        ({"blend": 0.5, "head": "new"}, "--head keep"),
        ({"freeze": "tower", "precision": "bf16-true"}, "--precision"),
        ({"time_limit": "soon"}, "no duration"),
    ],
)
def test_what_cannot_be_trained_is_told_before_workers_start(
    version: Path, vit: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((SystemExit, ValueError)) as ended:
        main(arguments(version, vit, tmp_path, **changes))
    assert message in capfd.readouterr().err + str(ended.value)
    if isinstance(ended.value, SystemExit):
        assert ended.value.code == 1


@pytest.mark.parametrize(
    ("changes", "resources", "reserved"),
    [
        ({}, {"CPU": 8, "GPU": 2}, {"CPU": 0.5, "GPU": 1}),
        ({}, {"CPU": 8}, {"CPU": 0.5}),
        ({"min_workers": 1}, {"CPU": 8, "GPU": 1}, {"CPU": 0.5, "GPU": 1}),  # the other node comes later
        ({"min_workers": 1, "cpus_per_worker": 4}, {"CPU": 5, "GPU": 1}, {"CPU": 4, "GPU": 1}),
        ({"gpus_per_worker": 0}, {"CPU": 8, "GPU": 1}, {"CPU": 0.5}),
        ({"num_workers": 1, "gpus_per_worker": 0.5}, {"CPU": 8, "GPU": 1}, {"CPU": 0.5, "GPU": 0.5}),
        ({"gpus_per_worker": 0.5}, {"CPU": 8, "GPU": 1}, "share a GPU, and NCCL cannot"),
        ({}, {"CPU": 8, "GPU": 1}, "2 workers want a GPU each and this Ray has 1"),
        ({"cpus_per_worker": 4}, {"CPU": 5, "GPU": 2}, "2 workers of 4.0 CPUs .* --num-workers"),
        ({"min_workers": 1, "cpus_per_worker": 4}, {"CPU": 4, "GPU": 1}, "1 workers of 4.0 CPUs .* --min-workers"),
    ],
)
def test_workers_that_must_be_there_decide_what_is_reserved(
    changes: dict[str, Any], resources: dict[str, float], reserved: dict[str, float] | str
) -> None:
    config = DetectorTraining.model_validate({"data": "x", "output": "x", "num_workers": 2} | changes)
    if isinstance(reserved, dict):
        assert command.reservation(config, resources, 0.25) == reserved
        return
    with pytest.raises(TrainingError, match=reserved):
        command.reservation(config, resources, 0.25)


def test_a_place_without_space_is_told(
    version: Path, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(SystemExit):
        main(arguments(version, vit, tmp_path))
    assert "GiB free" in capfd.readouterr().err


def test_mlflow_that_is_down_is_told(
    version: Path, vit: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(SystemExit):
        main(arguments(version, vit, tmp_path, **{"record": True, "tracking.uri": address}))
    assert "does not answer" in capfd.readouterr().err


def test_data_that_do_not_fit_the_task_are_told(vit: Path, tmp_path: Path) -> None:
    one_label = labelled_version(tmp_path / "a", train=1, val=2)
    config = DetectorTraining(data=str(one_label), model=str(vit), output="x")
    with pytest.raises(TrainingError, match=r"split train .* has the labels"):
        prepare_job(config, open_version(one_label))
    fine = open_version(labelled_version(tmp_path / "b", train=4, val=2))
    captions = replace(fine, manifest=fine.manifest.model_copy(update={"name": "flickr30k"}))
    with pytest.raises(TrainingError, match="no labels"):
        prepare_job(config, captions)


def test_the_default_model_follows_the_devices_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu, gpus, model in (
        (False, -1, "starter:detector"),
        (True, -1, "google/vit-base-patch16-224"),
        (True, 0, "starter:detector"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert DetectorTraining(data="x", output="x", gpus_per_worker=gpus).start_from() == model


# ------------------------------------------------------------------------------------------------------------ heads


def test_a_head_of_other_labels_is_replaced_only_when_told(vit: Path, tmp_path: Path) -> None:
    config = DetectorTraining(data="x", output="x", model=str(vit))
    plain = resolve(str(vit))
    assert wants_new_head(config, plain, LABELS["aivshuman"])  # ImageNet's labels, say
    ours = replace(plain, card=plain.card.model_copy(update={"labels": ["human", "ai"]}))
    assert not wants_new_head(config, ours, LABELS["aivshuman"])
    with pytest.raises(TrainingError, match="--head new"):
        wants_new_head(config, ours, LABELS["source"])
    assert wants_new_head(config.model_copy(update={"head": "new"}), ours, LABELS["source"])
    with pytest.raises(TrainingError, match="--head new replaces"):
        wants_new_head(config.model_copy(update={"head": "keep"}), plain, LABELS["aivshuman"])


def test_a_new_head_has_the_labels_and_keeps_the_tower(vit: Path) -> None:
    checkpoint = resolve(str(vit))
    torch.manual_seed(0)
    model = load_classifier(checkpoint, ("human", "ai"), new_head=True, dropout=0.3)
    assert output_layer(model).weight.shape == (2, 32) and model.config.id2label == {0: "human", 1: "ai"}
    assert model.config.hidden_dropout_prob == 0.3
    before = load_classifier(checkpoint, ("human", "ai"), new_head=True).vit.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.vit.state_dict().items())


# ------------------------------------------------------------------------------------------------------------- data


def test_the_source_data_set_has_its_own_labels(tmp_path: Path) -> None:
    version = open_version(labelled_version(tmp_path, 8, 4, ("stock", "platform")))
    rows = read_annotations(version, "train", LABELS["source"], 0.5)
    assert sorted(rows.labels.tolist()) == [0] * 4 + [1] * 4
    assert rows.weights.mean() == pytest.approx(1)


def test_weights_balance_labels_and_temper_large_strata(tmp_path: Path) -> None:
    version = open_version(labelled_version(tmp_path, 12, 4))
    table = version.table("train")
    generators = ["one"] * 5 + ["two"]
    shown = iter(generators)
    column = [next(shown) if label == "ai" else "photo" for label in table["label"].to_pylist()]
    changed = table.set_column(table.schema.get_field_index("generator"), "generator", [column])
    fake: Any = SimpleNamespace(table=lambda split, columns: changed.select(columns))
    rows = read_annotations(fake, "train", LABELS["aivshuman"], 0.5)
    assert rows.weights.sum() == pytest.approx(12)
    assert rows.weights[rows.labels == 0].sum() == pytest.approx(6)
    of = {name: rows.weights[[given == name for given in rows.generators]].sum() for name in ("one", "two")}
    assert of["one"] / of["two"] == pytest.approx(5**0.5)


def test_validation_pictures_come_in_every_tier(version: Path, vit: Path) -> None:
    job: DetectorJob = prepare_job(
        DetectorTraining(data=str(version), model=str(vit), output="x"), open_version(version)
    )[0]
    source = job.val_source()
    assert isinstance(source, InTiers) and sum(source.groups) == 32
    blocks = {
        int(row): pixels
        for block in source.load(0, np.array([3, 19]))
        for row, pixels in zip(block["row"], block["pixels"], strict=True)
    }
    assert set(blocks) == {3, 19} and not np.array_equal(blocks[3], blocks[19])
    assert np.abs(blocks[3].astype(int) - blocks[19]).mean() < 30  # the same picture
    labels, _ = read_annotations(open_version(version), "val", ("human", "ai"), 0.5).of(np.array([3, 19]))
    assert labels[0] == labels[1]


def test_thresholds_are_fitted_on_a_few_of_each_generator(tmp_path: Path) -> None:
    rows = read_annotations(open_version(labelled_version(tmp_path, 4, 12)), "val", ("human", "ai"), 0.5)
    chosen = few_of_each(rows, 2)
    assert (rows.labels[chosen] == 1).sum() == 2 and (rows.labels[chosen] == 0).sum() == 6
    first = sorted(id_ for id_, label in zip(rows.ids, rows.labels, strict=True) if label == 1)[:2]
    assert {rows.ids[row] for row in chosen if rows.labels[row] == 1} == set(first)


def test_normalisation_is_the_models_own(vit: Path) -> None:
    normalisation = Normalisation.from_processor(vit)
    assert normalisation.mean == (0.4,) * 3 and normalisation.std == (0.3,) * 3
    white = np.asarray(Image.new("RGB", (4, 4), "white"))[None, None]
    assert float(normalisation(white).max()) == pytest.approx(2.0)


def test_the_card_names_the_data_of_what_it_was_trained_from(version: Path, vit: Path, tmp_path: Path) -> None:
    base = shutil.copytree(vit, tmp_path / "base")
    before = {"name": "aivshuman", "version": "older"}
    write_card(base, dataset=before | {"generators": [], "before": [{"name": "aivshuman", "version": "oldest"}]})
    config = DetectorTraining(
        data=str(version),
        model=str(base),
        output=str(tmp_path / "out"),
        max_steps=1,
        batch_size=8,
        loaders=1,
        threads=1,
    )
    job = prepare_job(config, open_version(version))[0]
    _, module, watch = fit_locally(job, tmp_path, "here", say=lambda _: None)
    export(job, module, watch, tmp_path / "export")
    dataset = resolve(str(tmp_path / "export")).card.dataset
    assert dataset["version"] == version.name
    assert dataset["before"] == [before, {"name": "aivshuman", "version": "oldest"}]


def quick_job(version: Path, model: Path, **changes: Any) -> DetectorJob:
    """One step of training."""
    settings = {"data": str(version), "model": str(model), "output": "x", "max_steps": 1, "batch_size": 8, "threads": 1}
    return prepare_job(DetectorTraining.model_validate(settings | changes), open_version(version))[0]


@pytest.mark.parametrize("family", STRICT)
def test_weights_of_two_bytes_are_judged_in_a_blend_of_four(family: str, version: Path, tmp_path: Path) -> None:
    model = small_classifier(tmp_path / "start", STRICT[family])
    job = quick_job(version, model, precision="bf16-true", blend=0.5)
    outcome, module, _ = fit_locally(job, tmp_path, "here", say=lambda _: None)
    types = {next(one.parameters()).dtype for one in (module.model, module.plain())}
    assert types == {torch.bfloat16, torch.float32}
    assert outcome.status == "finished" and len(module.judged) == 32


def test_sample_pictures_show_the_probabilities_that_the_checkpoint_gives(tmp_path: Path) -> None:
    version = labelled_version(tmp_path / "data", 16, 16, wrong_every=5)
    job = quick_job(version, small_detector(tmp_path / "start"), warmup=0.0, learning_rate=1e-2)
    _, module, watch = fit_locally(job, tmp_path, "here", say=lambda _: None)
    export(job, module, watch, tmp_path / "export")
    samples = job.samples(module)
    model = DetectorModel(resolve(str(tmp_path / "export")))
    given = model.detect(np.stack([render(image, model.views) for image, _ in samples]))
    assert len(samples) == 12 and given.std() > 0.02
    assert [float(text.split()[-1]) for _, text in samples] == pytest.approx(given.tolist(), abs=0.006)
