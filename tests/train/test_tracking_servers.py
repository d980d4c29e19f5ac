"""The same run on PostgreSQL and S3 as on SQLite and a folder, with real servers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deployments.checkpoints import resolve
from tests.app.postgres import find_programs, postgres_server
from tests.data.made import s3_server
from tests.train.small_models import noise, small_detector
from train import registry, tracking
from train.tracking import DatasetInput, TrackingConfig

pytestmark = pytest.mark.proof


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A PostgreSQL of our own; the URI of an empty database."""
    if find_programs() is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    with postgres_server("fsync=off") as server:
        yield server.url("mlflow")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with s3_server(tmp_path_factory.mktemp("s3") / "buckets") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        (server.folder / "mlflow").mkdir()
        yield server.folder / "mlflow"


def record(config: TrackingConfig, folder: Path) -> dict[str, Any]:
    """One run with everything, registered; what MLflow says of it, and its artifacts' bytes."""
    data = DatasetInput(name="aivshuman", version="0123456789ab", source="s3://data/aivshuman/0123456789ab")
    with tracking.run(
        config, "detector", "same", key="/runs/same", parameters={"rate": 0.1, "damage": {"blur": 0.2}}, datasets=[data]
    ) as run:
        for step in range(25):
            run.metrics({"loss": 1 / (step + 1)}, step)
        run.pictures("samples.png", [(noise(1), "human, 0.2"), (Image.new("RGB", (40, 40)), "ai, 0.9")])
        version = registry.register(run, "detector", folder)
    kept = run.client.get_run(run.run_id)
    artifacts = Path(run.client.download_artifacts(run.run_id, "", str(folder.parent / f"{folder.name}-out")))
    return {
        "status": kept.info.status,
        "params": kept.data.params,
        "metrics": [(p.step, p.value) for p in run.client.get_metric_history(run.run_id, "loss")],
        "tags": {name: value for name, value in kept.data.tags.items() if name.startswith("deeptrust")},
        "inputs": [
            (each.dataset.name, each.dataset.digest, each.dataset.source) for each in kept.inputs.dataset_inputs
        ],
        "version": (str(version.version), version.tags, registry.aliases_of(run.client, "detector")),
        "artifacts": {
            str(path.relative_to(artifacts)): path.read_bytes() for path in artifacts.rglob("*") if path.is_file()
        },
    }


def test_postgres_and_s3_record_what_sqlite_and_a_folder_do(
    postgres: str, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_detector(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "model2")
    local = record(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", system_metrics_s=0), tmp_path / "model")
    far = TrackingConfig(uri=postgres, artifacts="s3://mlflow/artifacts", system_metrics_s=0)
    remote = record(far, tmp_path / "model2")
    revision = resolve(str(tmp_path / "model")).revision
    assert {f"checkpoint-{revision}/model.safetensors", "samples.png"} <= set(local["artifacts"])
    assert local == remote
    assert any(path.name == "model.safetensors" for path in bucket.rglob("*"))  # they do lie in the bucket

    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres)
    monkeypatch.setenv("DEEPTRUST_CACHE", str(tmp_path / "cache"))
    served = resolve("models:/detector@candidate")
    assert served.revision == revision


def test_a_bucket_that_does_not_answer_is_noticed_before_anything_runs(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(tracking.TrackingError, match="S3 endpoint"):
        tracking.start(TrackingConfig(uri=postgres, artifacts="s3://mlflow/x"), "detector", "x")
