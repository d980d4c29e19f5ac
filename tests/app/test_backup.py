"""Back-up and restore as the runbook says it: databases and files are lost with their machine, and nothing else is."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from app.store.events import Event
from app.store.search import Query
from app.store.settings import StoreSettings
from app.store.store import Store
from deployments.annotation import Annotation, Caption
from deployments.checkpoints import resolve
from tests.app.postgres import Postgres, find_programs, postgres_server
from tests.train.small_models import small_detector
from tests.waiting import wait_for
from train import registry, tracking
from train.tracking import TrackingConfig

pytestmark = pytest.mark.skipif(find_programs() is None, reason="no PostgreSQL here: apt-get install postgresql")

PICTURE = b"\xff\xd8\xff\xe0 the bytes of a picture"
SHA = hashlib.sha256(PICTURE).hexdigest()


def open_store(server: Postgres, pictures: Path) -> Store:
    url = server.url("deeptrust")
    store = Store(StoreSettings(url=url, pictures="all", pictures_url=str(pictures), timeout_s=60, search_timeout_s=60))
    store.start()
    wait_for(lambda: store.status()["state"] == "ready")
    return store


def answer(name: str, caption: str, *tags: str) -> Annotation:
    return Annotation(id=name, sha256=SHA, caption=Caption(text=caption), tags=list(tags))


def found(store: Store, **query: Any) -> list[tuple[str, tuple[str, ...]]]:
    hits, _ = asyncio.run(store.search(Query(**query)))
    return [(hit.annotation.id, tuple(hit.judged)) for hit in hits]


def client(server: Postgres) -> tuple[str, ...]:
    return ("-h", "127.0.0.1", "-p", str(server.port), "-U", "deeptrust")


def tracked(server: Postgres, artifacts: Path) -> TrackingConfig:
    return TrackingConfig(uri=server.url("mlflow"), artifacts=str(artifacts), system_metrics_s=0)


def test_what_was_backed_up_is_there_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, artifacts, kept = tmp_path / "pictures", tmp_path / "artifacts", tmp_path / "backup"
    kept.mkdir()
    with postgres_server("fsync=off") as server:
        store = open_store(server, pictures)
        store.offer(answer("holiday", "a dog runs on a beach", "dog", "beach"), PICTURE)
        store.offer(answer("work", "a man at a desk", "desk"), PICTURE)
        wait_for(lambda: store.status()["written"] == 2)
        asyncio.run(store.feedback(Event("holiday", "caption", True)))
        wait_for(lambda: any(path.is_file() for path in pictures.rglob("*")))
        store.close()
        small_detector(tmp_path / "model")
        with tracking.run(tracked(server, artifacts), "detector", "one", key="/runs/one") as run:
            registry.register(run, "detector", tmp_path / "model")
        for name in ("deeptrust", "mlflow"):
            file = server.folder.parent / f"{name}.dump"
            server.run("pg_dump", *client(server), "--format=custom", f"--file={file}", name)
            shutil.copy(file, kept)
        shutil.copytree(pictures, kept / "pictures")
        shutil.copytree(artifacts, kept / "artifacts")
    shutil.rmtree(pictures)
    shutil.rmtree(artifacts)

    with postgres_server("fsync=off") as server:
        shutil.copytree(kept / "artifacts", artifacts)
        shutil.copytree(kept / "pictures", pictures)
        for name in ("deeptrust", "mlflow"):
            file = server.folder.parent / f"{name}.dump"
            shutil.copy(kept / file.name, file)
            file.chmod(0o644)
            server.run("createdb", *client(server), name)
            server.run("pg_restore", *client(server), "--exit-on-error", f"--dbname={name}", str(file))
        store = open_store(server, pictures)
        try:
            assert found(store, words="dog") == [("holiday", ("caption",))]
            assert found(store, tags=("desk",)) == [("work", ())]
            assert asyncio.run(store.picture(SHA)) is not None
            store.offer(answer("new", "a dog sleeps", "dog"), PICTURE)
            wait_for(lambda: len(found(store, words="dog")) == 2)
        finally:
            store.close()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url("mlflow"))
        monkeypatch.setenv("DEEPTRUST_CACHE", str(tmp_path / "cache"))
        assert resolve("models:/detector@candidate").revision == resolve(str(tmp_path / "model")).revision
