"""Before and after workers: whole checkpoints are told from torn ones, a run goes on with what it was started with, and
what cannot start is on record."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.errors import DataError
from data.locations import Location
from data.versions import MANIFEST, DataVersion, Manifest, open_version
from deployments.checkpoints import CheckpointError, open_checkpoint
from tests.train.small import labelled_version, tiny_vit
from train import command
from train.command import TrainCommand, base_of, data_of, inputs_as_kept, reported
from train.command import _finished as finished
from train.detector import DetectorTraining, prepare_job, with_features
from train.detector import train as train_detector
from train.evaluate import DetectorEvaluation, evaluate
from train.features import OutOfTime
from train.loop import Outcome
from train.module import TrainingError
from train.sweep import DetectorSweep, sweep
from train.tracking import FAILURE_TAG, Run, TrackingConfig, connect


def named(config: TrainCommand, _: DataVersion) -> str:
    return config.model


def settings(folder: Path, **changes: object) -> TrainCommand:
    values = {"data": "d", "model": "m", "output": str(folder / "out"), "name": "run", "storage": str(folder / "runs")}
    return TrainCommand.model_validate(values | {"record": False} | changes)


def ended(folder: Path) -> Path:
    """A run's last checkpoint, whole, as a worker reports it."""
    tiny_vit(folder / "export", ("human", "ai"))
    (folder / "export/card.json").write_text('{"task": "detection"}')
    outcome = vars(Outcome("finished", 9, 9, {"val_auc": 0.75}))
    (folder / "progress.json").write_text(json.dumps({"step": 9, "best": 0.75, "bad": 0, "outcome": outcome}))
    return folder


def listed(run: Path, *names: str) -> None:
    """Ray's list of whole checkpoints, which it writes when all files of one are there."""
    results = [{"checkpoint_dir_name": name, "metrics": {}} for name in names]
    (run / "checkpoint_manager_snapshot.json").write_text(json.dumps({"checkpoint_results": results}))


def test_a_checkpoint_that_was_being_copied_is_not_taken_for_the_end(tmp_path: Path) -> None:
    run = tmp_path / "runs/run"
    torn = ended(run / "checkpoint_2")
    (run / "checkpoint_1").mkdir()
    listed(run, "checkpoint_1")
    for damage in ("model.safetensors", "progress.json"):
        if damage == "progress.json":
            (torn / damage).unlink()
        else:
            (torn / "export" / damage).write_bytes(b"half")
        assert finished(Location.of(run)) is None
    whole = ended(run / "checkpoint_3")
    listed(run, "checkpoint_1", "checkpoint_3")
    found = finished(Location.of(run))
    assert found is not None and found[0].steps == 9
    assert open_checkpoint(found[1].local_path, "test").folder == whole / "export"


def test_a_damaged_list_of_checkpoints_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_res')
    with pytest.raises(TrainingError, match="is damaged"):
        reported(Location.of(tmp_path))


def runs_of(store: TrackingConfig, experiment: str) -> list[Any]:
    client = connect(store)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def newer(version: Path, created_at: str) -> Path:
    """A copy of a version that was made later."""
    manifest = Manifest.model_validate_json((version / MANIFEST).read_text())
    again = version.parent / created_at[:4]
    shutil.copytree(version, again)
    told = manifest.model_copy(update={"version": again.name * 3, "created_at": created_at})
    (again / MANIFEST).write_text(told.model_dump_json())
    return again


