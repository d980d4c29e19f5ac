"""Runs on record: what was logged is there, what failed says why, and what is down is noticed at once."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from deployments.checkpoints import CheckpointError, mlflow_uri
from train import tracking
from train.tracking import DatasetInput, RunReference, TrackingConfig, TrackingError


@pytest.fixture
def config(store: TrackingConfig) -> TrackingConfig:
    return store


def checkpoint_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "card.json").write_text('{"task": "detection"}')
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    return folder


def test_everything_about_a_run_is_kept(config: TrackingConfig, tmp_path: Path) -> None:
    data = DatasetInput(name="aivshuman", version="0123456789ab", source="s3://data/aivshuman/0123456789ab")
    settings = {"learning_rate": 1e-3, "damage": {"blur": 0.1, "crop": 0.75}}
    with tracking.run(config, "detector", "first", parameters=settings, datasets=[data]) as run:
        for step in range(3):
            run.metrics({"train_loss": 1.0 - 0.1 * step, "val_loss": 2.0}, step)
        run.pictures("samples/step-2.png", [(Image.new("RGB", (300, 200), "red"), "human, 0.2")] * 5)
        source = run.checkpoint(checkpoint_folder(tmp_path / "checkpoint"))
    kept = run.client.get_run(run.run_id)
    assert kept.info.status == "FINISHED"
    assert kept.data.params == {"learning_rate": "0.001", "damage.blur": "0.1", "damage.crop": "0.75"}
    assert kept.data.tags[tracking.COMMIT_TAG] == (tracking.code_commit() or "unknown")
    history = run.client.get_metric_history(run.run_id, "train_loss")
    assert [(point.step, round(point.value, 6)) for point in history] == [(0, 1.0), (1, 0.9), (2, 0.8)]
    (used,) = kept.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("aivshuman", "0123456789ab")
    assert used.tags[0].value == "training"
    weights = Path(source.removeprefix("file://")) / "model.safetensors"
    assert weights.read_bytes() == (tmp_path / "checkpoint" / "model.safetensors").read_bytes()
    assert [entry.path for entry in run.client.list_artifacts(run.run_id, "samples")] == ["samples/step-2.png"]


@pytest.mark.parametrize(
    ("cause", "status", "reason"),
    [
        (FloatingPointError("loss is NaN at step 7"), "FAILED", "FloatingPointError: loss is NaN at step 7"),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt: no message"),
    ],
)
def test_a_run_that_ends_badly_says_why(config: TrackingConfig, cause: BaseException, status: str, reason: str) -> None:
    opened: list[tracking.Run] = []
    wrapped = cause if status == "KILLED" else RuntimeError("worker group failed")
    with pytest.raises(type(wrapped)), tracking.run(config, "detector", "bad") as run:
        opened.append(run)
        raise wrapped from (None if wrapped is cause else cause)
    kept = run.client.get_run(opened[0].run_id)
    assert kept.info.status == status
    assert kept.data.tags[tracking.FAILURE_TAG] == reason


def test_a_run_that_did_not_finish_is_continued_and_a_finished_one_is_not(config: TrackingConfig) -> None:
    first = tracking.start(config, "captioner", "a", key="/runs/a", parameters={"epochs": 4, "seed": 1})
    first.metrics({"loss": 3.0}, 1)
    # killed here, without a word to MLflow
    again = tracking.start(config, "captioner", "a", key="/runs/a", parameters={"epochs": 6, "seed": 1})
    assert again.run_id == first.run_id
    kept = again.client.get_run(again.run_id)
    assert kept.data.params["epochs"] == "4" and kept.data.tags["changed.epochs"] == "6"
    assert "changed.seed" not in kept.data.tags
    again.end()
    third = tracking.start(config, "captioner", "a", key="/runs/a")
    assert third.run_id != first.run_id
    third.end(ValueError("no"))


def test_a_worker_goes_on_with_the_drivers_run_and_leaves_it_open(config: TrackingConfig) -> None:
    opened = tracking.start(config, "detector", "driver")
    reference = RunReference.model_validate_json(opened.reference().model_dump_json())
    with tracking.attach(reference) as worker:
        worker.metrics({"loss": 1.0}, 5)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            worker.metrics({"loss": 1.0}, 6)
            if any(name.startswith("system/") for name in opened.client.get_run(opened.run_id).data.metrics):
                break
            time.sleep(0.1)
    kept = opened.client.get_run(opened.run_id)
    assert kept.info.status == "RUNNING"
    assert kept.data.metrics["loss"] == 1.0
    assert any(name.startswith("system/cpu") for name in kept.data.metrics)
    opened.end()


def test_points_wait_while_mlflow_does_not_answer(config: TrackingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = tracking.start(config, "detector", "outage")
    answering = opened.client.log_batch

    def silent(*_: object, **__: object) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr(opened.client, "log_batch", silent)
    opened.metrics({"loss": 2.0}, 1)
    monkeypatch.setattr(opened.client, "log_batch", answering)
    opened.metrics({"loss": 1.0}, 2)
    opened.end()
    assert [point.value for point in opened.client.get_metric_history(opened.run_id, "loss")] == [2.0, 1.0]


def test_a_run_that_begins_anew_with_other_parameters_is_another(config: TrackingConfig) -> None:
    def begun(**parameters: float) -> tracking.Run:
        return tracking.start(config, "captioner", "b", key="/runs/b", going_on=False, parameters=parameters)

    first = begun(learning_rate=1e30)
    assert begun(learning_rate=1e30).run_id == first.run_id
    first.end(FloatingPointError("the loss is nan"))
    killed = begun(learning_rate=1e-3)
    assert killed.run_id != first.run_id
    last = begun(learning_rate=1e-4)
    kept = last.client.get_run(killed.run_id)
    assert kept.info.status == "KILLED" and "begun anew" in kept.data.tags[tracking.FAILURE_TAG]
    last.end()
    kept = last.client.get_run(last.run_id)
    assert kept.info.status == "FINISHED" and kept.data.params == {"learning_rate": "0.0001"}
    # the one that failed before it is not what goes on
    assert begun(learning_rate=1e30).run_id not in {first.run_id, killed.run_id, last.run_id}


def test_a_server_that_fails_is_left_alone_for_a_while(config: TrackingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = tracking.start(config, "detector", "hangs")
    answering, now, asked = opened.client.log_batch, [1000.0], list[float]()
    monkeypatch.setattr(tracking, "time", SimpleNamespace(time=time.time, monotonic=lambda: now[0]))

    def hangs(*_: object, **__: object) -> None:
        asked.append(now[0])
        now[0] += 90
        raise ConnectionError("no answer")

    monkeypatch.setattr(opened.client, "log_batch", hangs)
    for step in range(100):
        now[0] += 20
        opened.metrics({"loss": 1.0}, step)
    assert 2 <= len(asked) <= 4  # of 2,000 s of training
    monkeypatch.setattr(opened.client, "log_batch", answering)
    opened.end()  # what waits is sent at the end, whatever the pause
    assert len(opened.client.get_metric_history(opened.run_id, "loss")) == 100


def test_a_worker_that_comes_while_mlflow_is_down_goes_on_without_it(
    config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = tracking.start(config, "detector", "down")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = TrackingConfig(uri=f"http://127.0.0.1:{free.getsockname()[1]}")
    worker = tracking.attach(RunReference(tracking=down, run_id=opened.run_id))
    worker.metrics({"loss": 1.0}, 3)
    worker.pictures("samples.png", [(Image.new("RGB", (30, 20)), "human")])
    worker.close(ValueError("what was wrong"))  # told by whoever caught it
    worker.config = config  # it is back
    worker.leave()
    assert [point.step for point in opened.client.get_metric_history(opened.run_id, "loss")] == [3]
    opened.end()


@pytest.mark.parametrize("scheme", ["http://127.0.0.1:{port}", "postgresql://user:secret@127.0.0.1:{port}/mlflow"])
def test_mlflow_that_is_down_is_an_error_at_once(scheme: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(TrackingError, match="does not answer") as caught:
        tracking.start(TrackingConfig(uri=scheme.format(port=port), artifacts=str(tmp_path)), "detector", "x")
    assert time.monotonic() - begun < 30
    assert "secret" not in str(caught.value) and "MLFLOW_TRACKING_URI" in str(caught.value)


def test_a_database_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is not SQLite" * 100)
    with pytest.raises(TrackingError, match="cannot be used"):
        tracking.connect(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))


def test_postgres_without_a_place_for_artifacts_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPTRUST_ARTIFACTS", raising=False)
    with pytest.raises(TrackingError, match="DEEPTRUST_ARTIFACTS"):
        TrackingConfig(uri="postgresql://user@localhost/mlflow").resolved()


def test_a_postgresql_is_reached_by_the_driver_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:word@db/mlflow")
    monkeypatch.setenv("DEEPTRUST_ARTIFACTS", "s3://runs/artifacts")
    expected = "postgresql+psycopg://user:word@db/mlflow"
    assert mlflow_uri() == TrackingConfig().resolved().uri == expected
    assert TrackingConfig(uri="postgres://user:word@db/mlflow").resolved().uri == expected
    for other in ("sqlite:////runs/mlflow.db", "http://10.0.0.11:5000", expected):
        assert TrackingConfig(uri=other).resolved().uri == other


def test_pickles_are_not_logged(config: TrackingConfig, tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "checkpoint")
    (folder / "optimizer.pt").write_bytes(b"\x80")
    opened = tracking.start(config, "detector", "pickle")
    with pytest.raises(CheckpointError, match="pickled"):
        opened.checkpoint(folder)
    opened.end()


def test_the_commit_can_be_named_where_there_is_no_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPTRUST_COMMIT", "abc123")
    assert tracking.code_commit() == "abc123"
    assert os.environ["DEEPTRUST_COMMIT"] == "abc123"
