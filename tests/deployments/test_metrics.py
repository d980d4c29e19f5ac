"""Metrics: what a picture's record adds to them, and that no client can make series without end."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from typing import Any

import pytest

from app.problems import CODES
from deployments import metrics
from deployments.annotation import Annotation, Provenance
from deployments.metrics import METRICS, MOST_SERIES, Metric, Metrics


class Recorded:
    """What has been recorded: name -> [(value, labels)]."""

    def __init__(self) -> None:
        self.of: dict[str, list[tuple[float, tuple[str, ...]]]] = defaultdict(list)

    def record(self, metric: str, value: float, *labels: str) -> None:
        assert len(labels) == len(METRICS[metric].labels)
        self.of[metric].append((value, labels))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    monkeypatch.setattr(Metrics, "record", lambda self, *arguments: recorded.record(*arguments))
    return recorded


def annotation(**timings: float) -> Annotation:
    return Annotation(id="1", sha256="0" * 64, timings_ms={"decode": 4, "total": 400, **timings})


def test_a_picture_that_all_stages_answered(recorded: Recorded) -> None:
    record = annotation(detector=80, captioner=250, tagger=95)
    provenance = Provenance(c2pa="absent", declared_ai=None)
    record.detected({"label": "uncertain", "ai_probability": 0.5, "model": "starter:detector#d1"}, provenance)
    record.captioned({"text": "a brown dog", "model": "/a/folder#with-a-hash#c1"})
    record.tagged({"tags": ["dog", "brown"], "model": "t#t1", "prompt": "tags-1"})
    Metrics().picture(record)
    assert recorded.of["verdicts"] == [(1, ("uncertain", "d1"))]
    assert recorded.of["ai_probability"] == [(0.5, ("d1",))]
    assert recorded.of["provenance"] == [(1, ("absent", "nothing"))]
    assert recorded.of["caption_words"] == [(3, ("c1",))]
    assert recorded.of["picture_tags"] == [(2, ("t1",))]
    assert recorded.of["pictures"] == [(1, ("answered",))]
    assert {labels: value for value, labels in recorded.of["stage_seconds"]} == {
        ("decode", ""): 0.004,
        ("total", ""): 0.4,
        ("detector", "d1"): 0.08,
        ("captioner", "c1"): 0.25,
        ("tagger", "t1"): 0.095,
    }
    assert "stage_errors" not in recorded.of


def test_a_stage_that_failed_is_an_error_and_no_latency(recorded: Recorded) -> None:
    record = annotation(captioner=250, tagger=60_000)
    record.captioned({"text": "a dog", "model": "c#c1"})
    record.failed("tagger", "timeout", "late")
    Metrics().picture(record, {"captioner": "c1", "tagger": "t1"})
    assert recorded.of["stage_errors"] == [(1, ("tagger", "timeout", "t1"))]
    assert recorded.of["pictures"] == [(1, ("partial",))]
    assert {labels[0] for _, labels in recorded.of["stage_seconds"]} == {"decode", "captioner", "total"}


def test_a_picture_that_no_stage_answered(recorded: Recorded) -> None:
    record = annotation()
    record.failed("detector", "overloaded", "full")
    Metrics().picture(record)
    assert recorded.of["pictures"] == [(1, ("failed",))]


def test_tags_of_the_model_and_of_the_rules(recorded: Recorded) -> None:
    Metrics().tagged("t1", 5, 3)
    Metrics().tagged("t1", 4, 4)
    Metrics().tagged("t1", 1, 0)
    model, rules = ("model", "t1"), ("rules", "t1")
    assert recorded.of["tags"] == [(3, model), (2, rules), (4, model), (1, rules)]


def test_a_revision_that_goes_out_of_service_counts_no_more(recorded: Recorded) -> None:
    Metrics().in_service("detector", "d1")
    Metrics().in_service("detector", "d2", "d1")
    Metrics().in_service("detector", "d2", "d2")
    assert recorded.of["model"] == [
        (1, ("detector", "d1")),
        (0, ("detector", "d1")),
        (1, ("detector", "d2")),
        (1, ("detector", "d2")),
    ]


def test_series_are_bounded_whatever_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = Metric("stage_seconds")
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(metric, "_record", lambda value, tags: seen.append(dict(tags)))
    for number in range(10 * MOST_SERIES):
        metric.record(1.0, "detector", f"revision-{number}")
    metric.record(1.0, "detector", "revision-0")
    series = {tuple(tags.items()) for tags in seen}
    assert len(series) == MOST_SERIES + 1
    assert seen[-2] == {"stage": "other", "revision": "other"}
    assert seen[-1] == {"stage": "detector", "revision": "revision-0"}, "those that were there first stay"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("batch_pictures", (*range(1, 9), 16, 32, 64, 128)),
        ("picture_tags", range(1, 11)),
        ("trial_agreement", (0, 1)),
    ],
)
def test_what_ray_makes_of_a_histogram_is_the_value_itself(
    monkeypatch: pytest.MonkeyPatch, name: str, values: tuple[float, ...]
) -> None:
    from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder

    monkeypatch.setattr(OpenTelemetryMetricRecorder, "_init_metrics", lambda self: None)
    recorder, bounds = OpenTelemetryMetricRecorder(), METRICS[name].buckets
    recorder.register_histogram_metric(name, "", list(bounds))
    middles = recorder.get_histogram_bucket_midpoints(name)
    assert [middles[bisect_left(bounds, value)] for value in values] == pytest.approx(list(values), abs=0.01)


def test_the_time_to_answer_is_of_requests_that_were_worked_on(recorded: Recorded) -> None:
    for number, code in enumerate(("ok", "accepted", "overloaded", "timeout")):
        Metrics().request("/v1/detect", code, float(number))
    assert [value for value, _ in recorded.of["request_seconds"]] == [0.0, 3.0]
    assert len(recorded.of["requests"]) == 4


def test_requests_feedback_trials_and_the_store(recorded: Recorded) -> None:
    Metrics().request("/v1/detect", "ok", 0.2, "d1")
    Metrics().request("/v1/detect", "truncated", 0.2)
    assert recorded.of["requests"] == [(1, ("/v1/detect", "ok", "d1")), (1, ("/v1/detect", "truncated", ""))]
    Metrics().feedback("verdict", "ai", False, "d1")
    Metrics().feedback("tags", "", True, "t1")
    assert recorded.of["feedback"] == [(1, ("verdict", "ai", "wrong", "d1")), (1, ("tags", "", "right", "t1"))]
    Metrics().agreed("captioner", "c2", 0.25)
    assert recorded.of["trial_agreement"] == [(0.25, ("captioner", "c2"))]
    Metrics().store({"queued": 3, "dropped": 2, "pictures_dropped": 1})
    Metrics().store({"state": "off"})
    assert recorded.of["store_queued"] == [(3, ()), (0, ())]
    assert recorded.of["store_dropped"] == [
        (2, ("answers",)),
        (1, ("pictures",)),
        (0, ("answers",)),
        (0, ("pictures",)),
    ]


def test_what_waits_whose_senders_can_is_known_or_not(recorded: Recorded) -> None:
    Metrics().deferred((3, 12.5, 0.25))
    Metrics().deferred(None)
    for name, value in (("pictures_deferred", 3), ("deferred_age_seconds", 12.5), ("deferred_room_used", 0.25)):
        assert recorded.of[name] == [(value, ()), (pytest.approx(math.nan, nan_ok=True), ())]


def test_codes_and_end_points_fit_into_the_bound() -> None:
    # `ok`, and a client that goes away; four end points that annotate; revisions of three roll-outs, and none
    assert 4 * (len(CODES) + 2) * 4 <= METRICS["requests"].most
    assert all(name.startswith("ray_deeptrust_") for item in METRICS.values() for name in item.exported())


def test_every_metric_can_be_made_and_recorded_without_a_cluster() -> None:
    made: Any = Metrics()
    for name, definition in METRICS.items():
        made.record(name, 1.0, *("x" for _ in definition.labels))
    assert set(made._made) == set(METRICS)
    with pytest.raises(ValueError, match="zip"):
        metrics.Metric("verdicts").record(1.0, "ai")