def test_a_run_goes_on_with_the_data_and_model_it_was_started_with(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = labelled_version(tmp_path / "data", train=4, val=2)
    model = tiny_vit(tmp_path / "vit", ("human", "ai"))
    config = settings(tmp_path, data=str(first.parent), model=str(model))
    kept = inputs_as_kept(data_of(config, None), base_of(config, named, data_of(config, None), None))
    second = newer(first, "2027-01-01T00:00:00+00:00")
    assert data_of(config, None).location.name == second.name
    version = data_of(config, kept)
    assert version.location.name == first.name and base_of(config, named, version, kept).folder == model
    assert f"goes on as it was started: data {first}" in capfd.readouterr().out
    (model / "card.json").write_text('{"task": "detection"}')
    with pytest.raises(TrainingError, match="put it back, or give another --name"):
        base_of(config, named, version, kept)
    shutil.rmtree(first)
    with pytest.raises(TrainingError, match=f"{first}, which is gone"):
        data_of(config, kept)


def test_an_alias_of_the_registry_is_the_version_that_it_was(
    tmp_path: Path, store: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(store.uri))
    monkeypatch.setenv("DEEPTRUST_CACHE", str(tmp_path / "cache"))
    client = connect(store)
    client.create_registered_model("detector")
    for number in (1, 2):
        folder = ended(tmp_path / f"{number}") / "export"
        (folder / "card.json").write_text(json.dumps({"task": "detection", "metrics": {"number": number}}))
        client.create_model_version("detector", folder.as_uri())
    client.set_registered_model_alias("detector", "production", "1")
    version = open_version(labelled_version(tmp_path / "data", train=4, val=2))
    config = settings(tmp_path, model="models:/detector@production")
    kept = inputs_as_kept(version, base_of(config, named, version, None))
    client.set_registered_model_alias("detector", "production", "2")
    assert base_of(config, named, version, kept).uri == kept["model"] == "models:/detector/1"
    assert base_of(config, named, version, None).uri == "models:/detector/2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere/there/is/none"}, "CheckpointError: no such checkpoint"),
        ({"data": "/nowhere/aivshuman"}, "DataError: .* is no prepared data set"),
        ({"batch_size": 9, "num_workers": 2}, "TrainingError: --batch-size 9 does not divide"),
    ],
)
def test_what_cannot_start_is_on_record_with_the_reason(
    tmp_path: Path, version: Path, store: TrackingConfig, changes: dict[str, Any], message: str
) -> None:
    values = {"data": str(version), "model": "m", "output": str(tmp_path / "o"), "storage": str(tmp_path / "runs")}
    values |= {"tracking": store}
    before = len(runs_of(store, "detector"))
    with pytest.raises((TrainingError, DataError, CheckpointError)):
        train_detector(DetectorTraining.model_validate(values | changes))
    run, *others = runs_of(store, "detector")
    assert len(others) == before and run.info.status == "FAILED"
    assert re.match(message, run.data.tags[FAILURE_TAG]) and run.data.params["output"] == str(tmp_path / "o")


def test_sweeps_and_evaluations_that_cannot_start_are_on_record(tmp_path: Path, store: TrackingConfig) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("lerning_rate: {values: [1]}")
    own = {"data": "d", "output": "o", "storage": str(tmp_path), "space": space, "tracking": store}
    with pytest.raises(TrainingError, match="lerning_rate"):
        sweep(DetectorSweep.model_validate(own))
    assert "lerning_rate" in runs_of(store, "detector")[0].data.tags[FAILURE_TAG]
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        evaluate(DetectorEvaluation(data="d", checkpoint="no/where/at/all", tracking=store))
    (run,) = runs_of(store, "evaluation")
    assert run.info.status == "FAILED" and "no such checkpoint" in run.data.tags[FAILURE_TAG]
    assert run.data.params["model"] == "no/where/at/all"


def test_mlflow_that_went_away_does_not_hide_what_was_wrong(
    tmp_path: Path, version: Path, vit: Path, store: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("MLflow is gone")

    def broken(*_: object) -> None:
        monkeypatch.setattr(Run, "client", property(gone))
        raise TrainingError("what was wrong")

    monkeypatch.setattr(command, "_fit", broken)
    config = DetectorTraining(
        data=str(version), model=str(vit), output=str(tmp_path / "o"), storage=str(tmp_path / "runs"), tracking=store
    )
    with pytest.raises(TrainingError, match="what was wrong"):
        train_detector(config)


def test_damaged_weights_are_told(tmp_path: Path, version: Path) -> None:
    model = tiny_vit(tmp_path / "vit", ("human", "ai"))
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
    config = DetectorTraining(data=str(version), model=str(model), output="x")
    with pytest.raises(TrainingError, match="cannot be trained as a classifier"):
        prepare_job(config, open_version(version))


def test_the_temporary_folder_is_looked_at_for_any_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(TrainingError, match="TMPDIR"):
        command._check_space(settings(tmp_path), Location("s3", "bucket/runs"), 1000)


def test_a_time_limit_ends_the_computing_of_features(tmp_path: Path, version: Path, vit: Path) -> None:
    config = DetectorTraining(
        data=str(version), model=str(vit), output="x", freeze="tower", cache=str(tmp_path / "cache")
    )
    job, _ = prepare_job(config, open_version(version))
    with pytest.raises(OutOfTime):
        with_features(replace(job, deadline=0.0))
