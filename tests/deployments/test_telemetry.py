"""Spans and lines of a request: which requests are traced, what spans may say, and that nothing happens unasked."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deployments import telemetry

SENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0{}"


def sampled(ratio: float, name: str, traceparent: str = "") -> bool:
    tracer = TracerProvider(sampler=telemetry.at_the_door(ratio)).get_tracer("test")
    context = TraceContextTextMapPropagator().extract({"traceparent": traceparent} if traceparent else {})
    return tracer.start_span(name, context=context).get_span_context().trace_flags.sampled


def test_a_trace_begins_at_the_ingress_by_chance_and_nowhere_else() -> None:
    tracer = TracerProvider(sampler=telemetry.at_the_door(0.1)).get_tracer("test")
    begun = [tracer.start_span(telemetry.INGRESS).get_span_context().trace_flags.sampled for _ in range(3000)]
    assert 200 < sum(begun) < 400
    assert sampled(1.0, telemetry.INGRESS) and sampled(1.0, "deferred") and not sampled(0.0, telemetry.INGRESS)
    assert not sampled(1.0, "route_to_replica") and not sampled(1.0, "replica_handle_request Detector detect")


@pytest.mark.parametrize("name", [telemetry.INGRESS, "route_to_replica", "stage detector"])
def test_a_sender_decides_for_its_own_trace(name: str) -> None:
    assert sampled(0.0, name, SENT.format(1)) and not sampled(1.0, name, SENT.format(0))


#: In a process of its own: a provider of spans is set once and for ever.
TRACED = """
import sys, time
from opentelemetry import trace
from deployments import telemetry
(processor,) = telemetry.processors()
trace.set_tracer_provider(trace.NoOpTracerProvider())  # as Serve does, and is refused
trace.get_tracer_provider().add_span_processor(processor)
try:
    with telemetry.resumed("request-1", ""):
        began = time.perf_counter()
        parent = telemetry.traceparent()
        time.sleep(0.01)
        telemetry.past_span("wait", began, time.perf_counter(), pictures=3)
        with telemetry.span("GET /v1/results/secret-place?x=1", path="/v1/results/secret-place"):
            raise RuntimeError("what a client sent")
except RuntimeError:
    pass
with telemetry.resumed("request-1", parent):
    pass
with telemetry.span("nobody asked"):
    assert not telemetry.is_traced() and telemetry.traceparent() == ""
processor.force_flush()
"""


def test_spans_go_to_a_file_with_their_parents_and_without_what_a_client_sent(tmp_path: Path) -> None:
    environment = {"DEEPTRUST_TRACES": str(tmp_path / "traces"), "RAY_SERVE_TRACING_SAMPLING_RATIO": "1"}
    root = str(Path(__file__).parents[2])
    ended = subprocess.run(
        [sys.executable, "-c", TRACED],
        env=environment | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0 and "Overriding" not in ended.stderr, ended.stderr
    (file,) = (tmp_path / "traces").iterdir()
    text = file.read_text()
    assert "secret-place" not in text and "what a client sent" not in text
    spans = {span["name"]: span for span in map(json.loads, text.splitlines())}
    assert set(spans) == {"wait", "GET /v1/results/…?x=1", "deferred"}
    assert len({span["context"]["trace_id"] for span in spans.values()}) == 1
    first, again = (span for span in map(json.loads, text.splitlines()) if span["name"] == "deferred")
    assert first["parent_id"] is None and again["parent_id"] == first["context"]["span_id"]
    assert spans["wait"]["parent_id"] == first["context"]["span_id"]
    assert spans["wait"]["attributes"]["pictures"] == 3
    assert first["start_time"] <= spans["wait"]["start_time"] < spans["wait"]["end_time"] <= first["end_time"]
    assert spans["GET /v1/results/…?x=1"]["status"] == {"status_code": "ERROR", "description": "RuntimeError"}
    assert first["resource"]["attributes"]["service.name"] == "deeptrust"


def test_untraced_work_makes_no_span_and_a_line_all_the_same(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("ray.serve")  # Ray keeps it to itself
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "ray.serve"), telemetry.span("quietly") as span:
        telemetry.past_span("before", time.perf_counter(), time.perf_counter())
        telemetry.note("stage", stage="detector", computed_ms=telemetry.milliseconds(0.01234))
    logger.removeHandler(caplog.handler)
    assert not span.is_recording()
    (line,) = caplog.records
    assert (line.message, line.stage, line.computed_ms) == ("stage", "detector", 12.3)  # type: ignore[attr-defined]
    assert line.filename == Path(__file__).name and not hasattr(line, "trace_id")


def test_traces_are_off_until_somebody_says_where_they_go() -> None:
    assert telemetry.environment({}) == {}
    wanted = telemetry.environment({"DEEPTRUST_TRACES": "/somewhere"})
    assert wanted == {
        "DEEPTRUST_TRACES": "/somewhere",
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "deployments.telemetry:processors",
        "RAY_SERVE_TRACING_SAMPLING_RATIO": "0.01",
    }
    chosen = telemetry.environment({"DEEPTRUST_TRACES": "/x", "RAY_SERVE_TRACING_SAMPLING_RATIO": "0.5"})
    assert chosen["RAY_SERVE_TRACING_SAMPLING_RATIO"] == "0.5"
    assert telemetry.environment({"DEEPTRUST_TRACES": "traces"})["DEEPTRUST_TRACES"] == str(Path("traces").absolute())
    collector = "http://10.0.0.1:4318"
    assert telemetry.environment({"DEEPTRUST_TRACES": collector})["DEEPTRUST_TRACES"] == collector
