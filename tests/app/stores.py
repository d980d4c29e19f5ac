"""Stores for tests: opened on one database and closed again, filled, looked into, and held up."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Coroutine
from pathlib import Path
from threading import Event as Signal
from typing import Any

import pytest
from sqlalchemy import func, select

from app.store.search import Query
from app.store.settings import StoreSettings
from app.store.store import Found, Store
from deployments.annotation import Annotation, Caption, Detection, Provenance
from tests.waiting import wait_for

PICTURE = b"\xff\xd8\xff\xe0 the bytes of a picture"
#: A busy machine is no database that fails.
PATIENT: dict[str, Any] = {"timeout_s": 60.0, "search_timeout_s": 60.0}
SHA = hashlib.sha256(PICTURE).hexdigest()


class Stores:
    """Opens stores on one database, and closes them."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder, self.opened = url, folder, []

    def __call__(self, **settings: Any) -> Store:
        settings = PATIENT | {"pictures_url": str(self.folder / "pictures")} | settings
        store = Store(StoreSettings(url=self.url, **settings))
        assert store._writer is not None
        store._writer._tidy_at = time.monotonic() + 1e6  # tests tidy up when they mean to
        self.opened.append(store)
        store.start()
        return store


class Held:
    """Holds up what stores do with files until it is told to let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch, self.go_on = monkeypatch, Signal()
        self.there: list[str] = []
        """Pictures whose file somebody is at."""

    def __call__(self, store: Store, what: str) -> None:
        do = getattr(store._files, what)

        def late(sha256: str, *rest: Any) -> Any:
            self.there.append(sha256)
            assert self.go_on.wait(60)
            return do(sha256, *rest)

        self._monkeypatch.setattr(store._files, what, late)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def annotation(name: str, label: str | None = "human", caption: str | None = None, *tags: str) -> Annotation:
    record = Annotation(
        id=name, sha256=hashlib.sha256(name.encode()).hexdigest(), models={"detector": "starter:detector#1"}
    )
    if label:
        provenance = Provenance(c2pa="absent", declared_ai=None)
        record.detection = Detection(label=label, ai_probability=0.25, provenance=provenance)
    if caption is not None:
        record.caption = Caption(text=caption)
        record.tags = list(tags)
    return record


def keep(store: Store, *records: Annotation) -> None:
    """Offer answers one after another, and wait until they are written."""
    written = store.status()["written"]
    for record in records:
        store.offer(record, PICTURE)
        time.sleep(0.002)  # each has a millisecond of its own
    wait_for(lambda: store.status()["written"] >= written + len(records))


def tidy(store: Store) -> None:
    """Remove what is too old, files included."""
    assert store._database is not None
    store._tidy(store._database)
    if store._removing is not None:
        store._removing.result(60)


def files(store: Store) -> list[Path]:
    """Pictures that are kept, and parts of some."""
    assert store.settings.pictures_url is not None
    return [path for path in Path(store.settings.pictures_url).rglob("*") if path.is_file()]


def names(found: list[Found]) -> list[str]:
    return [item.annotation.id for item in found]


def hits(store: Store, **query: Any) -> list[str]:
    return names(run(store.search(Query(**query)))[0])


def count(store: Store, table: Any) -> int:
    assert store._database is not None
    with store._database.reading() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()
