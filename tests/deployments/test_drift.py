"""The watcher for drift: it follows the detector's revision, takes its pictures only, and keeps what a report needs."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from deployments import drift
from deployments.drift import Drift, Observation
from deployments.drift_statistic import DriftSettings, Reference, make_reference
from deployments.metrics import METRICS, Metrics

SETTINGS = DriftSettings(window=32, step=8, dimensions=4, most=100, splits=2, stream=4_000, between_alarms=2_000)


def made(count: int, seed: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, (count, 6)), rng.normal(size=count), rng.normal(size=(count, 7))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return make_reference(*made(200, 0), SETTINGS, {"data": {"name": "made", "version": "1"}})


class Detector:
    """A handle's side of `drift_reference`."""

    def __init__(self, revision: str, data: bytes | None) -> None:
        self.revision, self.data, self.asked = revision, data, 0
        self.drift_reference = self

    def remote(self, known: str) -> asyncio.Future[tuple[str, bytes | None]]:
        self.asked += 1
        answer = asyncio.get_running_loop().create_future()
        answer.set_result((self.revision, None if known == self.revision else self.data))
        return answer


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[tuple[str, ...], float]]:
    """Metric -> labels -> its last value, of counters the sum."""
    found: dict[str, dict[tuple[str, ...], float]] = defaultdict(lambda: defaultdict(float))

    def record(_: Metrics, name: str, value: float, *labels: str) -> None:
        found[name][labels] = value + (found[name][labels] if METRICS[name].kind == "counter" else 0)

    monkeypatch.setattr(Metrics, "record", record)
    monkeypatch.setattr(drift, "_ASK_S", 0.0)
    return found


def seen(reference: Reference, revision: str, pictures: Any, name: str) -> list[Observation]:
    embeddings, margins, statistics = pictures
    own = np.column_stack([reference.projection(embeddings), margins]).astype(np.float32)
    return [
        Observation(f"{name}-{number}", revision, own[number], statistics[number].astype(np.float32))
        for number in range(len(margins))
    ]


def test_an_alarm_is_a_metric_a_line_and_a_row_with_the_pictures(
    reference: Reference, recorded: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        watcher = Drift(Detector("r1", reference.to_bytes()))  # type: ignore[arg-type]
        state = await watcher.observe(seen(reference, "r1", made(40, 1), "usual"))
        assert state["watching"] and state["filled"] == 1 and not state["alarm"]
        assert recorded["drift_alarm"] == {("r1",): 0} and recorded["drift_reference"] == {("r1",): 1}
        (first,) = state["keep"]
        assert not first["alarm"] and len(first["pictures"]) == drift._DRIVERS
        state = await watcher.observe(seen(reference, "r1", made(32, 2, shift=3), "new"))
        assert state["alarm"] and recorded["drift_alarm"] == {("r1",): 1}
        assert recorded["drift_statistic"]["embedding", "r1"] > 1
        row = next(row for row in state["keep"] if row["changed"])
        assert row["alarm"] and row["told"]["channel"] == "embedding" and row["told"]["ratios"]["embedding"] > 1
        assert all(sha256.startswith("new-") for sha256, _ in row["pictures"][:4])
        # looks in between are kept no oftener than once a minute
        state = await watcher.observe(seen(reference, "r1", made(64, 3, shift=3), "more"))
        assert state["alarm"] and state["keep"] == []
        assert recorded["drift_pictures"]["observed", "r1"] == 136

    with caplog.at_level(logging.WARNING, "ray.serve"):
        asyncio.run(run())
    (line,) = [message for message in caplog.messages if message.startswith("DRIFT")]
    assert "r1" in line and "app.drift_report" in line and "train.retrain --when drift" in line


def test_another_revision_begins_with_an_empty_window(reference: Reference, recorded: Any) -> None:
    async def run() -> None:
        detector = Detector("r1", reference.to_bytes())
        watcher = Drift(detector)  # type: ignore[arg-type]
        await watcher.observe(seen(reference, "r1", made(40, 1, shift=3), "new"))
        assert watcher.state()["alarm"]
        detector.revision = "r2"
        state = await watcher.observe(seen(reference, "r1", made(40, 2), "late"))
        assert (state["revision"], state["filled"], state["alarm"]) == ("r2", 0, False)
        assert recorded["drift_pictures"]["other", "r2"] == 40
        state = await watcher.observe(seen(reference, "r2", made(8, 3), "fresh"))
        assert state["pictures"] == 8 and state["ratios"] == {}

    asyncio.run(run())


@pytest.mark.parametrize(("data", "said"), [(None, "has no reference"), (b"damaged", "no reference for drift that")])
def test_without_a_reference_drift_is_off_and_says_so(
    reference: Reference, recorded: Any, caplog: pytest.LogCaptureFixture, data: bytes | None, said: str
) -> None:
    async def run() -> None:
        watcher = Drift(Detector("r1", data))  # type: ignore[arg-type]
        for number in range(3):
            state = await watcher.observe(seen(reference, "r1", made(40, number), "any"))
            assert not state["watching"] and said in state["message"] and state["keep"] == []

    with caplog.at_level(logging.WARNING, "ray.serve"):
        asyncio.run(run())
    assert recorded["drift_reference"] == {("r1",): 0} and "drift_statistic" not in recorded
    assert len([message for message in caplog.messages if said in message]) == 1, "once, and not every five seconds"
