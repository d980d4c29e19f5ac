"""Drift as the ingress and the store see it: a bounded sample, kept looks, a report."""

from __future__ import annotations

import asyncio
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app import drift as sampling
from app import drift_report
from app.drift import DriftSampleSettings, Sampler
from app.store import drift, events
from app.store.database import Database
from app.store.models import row_of
from app.store.pictures import PictureFiles
from deployments.annotation import Annotation

ANSWER = {"model": "models:/detector/7#abc", "observed": np.zeros(5, np.float32)}
FACTS = np.zeros(7, np.float32)


class Watcher:
    """A handle's side of `observe`."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.taken: list[Any] = []
        self.observe, self._failure = self, failure

    def remote(self, observations: list[Any]) -> Any:
        self.taken.append(observations)
        answer = asyncio.get_running_loop().create_future()
        if self._failure is not None:
            answer.set_exception(self._failure)
        else:
            answer.set_result({"watching": True, "alarm": False, "keep": [{"a": "row"}]})
        return answer


def test_the_sample_is_bounded_by_time_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(sampling.time, "monotonic", lambda: now[0])
    sampler = Sampler(DriftSampleSettings(per_s=2), Watcher())  # type: ignore[arg-type]
    assert sum(sampler.wants() for _ in range(100)) == 10, "five seconds' worth at once"
    now[0] += 3
    assert sum(sampler.wants() for _ in range(100)) == 6
    off = Sampler(DriftSampleSettings(per_s=0), Watcher())  # type: ignore[arg-type]
    assert not off.wants() and "off" in off.state["message"]


def test_what_was_seen_is_handed_over_once_and_rows_come_back() -> None:
    async def run() -> None:
        watcher = Watcher()
        sampler = Sampler(DriftSampleSettings(), watcher)  # type: ignore[arg-type]
        sampler.offer("a" * 64, ANSWER, FACTS)
        sampler.offer("b" * 64, ANSWER, None)  # not of the sample
        sampler.offer("c" * 64, ANSWER | {"observed": None}, FACTS)  # a detector without a reference
        assert await sampler.hand_over() == [{"a": "row"}]
        assert sampler.state == {"watching": True, "alarm": False}
        assert await sampler.hand_over() == [{"a": "row"}], "asked with nothing to give, too"
        assert [[(each.sha256, each.revision) for each in taken] for taken in watcher.taken] == [
            [("a" * 64, "abc")],
            [],
        ]

    asyncio.run(run())


def test_a_watcher_that_is_gone_costs_nothing_but_its_sample() -> None:
    async def run() -> None:
        sampler = Sampler(DriftSampleSettings(), Watcher(RuntimeError("gone")))  # type: ignore[arg-type]
        for number in range(3000):
            sampler.offer(str(number), ANSWER, FACTS)
        assert len(sampler._waiting) == sampling._MOST
        assert await sampler.hand_over() == []
        assert not sampler.state["watching"] and "RuntimeError" in sampler.state["message"]

    asyncio.run(run())


def row(at_s: float, ratio: float, changed: bool, pictures: list[tuple[str, float]]) -> dict[str, Any]:
    told = {
        "pictures": 300,
        "window": 256,
        "ratios": {"embedding": ratio, "output": 0.2, "picture": -0.01},
        "moved": {"JPEG quality": -1.5, "<b>brightness": 0.1},
        "channel": "embedding",
        "data": {"name": "aivshuman", "version": "1"},
    }
    return {
        "at_s": at_s,
        "revision": "abc",
        "alarm": ratio > 1,
        "changed": changed,
        "told": told,
        "pictures": pictures,
    }


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    url = f"sqlite:///{tmp_path}/store.db"
    monkeypatch.setenv("DEEPTRUST_STORE_URL", url)
    opened = Database(url, 30, 30)
    opened.open()
    yield opened
    opened.close()


def sha(number: int) -> str:
    return f"{number:064x}"


def test_a_report_shows_the_looks_and_the_pictures_that_are_kept(database: Database, tmp_path: Path) -> None:
    now, buffer = time.time(), io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(buffer, "PNG")
    record = Annotation(id="1", sha256=sha(1))
    with database.writing() as connection:
        events.write_predictions(connection, [row_of(record, now - 100, None)])
        assert events.expect_picture(connection, sha(1), "image/png", len(buffer.getvalue()), False)
        events.picture_stored(connection, sha(1))
        rows = [row(now - 600 + 60 * number, 0.1 * number, False, []) for number in range(8)]
        drift.write(connection, [*rows, row(now - 60, 1.7, True, [(sha(1), 0.05), (sha(2), 0.04)])])
    PictureFiles(str(tmp_path / "pictures")).write(sha(1), buffer.getvalue())
    page = tmp_path / "out.html"
    drift_report.main(["--output", str(page)])
    text = page.read_text()
    assert text.count("<polyline") == 3 and "1.70" in text and ">drift</span>" in text
    assert text.count("data:image/jpeg;base64,") == 1 and "not kept" in text
    assert sha(1)[:16] in text and "aivshuman/1" in text
    assert "&lt;b&gt;brightness" in text and "<b>brightness" not in text
    assert "http://" not in text and "https://" not in text and "<script" not in text


def test_a_deleted_picture_is_forgotten_here_too_and_old_looks_go(database: Database) -> None:
    now = time.time()
    with database.writing() as connection:
        drift.write(connection, [row(now - 200 * 86400, 2, True, [(sha(3), 0.1)]), row(now, 2, True, [(sha(1), 0.1)])])
        events.forget_picture(connection, sha(1), now)
        # on its way when it was deleted
        drift.write(connection, [row(now, 2, True, [(sha(1), 0.1), (sha(2), 0.2)])])
        events.remove_old(connection, now, None, 100)
        looks = drift.read(connection, 0)
    assert [[sha256 for sha256, _ in look.pictures] for look in looks] == [[], [sha(2)]]


def test_with_nothing_to_report_it_says_why(database: Database, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="kept nothing"):
        drift_report.main(["--output", str(tmp_path / "out.html")])
    with pytest.raises(SystemExit, match="does not exist"):
        drift_report.main(["--store-url", f"sqlite:///{tmp_path}/nowhere.db"])
