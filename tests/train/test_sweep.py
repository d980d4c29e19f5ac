"""Sweeps: the space is checked, bad trials fail alone, the best becomes a candidate, and a killed sweep goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs
import pytest

import train.sweep
from data.errors import DataError
from data.locations import Location
from deployments.checkpoints import CheckpointError, resolve
from tests.train.small import labelled_version, tiny_vit
from tests.train.small_models import small_detector
from train import registry, tracking
from train.module import TrainingError
from train.sweep import _check_same, _with_inputs, _worth_another_try, main, scheduler, sweep
from train.sweep_page import TrialOutcome, render_page
from train.sweep_settings import DetectorSweep, Span, read_space, trial_config
from train.tracking import TrackingConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("DEEPTRUST_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def arguments(folder: Path) -> list[str]:
    version = labelled_version(folder / "data", train=32, val=16)
    return [
        *("detector", "--data", str(version), "--model", str(tiny_vit(folder / "vit"))),
        *("--output", str(folder / "best"), "--storage", str(folder / "runs"), "--batch-size", "16"),
        *("--num-cpus", "2", "--threads", "1", "--object-store-bytes", str(100 * 2**20)),
    ]


def config(tmp_path: Path, **changes: object) -> DetectorSweep:
    values = {"data": "d", "output": "o", "storage": str(tmp_path), **changes}
    return DetectorSweep.model_validate(values)


def test_a_span_is_borders_or_values() -> None:
    for bad in ({}, {"low": 1}, {"low": 2, "high": 1}, {"low": 0, "high": 1, "log": True}, {"low": 1, "values": [1]}):
        with pytest.raises(ValueError, match=r"give low|low above"):
            Span.model_validate(bad)
    drawn = [Span(low=1, high=4, whole=True).domain().sample() for _ in range(200)]
    assert set(drawn) == {1, 2, 3, 4}
    assert all(1e-5 <= Span(low=1e-5, high=1e-2, log=True).domain().sample() <= 1e-2 for _ in range(20))


def test_the_space_names_settings_of_the_trainer(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}\ndamage.blur: {values: [0.0, 0.2]}")
    assert set(read_space(config(tmp_path, space=space))) == {"learning_rate", "damage.blur"}
    trial = trial_config(config(tmp_path), {"damage.blur": 0.2, "learning_rate": 0.1}, "abc", None)
    assert trial.model_dump()["damage"]["blur"] == 0.2 and trial.name == "abc"
    for text, complaint in (
        ("lerning_rate: {values: [1]}", "lerning_rate"),
        ("learning_rate: {values: [-1.0]}", "does not take"),
        ("{learning_rate: {values: [0.1, -1.0]}, weight_decay: {low: 0.0, high: 0.1}}", "does not take"),
        ("learning_rate: 3", "cannot be used"),
        ("- a", "cannot be used"),
    ):
        space.write_text(text)
        with pytest.raises(TrainingError, match=complaint):
            read_space(config(tmp_path, space=space))
    with pytest.raises(TrainingError, match="cannot be used"):
        read_space(config(tmp_path, space=tmp_path / "none.yaml"))


def test_the_page_shows_every_trial(tmp_path: Path) -> None:
    trials = [
        TrialOutcome(
            id="a", parameters={"learning_rate": 0.01}, status="finished", best=0.9, curve=[(1, 0.5), (2, 0.9)]
        ),
        TrialOutcome(id="b", parameters={"learning_rate": 0.1}, status="stopped early", best=0.4, curve=[(1, 0.4)]),
        TrialOutcome(id="c", parameters={"learning_rate": 9.0}, status="failed", best=None, curve=[], reason="NaN <b>"),
    ]
    page = render_page(config(tmp_path), trials)
    assert page.count("<svg") == 2 and "NaN &lt;b&gt;" in page and "stopped early" in page


def test_every_trial_has_the_data_and_model_that_the_sweep_was_started_with(tmp_path: Path) -> None:
    first = labelled_version(tmp_path / "data", train=4, val=2)
    model = tiny_vit(tmp_path / "vit")
    own = config(tmp_path, data=str(first.parent), model=str(model))
    (tmp_path / "sweep.json").write_text("{}")
    place = Location.of(tmp_path)
    assert _with_inputs(own, place).data == str(first)
    shutil.move(first, first.with_name("gone"))
    labelled_version(tmp_path / "data", train=6, val=2)
    with pytest.raises(TrainingError, match=f"{first}, which is gone"):
        _with_inputs(own, place)
    shutil.move(first.with_name("gone"), first)
    assert _with_inputs(own, place).data == str(first)


def test_data_or_a_model_that_is_missing_is_told_before_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.sweep, "_tune", lambda *_: pytest.fail("trials were started"))
    with pytest.raises(DataError, match="no prepared data set"):
        sweep(config(tmp_path, data=str(tmp_path / "none"), record=False))
    version = labelled_version(tmp_path / "data", train=4, val=2)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        sweep(config(tmp_path, data=str(version), model="no/where/at/all", record=False))


def test_what_kept_a_sweep_from_its_first_trial_is_corrected_under_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object) -> None:
        raise TrainingError("trials were started")

    monkeypatch.setattr(train.sweep, "_tune", started)
    version, model = labelled_version(tmp_path / "data", train=4, val=2), str(tiny_vit(tmp_path / "vit"))
    with pytest.raises(DataError, match="no prepared data set"):
        sweep(config(tmp_path, data=str(tmp_path / "none"), model=model, record=False))
    for _ in range(2):
        with pytest.raises(TrainingError, match="trials were started"):
            sweep(config(tmp_path, data=str(version), model=model, record=False))
        (tmp_path / "detector-sweep" / "tune").mkdir(exist_ok=True)
    with pytest.raises(TrainingError, match=r"was started with other settings \(data\)"):
        sweep(config(tmp_path, data=str(tmp_path / "none"), model=model, record=False))


def test_what_no_trial_could_divide_or_keep_is_told_before_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.sweep, "_tune", lambda *_: pytest.fail("trials were started"))
    for changes in ({"batch_size": 10}, {"space": tmp_path / "space.yaml"}):
        (tmp_path / "space.yaml").write_text("batch_size: {values: [16, 10]}")
        with pytest.raises(TrainingError, match="--batch-size 10 does not divide into 4 lanes"):
            sweep(config(tmp_path, num_workers=4, record=False, **changes))
    version, model = labelled_version(tmp_path / "data", train=4, val=2), str(tiny_vit(tmp_path / "vit"))
    monkeypatch.setattr("train.command.shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(TrainingError, match=r"--storage .* has 0\.0 GiB free"):
        sweep(config(tmp_path, data=str(version), model=model, record=False))


def test_a_sweep_that_is_done_writes_its_best_where_it_is_asked_for(tmp_path: Path) -> None:
    trials = [
        TrialOutcome(id=id_, parameters={}, status=status, best=best, curve=[])
        for id_, status, best in (("a", "finished", -0.5), ("b", "finished", 0.0), ("c", "stopped early", 0.9))
    ]
    asked = config(tmp_path, output=str(tmp_path / "elsewhere"), record=False)
    for trial in trials[:2]:
        small_detector(tmp_path / asked.name / "models" / trial.id, seed=ord(trial.id))
    (tmp_path / asked.name / "trials.json").write_text(json.dumps([trial.model_dump() for trial in trials]))
    assert sweep(asked) == (trials, True)
    best = resolve(str(tmp_path / asked.name / "models" / "b"))
    assert resolve(str(tmp_path / "elsewhere")).revision == best.revision
    (tmp_path / "elsewhere" / "drift.safetensors").write_bytes(b"made of what is there")
    assert sweep(asked) == (trials, True)
    assert (tmp_path / "elsewhere" / "drift.safetensors").is_file()


def test_a_sweep_that_is_done_is_not_taken_for_one_on_other_data(tmp_path: Path) -> None:
    data = labelled_version(tmp_path / "data", train=4, val=2)
    asked = config(tmp_path, data=str(data.parent), output=str(tmp_path / "out"), record=False)
    place = tmp_path / asked.name
    place.mkdir()
    train.sweep._check_same(asked, read_space(asked), Location.of(place))
    kept = {"data": str(data), "version": "an older one", "model": "starter:detector", "revision": "0"}
    file = place / "sweep.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"inputs": kept}))
    (place / "trials.json").write_text("[]")
    with pytest.raises(TrainingError, match=f"is finished .data an older one.* the settings name data {data.name} now"):
        sweep(asked)


def test_what_a_sweep_would_destroy_is_refused_before_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "v1").mkdir(parents=True)
    asked = config(tmp_path, output=str(tmp_path / "models"), record=False)
    with pytest.raises(TrainingError, match=r"is no checkpoint of a training .it holds v1"):
        sweep(asked)

    def second(*_: object) -> None:
        with pytest.raises(TrainingError, match=r"'detector-sweep' in .* is running"):
            sweep(asked)
        raise TrainingError("the first ends")

    monkeypatch.setattr(train.sweep, "_check_same", second)
    asked = config(tmp_path, output=str(tmp_path / "out"), record=False)
    with pytest.raises(TrainingError, match="the first ends"):
        sweep(asked)


def test_a_sweep_and_its_trials_have_models_of_the_registry_that_gets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere.db")
    own = config(tmp_path, output=str(tmp_path / "out"), record=False, tracking=TrackingConfig(uri="sqlite:///here.db"))
    sent: list[str] = []

    def asking(asked: DetectorSweep, _: Location) -> None:
        sent.append(os.environ["MLFLOW_TRACKING_URI"])
        sent.extend(train.sweep._as_sent(each)["tracking"]["uri"] for each in (asked, config(tmp_path)))
        raise TrainingError("asked")

    monkeypatch.setattr(train.sweep, "_with_inputs", asking)
    with pytest.raises(TrainingError, match="asked"):
        sweep(own)
    assert sent == ["sqlite:///here.db"] * 3


def test_a_sweep_goes_on_only_as_it_was_started(tmp_path: Path) -> None:
    started, place = config(tmp_path, trials=3), Location.of(tmp_path)
    space = read_space(started)
    _check_same(started, space, place)
    (tmp_path / "tune").mkdir()  # Ray Tune's state
    kept = (tmp_path / "sweep.json").read_text()
    _check_same(config(tmp_path, trials=3, output="elsewhere", threads=1), space, place)
    for changes, searched, complaint in (
        ({"trials": 4}, space, "(trials)"),
        ({"trials": 3, "data": "others"}, space, "(data)"),
        ({"trials": 3}, space | {"learning_rate": Span(values=[0.1])}, "(space)"),
    ):
        with pytest.raises(TrainingError, match=re.escape(f"with other settings {complaint}: give another")):
            _check_same(config(tmp_path, **changes), searched, place)
    assert (tmp_path / "sweep.json").read_text() == kept


def test_trials_that_failed_for_want_of_something_are_run_again() -> None:
    def ended(error: Exception | None = None, **metrics: int) -> SimpleNamespace:
        return SimpleNamespace(error=error, metrics=metrics)

    nan, away = RuntimeError("of Ray"), RuntimeError("of Ray")
    nan.cause = TrainingError("the loss is nan")  # type: ignore[attr-defined]
    away.cause = DataError("the data are away")  # type: ignore[attr-defined]
    assert not _worth_another_try([ended(finished=1), ended()])
    assert not _worth_another_try([ended(finished=1), ended(nan)])
    assert _worth_another_try([ended(finished=1), ended(nan), ended(away)])
    assert _worth_another_try([ended(nan), ended(nan)])  # for what it is worth: nothing else is left to do


def trial_with(folder: Path, id_: str, *results: str, new: bool = False) -> SimpleNamespace:
    """A trial of Ray Tune, with the lines that are kept of its reports."""
    kept, here = folder / id_, folder / f"{id_}, here"
    for place in (kept, here):
        place.mkdir()
    if results:
        (kept / "result.json").write_text("\n".join(results))
    local = pyarrow.fs.LocalFileSystem()
    storage = SimpleNamespace(trial_dir_name=None if new else id_, trial_fs_path=str(kept), storage_filesystem=local)
    return SimpleNamespace(trial_id=id_, local_path=str(here), storage=storage)


def compare(tmp_path: Path) -> Any:
    """What compares trials, as Ray Tune has it of a sweep that goes on: of its settings alone."""
    from ray import cloudpickle

    asha = cloudpickle.loads(cloudpickle.dumps(scheduler(config(tmp_path))))
    asha.set_search_properties("best", "max")
    return asha


def told(asha: Any, trial: SimpleNamespace, best: float, validations: int) -> str:
    """What becomes of a trial that reports this."""
    return str(asha.on_trial_result(None, trial, {"best": best, "validations": validations, "training_iteration": 1}))


def test_a_sweep_that_goes_on_compares_trials_after_as_many_validations_as_before(tmp_path: Path) -> None:
    asha = compare(tmp_path)
    bests = ((0, -float("inf")), (1, 0.7), (1, 0.7), (2, 0.9), (3, 0.93))
    lines = [json.dumps({"best": best, "validations": count}) for count, best in bests]
    third = trial_with(tmp_path, "third", *lines, '{"best": 0.9')  # the kill has torn the last line
    fourth, fifth = trial_with(tmp_path, "fourth"), trial_with(tmp_path, "fifth", new=True)
    for trial in (third, fourth, fifth):
        asha.on_trial_add(None, trial)
    assert (Path(third.local_path) / "result.json").read_text().splitlines() == lines, "Ray writes what comes below"
    assert told(asha, third, 0.93, 3) == told(asha, third, 0.94, 4) == "CONTINUE"
    assert told(asha, fourth, 0.8, 1) == "CONTINUE", "it is ahead of what the third was after one"
    assert told(asha, fourth, 0.8, 2) == "STOP", "and behind what that was after two"
    assert told(asha, fifth, 0.6, 1) == "STOP", "behind the middle of the two"


def test_a_trial_whose_reports_were_lost_is_no_measure_for_what_comes_to_a_rung_below(tmp_path: Path) -> None:
    asha = compare(tmp_path)
    late, fresh = trial_with(tmp_path, "late"), trial_with(tmp_path, "fresh")
    for trial in (late, fresh):
        asha.on_trial_add(None, trial)
    assert [told(asha, late, 0.9, 4) for _ in range(3)] == ["CONTINUE"] * 3
    assert told(asha, fresh, 0.5, 1) == "CONTINUE"


def test_a_trial_is_not_judged_before_its_first_validation_nor_at_its_end(tmp_path: Path) -> None:
    asha = compare(tmp_path)
    ahead, large = trial_with(tmp_path, "ahead"), trial_with(tmp_path, "large batches")
    for trial in (ahead, large):
        asha.on_trial_add(None, trial)
    assert told(asha, ahead, 0.9, 1) == "CONTINUE"
    assert [told(asha, large, -float("inf"), 0) for _ in range(4)] == ["CONTINUE"] * 4
    assert asha.on_trial_result(None, large, {"finished": 1, "step": 9, "best": 0.1}) == "CONTINUE"
    assert told(asha, large, 0.1, 1) == "STOP"


@pytest.mark.parametrize("task", ["detection", "classification"])
def test_the_best_of_a_sweep_is_registered_where_the_registry_has_such(
    tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registered: list[str] = []

    class Parent:
        def quiet(self, *_: object) -> None:
            """Takes what MLflow would."""

        metrics = tags = text = quiet

    def register(_: object, kind: str, folder: Path) -> SimpleNamespace:
        registered.append(resolve(str(folder)).card.task)
        return SimpleNamespace(version=7)

    monkeypatch.setattr(registry, "register", register)
    monkeypatch.setattr(train.sweep, "_close_children", lambda _: None)
    asked = config(tmp_path, output=str(tmp_path / "out"))
    small_detector(tmp_path / "models" / "a", task=task)
    trials = [TrialOutcome(id="a", parameters={}, status="finished", best=0.9, curve=[(1, 0.9)])]
    train.sweep._conclude(asked, trials, Location.of(tmp_path), Parent())  # type: ignore[arg-type]
    assert (tmp_path / "trials.json").is_file() and resolve(str(tmp_path / "out")).card.task == task
    said = capsys.readouterr().out
    if task == "detection":
        assert registered == ["detection"] and "registered as detector 7, alias candidate" in said
    else:
        assert not registered and "not registered: the best checkpoint is for 'classification'" in said


@pytest.mark.proof
def test_a_sweep_finds_registers_and_survives_a_bad_trial(folder: Path, arguments: list[str]) -> None:
    (folder / "space.yaml").write_text("learning_rate: {values: [0.003, 1.0e+30]}")  # the second becomes NaN
    own = ["--name", "small", "--trials", "3", "--epochs", "2", "--space", str(folder / "space.yaml"), "--seed", "0"]
    main([*arguments, *own, "--max-failures", "0", "--gradient-clip", "0"])
    trials = [TrialOutcome.model_validate(each) for each in json.loads((folder / "runs/small/trials.json").read_text())]
    assert len(trials) == 3
    statuses = {trial.status for trial in trials}
    assert "finished" in statuses
    for trial in trials:
        assert (trial.status == "failed") == (trial.parameters["learning_rate"] > 1), trial
    best = max((trial for trial in trials if trial.status == "finished"), key=lambda trial: trial.best or 0)
    candidate = resolve("models:/detector@candidate")
    assert candidate.revision == resolve(str(folder / "best")).revision
    assert candidate.revision == resolve(str(folder / "runs/small/models" / best.id)).revision
    client = tracking.connect(TrackingConfig())
    version = registry.find_version(client, "detector", "candidate")
    parent = client.get_run(version.run_id)
    assert parent.data.tags["deeptrust.best"] == best.id
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert len(children) == 3
    assert all(child.info.status != "RUNNING" for child in children)
    # the same command again: nothing is left to do, and nothing is done twice
    main([*arguments, *own, "--max-failures", "0", "--gradient-clip", "0"])
    again = json.loads((folder / "runs/small/trials.json").read_text())
    assert [trial["id"] for trial in again] == [trial.id for trial in trials]


@pytest.mark.proof
def test_a_captioner_is_swept_too(folder: Path, photos: Path, blip: Path) -> None:
    (folder / "captioner.yaml").write_text("learning_rate: {values: [0.003, 0.001]}")
    main(
        [
            *("captioner", "--data", str(photos), "--model", str(blip), "--name", "captions", "--trials", "2"),
            *("--output", str(folder / "best-captioner"), "--storage", str(folder / "runs"), "--epochs", "2"),
            *("--space", str(folder / "captioner.yaml"), "--batch-size", "16", "--num-cpus", "2", "--threads", "1"),
            *("--object-store-bytes", str(100 * 2**20)),
        ]
    )
    file = folder / "runs/captions/trials.json"
    trials = [TrialOutcome.model_validate(each) for each in json.loads(file.read_text())]
    assert [trial.status for trial in trials] == ["finished"] * 2
    best = max(trials, key=lambda trial: trial.best or 0)
    candidate = resolve("models:/captioner@candidate")
    assert candidate.revision == resolve(str(folder / "best-captioner")).revision
    assert candidate.revision == resolve(str(folder / "runs/captions/models" / best.id)).revision


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_eight_trials_with_a_kill_in_the_middle(folder: Path, arguments: list[str]) -> None:
    """ASHA stops at least two, the sweep goes on after SIGKILL, and the best is registered."""
    (folder / "wide.yaml").write_text("learning_rate: {low: 1.0e-6, high: 1.0e-1, log: true}")
    # where every trial ranks everything right, none is worse than another and none would be stopped
    doubtful = labelled_version(folder / "doubtful", train=32, val=32, wrong_every=5)
    command = [sys.executable, "-m", "train.sweep", *arguments, "--name", "eight", "--trials", "8", "--epochs", "6"]
    command += ["--data", str(doubtful)]
    command += ["--space", str(folder / "wide.yaml"), "--concurrent", "2", "--output", str(folder / "eight")]
    root = Path(__file__).parent.parent.parent
    log = (folder / "eight.log").open("w")
    process = subprocess.Popen(command, cwd=root, stdout=log, stderr=log, start_new_session=True, env=dict(os.environ))
    models = folder / "runs/eight/models"
    until = time.monotonic() + 900
    while not (
        models.is_dir() and any(not path.name.startswith(".") for path in models.iterdir())
    ):  # one trial has come to its end
        assert process.poll() is None, (folder / "eight.log").read_text()[-4000:]
        assert time.monotonic() < until
        time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path.name for path in models.iterdir() if not path.name.startswith(".")}
    subprocess.run(command, cwd=root, stdout=log, stderr=log, check=True, timeout=1800)
    log.close()
    trials = [TrialOutcome.model_validate(each) for each in json.loads((folder / "runs/eight/trials.json").read_text())]
    assert len(trials) == 8
    assert sum(trial.status == "stopped early" for trial in trials) >= 2
    assert before <= {trial.id for trial in trials}
    assert resolve(str(folder / "eight")).revision == resolve("models:/detector@candidate").revision
