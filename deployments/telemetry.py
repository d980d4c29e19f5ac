"""What one request leaves behind in every process that it goes through: lines of log with its id, spans of its trace.

Serve hands a request's id (its ``X-Request-ID``) from replica to replica, puts it on every line that is logged while
the request is worked on, and, where tracing is on, makes spans of its own: one for the wait for a replica and one for
a replica's work, for each call; the first is the ingress's. Here is what it leaves open: lines with figures in fields
of their own (``note``), spans inside a replica (``span``, ``past_span``), where spans go (``processors``) and which
requests are traced (``AtTheDoor``).

Never noted: what a client sent or a model said. Knows no HTTP.

Environment, read in each process: ``DEEPTRUST_TRACES`` is the address of an OTLP collector (``http://HOST:4318``) or a
folder, and unset no trace is made; ``RAY_SERVE_TRACING_SAMPLING_RATIO`` the share of the requests that are traced
besides those whose sender asks for it with a sampled ``traceparent``; OpenTelemetry's own variables for headers and
certificates hold as well.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.context import attach, detach
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.sdk.trace.sampling import Sampler

_log = logging.getLogger("ray.serve")

VARIABLE = "DEEPTRUST_TRACES"
#: What Ray Serve reads, and what it is to find there.
EXPORTER_VARIABLE, EXPORTER = "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH", "deployments.telemetry:processors"
RATIO_VARIABLE, RATIO = "RAY_SERVE_TRACING_SAMPLING_RATIO", 0.01
#: Spans with which a trace may begin: the ingress's, and work on pictures whose sender did not wait.
INGRESS, DEFERRED = "replica_handle_request Ingress __call__", "deferred"
_FIRST = frozenset((INGRESS, DEFERRED))
#: Places of results and names of pictures stay out of traces: who knows a place has the answer.
_NAMES = re.compile(r"(/v1/(?:results|pictures)/)[^\s?]+")
_TRACER = "deeptrust"


# ---- lines -------------------------------------------------------------------------------------------------------


def note(event: str, **fields: Any) -> None:
    """One line about the request at hand, to the replica's log file. Serve adds request id, route, deployment and
    replica, and where the request is traced its trace's id is there too.

    Args:
        event: `request`, `picture`, `stage` and so on: the line's message.
        fields: figures, codes and revisions.
    """
    context = trace.get_current_span().get_span_context()
    if context.trace_flags.sampled:
        fields["trace_id"] = trace.format_trace_id(context.trace_id)
    _log.info(event, extra=fields | {"log_to_stderr": False}, stacklevel=2)


def milliseconds(seconds: float) -> float:
    """For a line: a tenth of a millisecond is exact enough."""
    return round(seconds * 1000, 1)


# ---- the request at hand -----------------------------------------------------------------------------------------


def request_id() -> str:
    """The id of the request that is being worked on, or "" if there is none, or none that can be kept."""
    from ray.serve.context import _get_serve_request_context

    found = _get_serve_request_context().request_id
    return found if len(found) <= 128 and found.isascii() and found.isprintable() else ""


def traceparent() -> str:
    """The span at hand as another process takes it up (W3C trace context), or "" where nothing is traced."""
    carrier: dict[str, str] = {}
    if is_traced():
        TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", "")


@contextlib.contextmanager
def resumed(request: str, parent: str) -> Iterator[None]:
    """Go on, in a task of its own, with a request that was taken in earlier, maybe by another process.

    Args:
        request: what ``request_id`` said then.
        parent: what ``traceparent`` said then.
    """
    if request:
        from ray.serve.context import _set_request_context

        _set_request_context(request_id=request)
    token = attach(TraceContextTextMapPropagator().extract({"traceparent": parent} if parent else {}))
    try:
        with span(DEFERRED, first=not parent, request_id=request):
            yield
    finally:
        detach(token)


# ---- spans -------------------------------------------------------------------------------------------------------


def is_traced() -> bool:
    """Whether the request at hand is."""
    return trace.get_current_span().get_span_context().trace_flags.sampled


@contextlib.contextmanager
def span(name: str, first: bool = False, **attributes: Any) -> Iterator[trace.Span]:
    """A part of the request's work as a span of its trace; nothing where it is not traced.

    Args:
        first: with it a trace may begin.
    """
    if not first and not is_traced():
        yield trace.INVALID_SPAN
        return
    tracer = trace.get_tracer(_TRACER)
    # what an exception says may quote something: its class is enough
    with tracer.start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as made:
        try:
            yield made
        except BaseException as error:
            made.set_status(trace.StatusCode.ERROR, type(error).__name__)
            raise


def past_span(name: str, began: float, ended: float, **attributes: Any) -> None:
    """The same for what is over: from and to are ``time.perf_counter()`` seconds."""
    if not is_traced():
        return
    zero_ns = time.time_ns() - int(time.perf_counter() * 1e9)
    tracer = trace.get_tracer(_TRACER)
    made = tracer.start_span(name, attributes=attributes, start_time=zero_ns + int(began * 1e9))
    made.end(zero_ns + int(ended * 1e9))


# ---- where spans go ----------------------------------------------------------------------------------------------


def environment(values: Mapping[str, str]) -> dict[str, str]:
    """What Ray Serve has to find in its environment, given what an operator set: nothing unless traces are wanted."""
    target = values.get(VARIABLE)
    if not target:
        return {}
    # Ray's processes have working directories of their own
    absolute = target if target.startswith(("http://", "https://")) else str(Path(target).absolute())
    return {
        VARIABLE: absolute,
        EXPORTER_VARIABLE: EXPORTER,
        RATIO_VARIABLE: values.get(RATIO_VARIABLE, str(RATIO)),
    }


def processors() -> list[SpanProcessor]:
    """Serve's call in each replica when tracing is on: where its spans go, from a bounded queue.

    The provider of spans is set here, before Serve sets its own, for the sake of the sampler.
    """
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create(
        {"service.name": "deeptrust", "host.name": socket.gethostname(), "process.pid": os.getpid()}
    )
    ratio = float(os.environ.get(RATIO_VARIABLE, RATIO))
    trace.set_tracer_provider(TracerProvider(sampler=at_the_door(ratio), resource=resource))
    # Serve tries to set its own after this, which OpenTelemetry refuses with a line that would only puzzle
    logging.getLogger("opentelemetry.trace").addFilter(lambda record: "Overriding" not in record.getMessage())
    return [BatchSpanProcessor(_without_names(_exporter(os.environ.get(VARIABLE, ""))))]


def _exporter(target: str) -> SpanExporter:
    if not target or target.startswith(("http://", "https://")):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        # without an address: the one of OpenTelemetry's own variables
        return OTLPSpanExporter(f"{target.rstrip('/')}/v1/traces" if target else None)
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    out = (folder / f"spans-{socket.gethostname()}-{os.getpid()}.jsonl").open("a")
    return ConsoleSpanExporter(out=out, formatter=lambda one: one.to_json(indent=None) + "\n")


def _without_names(exporter: SpanExporter) -> SpanExporter:
    """The exporter behind a filter: Serve puts whole paths into its spans."""
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    def clean(value: Any) -> Any:
        return _NAMES.sub(r"\1…", value) if isinstance(value, str) else value

    class Filtered(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            return exporter.export(
                [
                    ReadableSpan(
                        name=clean(one.name),
                        context=one.context,
                        parent=one.parent,
                        resource=one.resource,
                        attributes={key: clean(value) for key, value in (one.attributes or {}).items()},
                        events=one.events,
                        links=one.links,
                        kind=one.kind,
                        status=one.status,
                        start_time=one.start_time,
                        end_time=one.end_time,
                        instrumentation_scope=one.instrumentation_scope,
                    )
                    for one in spans
                ]
            )

        def shutdown(self) -> None:
            exporter.shutdown()

    return Filtered()


def at_the_door(ratio: float) -> Sampler:
    """Whether a request is traced is decided where it comes in, by its sender or by chance.

    Serve hands no context on from a request that is not traced, and each process after the first would decide again:
    the traces of ten requests in a hundred would have no beginning.
    """
    from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, SamplingResult, TraceIdRatioBased

    by_chance = TraceIdRatioBased(ratio)

    class First(Sampler):
        def should_sample(
            self, parent_context: Any, trace_id: int, name: str, *arguments: Any, **others: Any
        ) -> SamplingResult:
            if name not in _FIRST:
                return SamplingResult(Decision.DROP)
            return by_chance.should_sample(parent_context, trace_id, name, *arguments, **others)

        def get_description(self) -> str:
            return f"first{{{by_chance.get_description()}}}"

    return ParentBased(First())
