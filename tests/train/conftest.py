"""What the trainers' tests train on: small prepared versions and tiny models, made once for each module."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.small import captioned_version, labelled_version, tiny_blip, tiny_vit
from train.tracking import TrackingConfig


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with labels."""
    return labelled_version(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions."""
    return captioned_version(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_blip(tmp_path_factory.mktemp("blip") / "model")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    """An MLflow database; making one takes seconds."""
    return TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db", system_metrics_s=0.2)
