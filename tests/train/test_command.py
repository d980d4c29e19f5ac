"""Before and after workers: whole checkpoints are told from torn ones, a run goes on with what it was started with, and
what cannot start is on record."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.errors import DataError
from data.locations import Location
from data.versions import MANIFEST, DataVersion, Manifest, open_version
from deployments.checkpoints import CheckpointError, open_checkpoint, resolve
from tests.data.made import s3_server
from tests.train.small import labelled_version, tiny_vit, traced, write_version
from train import command, run_folder
from train.command import launch, tell
from train.detector import DetectorTraining, prepare_job, with_features
from train.detector import train as train_detector
from train.evaluate import DetectorEvaluation, evaluate
from train.features import OutOfTime
from train.job import Outcome
from train.module import TrainingError
from train.publication import check_output, publish
from train.run_folder import as_finished, base_of, data_of, finished_in, inputs_as_kept, reported, settings_as_kept
from train.settings import TrainCommand
from train.sweep import sweep
from train.sweep_settings import DetectorSweep
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
        assert finished_in(Location.of(run)) is None
    whole = ended(run / "checkpoint_3")
    listed(run, "checkpoint_1", "checkpoint_3")
    found = finished_in(Location.of(run))
    assert found is not None and found[0].steps == 9
    assert open_checkpoint(found[1].local_path, "test").folder == whole / "export"


def test_what_was_being_copied_is_removed_and_what_a_run_goes_on_from_is_not(tmp_path: Path, version: Path) -> None:
    run, config = tmp_path / "runs/run", settings(tmp_path, data=str(version))
    for name in ("checkpoint_1", "checkpoint_2", "checkpoint_3", "checkpoint_4", "other"):
        (run / name).mkdir(parents=True)
    listed(run, "checkpoint_2", "checkpoint_3")

    def stopped(*_: object) -> str:
        raise TrainingError("asked for a model")

    def left(*callbacks: object) -> set[str]:
        with pytest.raises(TrainingError):
            launch(config, "detector", stopped, never, callbacks=callbacks)
        return {folder.name for folder in run.iterdir() if folder.is_dir()}

    assert len(left("a sweep's: nothing says that nobody else writes")) == 5
    # not as it was started: nothing is touched
    (run / "settings.json").write_text(json.dumps(settings_as_kept(config) | {"data": "another"}))
    assert len(left()) == 5
    (run / "settings.json").unlink()
    assert left() == {"checkpoint_2", "checkpoint_3", "other"}
    (run / "checkpoint_manager_snapshot.json").write_text("torn")
    assert left() == {"checkpoint_2", "checkpoint_3", "other"}


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
    kept = inputs_as_kept(config, data_of(config, None), base_of(config, named, data_of(config, None), None))
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
    kept = inputs_as_kept(config, version, base_of(config, named, version, None))
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


def test_a_class_that_without_leaves_nothing_of_is_told_before_workers(tmp_path: Path, vit: Path) -> None:
    made = [("train", "photo"), ("train", "board"), ("train", "tint"), ("val", "photo"), ("val", "board")]
    rows = [
        {
            "image": traced(number, generator != "photo"),
            "label": "human" if generator == "photo" else "ai",
            "split": split,
            "generator": generator,
        }
        for number, (split, generator) in enumerate(made)
    ]
    data = write_version(tmp_path / "data", "aivshuman", rows)
    config = DetectorTraining(data=str(data), model=str(vit), output="x", without=["board"])
    with pytest.raises(TrainingError, match="without board split val has not both labels left"):
        prepare_job(config, open_version(data))


def test_damaged_weights_are_told(tmp_path: Path, version: Path) -> None:
    model = tiny_vit(tmp_path / "vit", ("human", "ai"))
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
    config = DetectorTraining(data=str(version), model=str(model), output="x")
    with pytest.raises(TrainingError, match="cannot be trained as a classifier"):
        prepare_job(config, open_version(version))


def never(*_: object) -> Any:
    pytest.fail("work was begun")


def files_of(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("*")) if file.is_file()}


def small_checkpoint(folder: Path, **others: str) -> Path:
    """The names of a published checkpoint, and others."""
    folder.mkdir(parents=True)
    for name, text in {"config.json": "{}", "card.json": "{}", "model.safetensors": "w", **others}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({"v1/model.safetensors": "w"}, "it holds v1"),
        ({"thesis.tex": "years"}, "it holds thesis.tex"),
        ({"card.json": None}, "it has no card.json"),
        ({"config.json": None}, "it has no config.json"),
    ],
)
def test_an_output_that_is_no_checkpoint_is_refused_before_any_work(
    tmp_path: Path, others: dict[str, str | None], told: str
) -> None:
    out = small_checkpoint(tmp_path / "out", **{name: text for name, text in others.items() if text is not None})
    for name in (name for name, text in others.items() if text is None):
        (out / name).unlink()
    before = files_of(out)
    with pytest.raises(TrainingError, match=f"is no checkpoint of a training .{told}.*name a folder of its own"):
        launch(settings(tmp_path), "detector", never, never)
    with pytest.raises(TrainingError, match=told):  # it may have come to hold that during the training
        publish(small_checkpoint(tmp_path / "new"), Location.of(out))
    assert files_of(out) == before


def test_a_link_a_file_and_a_run_are_no_place_for_a_checkpoint(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "v3")
    (tmp_path / "current").symlink_to("v3")
    (tmp_path / "gone").symlink_to("v4")
    (tmp_path / "file").write_text("")
    for name, told in (
        ("current", "is a link to v3"),
        ("gone", "is a link to v4"),
        ("file", "is a file"),
        ("runs/run", "it holds lock"),
        ("runs", "it holds run"),
    ):
        with pytest.raises(TrainingError, match=told):
            launch(settings(tmp_path, output=str(tmp_path / name)), "detector", never, never)
    with pytest.raises(TrainingError, match="the root of a file system"):
        check_output(Location.of("/proc"))
    assert (tmp_path / "current").is_symlink() and (tmp_path / "v3" / "card.json").is_file()


def test_a_checkpoint_is_replaced_with_all_that_was_added_to_it(tmp_path: Path) -> None:
    new = small_checkpoint(tmp_path / "new", **{"vocab.txt": "new"})
    (tmp_path / "empty").mkdir()
    out = small_checkpoint(tmp_path / "out", **{"drift.safetensors": "r", "detector.int8.onnx": "e", "merges.txt": "m"})
    for folder in (tmp_path / "empty", out, tmp_path / "not there"):
        publish(new, Location.of(folder))
        assert files_of(folder) == files_of(new)


def test_on_s3_nothing_of_an_older_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = small_checkpoint(tmp_path / "new", **{"vocab.txt": "new"})
    with s3_server(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        bucket = server.folder / "bucket"
        small_checkpoint(bucket / "out", **{"drift.safetensors": "of the old weights", "merges.txt": "old"})
        publish(new, Location.of("s3://bucket/out"))
        assert files_of(bucket / "out") == files_of(new)
        (bucket / "out" / "card.json").unlink()  # what a killed publication left
        publish(new, Location.of("s3://bucket/out"))
        assert files_of(bucket / "out") == files_of(new)
        with pytest.raises(TrainingError, match=r"s3://bucket would be replaced .*it holds out"):
            publish(new, Location.of("s3://bucket"))
        assert files_of(bucket / "out") == files_of(new)


def finished_run(config: TrainCommand) -> Path:
    """A run that came to its end; its checkpoint is nowhere else yet."""
    run = Path(config.storage) / config.name
    checkpoint = ended(run / "checkpoint_1")
    listed(run, "checkpoint_1")
    kept = inputs_as_kept(config, open_version(config.data), resolve(config.model))
    (run / "settings.json").write_text(json.dumps(settings_as_kept(config) | {"inputs": kept}))
    (run / "published").write_text(config.output)
    return checkpoint / "export"


def test_a_finished_run_says_so_and_what_is_published_stays(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = labelled_version(tmp_path / "data", train=4, val=2)
    model = tiny_vit(tmp_path / "vit", ("human", "ai"))
    config, out = settings(tmp_path, data=str(data.parent), model=str(model)), tmp_path / "out"
    export = finished_run(config)
    outcome = launch(config, "detector", named, never)
    made_of = f"data {data.name}, model {model}#{resolve(str(model)).revision}"
    told = f"run 'run' is finished ({made_of}): nothing was trained; give another --name to train anew"
    assert told in capfd.readouterr().out and outcome.steps == 9
    assert open_checkpoint(out, "").revision == open_checkpoint(export, "").revision
    tell(outcome, config.output)
    assert "trained" not in capfd.readouterr().out
    (out / "drift.safetensors").write_bytes(b"made of what is here")
    launch(config, "detector", named, never)
    assert (out / "drift.safetensors").is_file()
    (out / "model.safetensors").write_bytes(b"another")
    launch(config, "detector", named, never)
    assert open_checkpoint(out, "").revision == open_checkpoint(export, "").revision


def test_a_finished_run_is_not_taken_for_one_on_other_data_or_from_another_model(tmp_path: Path) -> None:
    data = labelled_version(tmp_path / "data", train=4, val=2)
    model = tiny_vit(tmp_path / "vit", ("human", "ai"))
    config = settings(tmp_path, data=str(data.parent), model=str(model))
    finished_run(config)
    again = newer(data, "2027-01-01T00:00:00+00:00")
    with pytest.raises(TrainingError, match="the settings name data 202720272027 now: nothing was trained"):
        launch(config, "detector", named, never)
    shutil.rmtree(again)
    (model / "card.json").write_text('{"task": "detection"}')
    with pytest.raises(TrainingError, match=f"the settings name model {model}#.* now: nothing was trained"):
        launch(config, "detector", named, never)
    assert not (tmp_path / "out").exists()
    shutil.rmtree(model)  # what is gone is not another
    launch(config, "detector", named, never)
    assert (tmp_path / "out").is_dir()


def test_a_starter_model_that_its_own_run_has_changed_is_no_other_model(
    tmp_path: Path, version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "resolve", never)
    kept = {"version": version.name, "data": str(version), "model": "starter:detector", "revision": "before"}
    told = as_finished(settings(tmp_path, data=str(version), model="starter:detector"), named, kept)
    assert told == f"'run' is finished (data {version.name}, model starter:detector#before)"


def test_a_run_is_not_started_twice_at_once(tmp_path: Path, version: Path) -> None:
    config = settings(tmp_path, data=str(version))

    def second(*_: object) -> str:
        with pytest.raises(TrainingError, match=f"'run' in {config.storage} is running: .* give another --name"):
            launch(config, "detector", never, never)
        raise TrainingError("the first ends")

    for _ in range(2):  # one that has ended is in nobody's way
        with pytest.raises(TrainingError, match="the first ends"):
            launch(config, "detector", second, never)


def test_models_are_of_the_registry_that_gets_the_run(
    tmp_path: Path, version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere.db")
    asked: list[str] = []

    def asking(*_: object) -> Any:
        asked.append(os.environ["MLFLOW_TRACKING_URI"])
        raise TrainingError("asked")

    with pytest.raises(TrainingError, match="asked"):
        tracked = TrackingConfig(uri="sqlite:///here.db")
        launch(settings(tmp_path, data=str(version), tracking=tracked), "detector", asking, never)
    monkeypatch.setattr(command, "work", asking)
    with pytest.raises(TrainingError, match="asked"):
        command._work({"registry": "sqlite:///here.db"})
    assert asked == ["sqlite:///here.db"] * 2


def test_the_place_of_the_output_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = tmp_path / "full"
    monkeypatch.setattr(
        command.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20 if path == full else 2**40)
    )
    command.check_space(settings(tmp_path), Location.of(tmp_path), 1000)
    with pytest.raises(TrainingError, match=f"--output {full} has 0.0 GiB free"):
        command.check_space(settings(tmp_path, output=str(full / "out")), Location.of(tmp_path), 1000)


def test_the_temporary_folder_is_looked_at_for_any_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(TrainingError, match="TMPDIR"):
        command.check_space(settings(tmp_path), Location("s3", "bucket/runs"), 1000)


def test_a_sweep_wants_room_for_what_all_its_runs_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, parameters = settings(tmp_path, keep=2), 2**24  # 256 MiB a checkpoint
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**31))
    command.check_space(config, Location.of(tmp_path), parameters)
    with pytest.raises(TrainingError, match=r"--storage .* has 2\.0 GiB free and the run's checkpoints need 4\.5"):
        command.check_space(config, Location.of(tmp_path), parameters, runs=8, at_once=1)
    with pytest.raises(TrainingError, match=r"TMPDIR.* has 2\.0 GiB free and the run's checkpoints need 3\.2"):
        command.check_space(config, Location("s3", "bucket/runs"), parameters, runs=8, at_once=4)


def test_a_time_limit_ends_the_computing_of_features(tmp_path: Path, version: Path, vit: Path) -> None:
    config = DetectorTraining(
        data=str(version), model=str(vit), output="x", freeze="tower", cache=str(tmp_path / "cache")
    )
    job, _ = prepare_job(config, open_version(version))
    with pytest.raises(OutOfTime):
        with_features(replace(job, deadline=0.0))


@pytest.mark.parametrize("name", ["detector", "captioner"])
def test_what_a_trainer_sends_to_its_workers_is_of_its_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ``python -m`` too. Classes of ``__main__`` are pickled whole; a captioner's, with a lock in it, cannot be."""
    started: list[tuple[type, Callable[..., Any]]] = []
    for module in ("command", name):
        monkeypatch.setattr(f"train.{module}.run_command", lambda settings, run, *_: started.append((settings, run)))
    runpy.run_module(f"train.{name}", run_name="__main__", alter_sys=True)
    ((settings, run),) = started
    assert run.__module__ == f"train.{name}" and settings.__module__ != "__main__"
