"""OpenTelemetry: one trace for each run, exported by OTLP.

Imported only if tracing is enabled: it needs the extra `orgworker[otel]`.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from datetime import datetime
from hashlib import blake2b

from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from opentelemetry.util.types import AttributeValue

from worker.bounded import remember
from worker.clock import Clock
from worker.ids import ALL_ORGS
from worker.telemetry import genai
from worker.telemetry.events import Emitted, emit
from worker.telemetry.masking import masker
from worker.telemetry.tracing import (
    BAD,
    MAX_REPLAYED,
    MAX_STEPS,
    METHODS,
    OTHER_METHOD,
    RESULTS,
    Marks,
    Result,
    StepSpan,
    Traced,
    TracedRequest,
    TracedStep,
)


def otlp_exporter(endpoint: str, headers: str) -> SpanExporter:
    """An exporter to this URL with headers `name=value,…`; the OTEL_* variables apply to empty ones."""
    given = dict(part.split("=", 1) for part in headers.split(",")) if headers else None
    return trace_exporter.OTLPSpanExporter(endpoint=endpoint or None, headers=given)


class QuietExporter(SpanExporter):
    """Reports once when the collector stops accepting spans, and once when it accepts them again.

    It suppresses the log of the wrapped exporter, which reports every attempt.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._dropped = 0
        self._messages: list[str] = []
        self._logger = logging.getLogger(trace_exporter.__name__)
        self._logger.addFilter(self._keep)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans; called from the export thread, takes up to some seconds."""
        self._messages.clear()
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            if not self._dropped:
                emit("traces.lost", error=next(iter(self._messages), result.name))
            self._dropped += len(spans)
        elif self._dropped:
            emit("traces.back", spans=self._dropped)
            self._dropped = 0
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
        self._logger.removeFilter(self._keep)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def _keep(self, record: logging.LogRecord) -> bool:
        """Keep the library's messages for the event; the first one has the reason."""
        self._messages.append(record.getMessage())
        return False


_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
# What a span has of an attempt, as `orgworker.NAME`.
_SHOWN = (
    *("org", "definition", "handler", "origin", "isolation"),
    *("attempt", "outcome", "state", "reason"),
)
# Maximum attempts with marks; more exist only if the ends of attempts are lost.
BOUND = 100_000
# Requests of an attempt that have spans, and characters of their hosts and errors.
MAX_REQUESTS = 1_000
MAX_HOST = 253
MAX_ERROR = 100
# Seconds to export the last spans at the end of the process.
LAST_EXPORT = 5.0


class OtelTracer:
    """Makes one trace for each run; its id is derived from the run id, so all attempts share it.

    The standard OTEL_* variables set sampler, resource, limits and batches. `dashboard_url` is the
    public URL of the console, or empty. With `records_texts` spans of models and tools have their texts.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        clock: Clock,
        *,
        version: str,
        dashboard_url: str = "",
        records_texts: bool = False,
    ) -> None:
        self.records_texts = records_texts
        self._clock = clock
        self._pages = dashboard_url.rstrip("/")
        self._ids = _ChosenIds()
        self._provider = TracerProvider(
            resource=_resource(version), id_generator=self._ids, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("orgworker", version)
        self._marks: dict[tuple[str, int], Marks] = {}
        # Spans of a kind below that of a handler.
        self._counts: OrderedDict[tuple[int, str], int] = OrderedDict()

    def hear(self, emitted: Emitted) -> None:
        """Mark the start of an attempt; drop the marks of one that was fenced out."""
        if emitted.event.name == "run.admitted":
            fields = emitted.fields
            if len(self._marks) >= BOUND:
                del self._marks[next(iter(self._marks))]
            self._marks[fields["run"], fields["fencing_token"]] = Marks(self._clock.now())
        elif emitted.event.name == "run.fenced_out":
            self.marks(emitted.fields["run"], emitted.fields["fencing_token"])

    def hand_over(self, run_id: str, fencing_token: int, parent: str | None = None) -> str | None:
        """Mark the call of a handler; returns its traceparent."""
        self._marks.setdefault((run_id, fencing_token), Marks()).handler_began_at = self._clock.now()
        handler = self._handler(run_id, fencing_token, parent)
        return f"00-{handler.trace_id:032x}-{handler.span_id:016x}-{handler.trace_flags:02x}"

    def _handler(self, run_id: str, fencing_token: int, parent: str | None) -> SpanContext:
        """The place of a handler's span, which is made when the attempt has ended."""
        above = None if parent is None else _parent_of(parent)
        trace_id = _trace_id(run_id) if above is None else above.trace_id
        context = None if above is None else set_span_in_context(NonRecordingSpan(above))
        sampling = self._provider.sampler.should_sample(context, trace_id, "RUN", SpanKind.SERVER)
        sampled = sampling.decision is Decision.RECORD_AND_SAMPLE
        flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
        place = _span_id(run_id, fencing_token, "handler")
        return SpanContext(trace_id, place, is_remote=True, trace_flags=flags)

    def marks(self, run_id: str, fencing_token: int) -> Marks:
        """Remove and return the marks of an attempt that has ended."""
        handler = _span_id(run_id, fencing_token, "handler")
        for kind in ("request", "step"):
            self._counts.pop((handler, kind), None)
        return self._marks.pop((run_id, fencing_token), Marks())

    def end(self, traced: Traced, marks: Marks) -> None:
        """Make the spans of an attempt that has ended."""
        result = RESULTS[traced.outcome]
        above = None if traced.parent is None else _parent_of(traced.parent)
        # A run that another one started is in the trace of that one, which gives its id.
        self._ids.trace_id = _trace_id(traced.run_id) if above is None else 0
        self._ids.span_id = _span_id(traced.run_id, traced.fencing_token, "attempt")
        attributes = {
            "cicd.pipeline.name": traced.pipeline,
            "cicd.pipeline.action.name": "RUN",
            "cicd.pipeline.run.id": traced.run_id,
            "cicd.pipeline.run.url.full": self._page(traced),
            "cicd.pipeline.result": result,
            "error.type": traced.error_type if result in BAD else None,
            **{f"orgworker.{name}": getattr(traced, name) for name in _SHOWN},
        }
        span = self._tracer.start_span(
            f"RUN {traced.pipeline}",
            context=None if above is None else set_span_in_context(NonRecordingSpan(above)),
            kind=SpanKind.SERVER,
            start_time=_nanoseconds(traced.started_at),
            attributes=_present(attributes),
        )
        if span.is_recording():
            self._end_token(span, traced, marks, result)
            for replayed in marks.replayed:
                span.add_event("orgworker.step.replayed", _step(replayed), _nanoseconds(replayed.ended_at))
            if marks.handler_began_at is not None:
                self._ids.span_id = _span_id(traced.run_id, traced.fencing_token, "handler")
                self._end_task(span, traced, "handler", marks.handler_began_at, traced.ended_at, result)
        _end(span, traced.ended_at, result)

    def request(self, traceparent: str, request: TracedRequest) -> None:
        """Make the span of a request below the handler's, for the first `MAX_REQUESTS` of an attempt."""
        parent = _parent_of(traceparent)
        if parent is None or not self._has_room(parent.span_id, "request", MAX_REQUESTS):
            return
        method = request.method if request.method in METHODS else OTHER_METHOD
        failed = request.error if request.status is None else _error_status(request.status)
        attributes: dict[str, AttributeValue | None] = {
            "http.request.method": method,
            "server.address": masker.mask(request.host, ALL_ORGS)[:MAX_HOST],
            "server.port": request.port,
            "http.response.status_code": request.status,
            "error.type": None if failed is None else failed[:MAX_ERROR],
        }
        span = self._tracer.start_span(
            "HTTP" if method == OTHER_METHOD else method,
            context=set_span_in_context(NonRecordingSpan(parent)),
            kind=SpanKind.CLIENT,
            start_time=request.started,
            attributes=_present(attributes),
        )
        if failed is not None:
            span.set_status(Status(StatusCode.ERROR))
        span.end(max(request.started, request.ended))

    def step(self, step: TracedStep) -> None:
        """Make the span of a step below the handler's, for the first `MAX_STEPS` of an attempt.

        A stored result becomes an event of the attempt's span, for the first `MAX_REPLAYED`.
        """
        handler, span = self._handler(step.run_id, step.fencing_token, step.parent), step.span
        if not handler.trace_flags.sampled:
            return
        if span.replayed:
            marks = self._marks.get((step.run_id, step.fencing_token))
            if marks is not None and len(marks.replayed) < MAX_REPLAYED:
                marks.replayed.append(span)
            return
        if not self._has_room(handler.span_id, "step", MAX_STEPS):
            return
        about, failed = span.about, None if span.error is None else span.error[:MAX_ERROR]
        operation = about.get(genai.OPERATION, "")
        model_or_tool = about.get(genai.NAMED_BY.get(operation, ""))
        attributes: dict[str, AttributeValue | None] = {
            **about,
            **(span.texts if self.records_texts else {}),
            "orgworker.step.key": span.key if self.records_texts else None,
            "cicd.pipeline.run.id": step.run_id,
            "orgworker.org": step.org,
            "orgworker.definition": step.definition,
            "orgworker.attempt": step.attempt,
            **_step(span),
            "error.type": failed,
        }
        made = self._tracer.start_span(
            span.name if model_or_tool is None else f"{operation} {model_or_tool}",
            context=set_span_in_context(NonRecordingSpan(handler)),
            kind=SpanKind.CLIENT if operation == genai.CHAT else SpanKind.INTERNAL,
            start_time=_nanoseconds(span.started_at),
            attributes=_present(attributes),
        )
        if failed is not None:
            made.set_status(Status(StatusCode.ERROR))
        made.end(_nanoseconds(span.ended_at))

    def _has_room(self, handler: int, kind: str, most: int) -> bool:
        """Count a span below this handler's; those of one run must not keep out those of others."""
        count = self._counts.get((handler, kind), 0) + 1
        remember(self._counts, (handler, kind), count, BOUND)
        return count <= most

    def close(self) -> None:
        """Send the last spans within `LAST_EXPORT` seconds."""
        ending = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        ending.start()
        ending.join(LAST_EXPORT)

    def _end_token(self, parent: Span, traced: Traced, marks: Marks, result: Result) -> None:
        """The span of the token request: until the token was ready or the attempt ended without one."""
        began_at, ready_at = marks.token_began_at or traced.started_at, traced.token_ready_at
        if ready_at is not None:
            self._end_task(parent, traced, "token", began_at, ready_at, "success")
            for flag, is_on in traced.flags:
                evaluation = {
                    "feature_flag.key": flag,
                    "feature_flag.result.variant": "on" if is_on else "off",
                    "feature_flag.provider.name": traced.issuer,
                    "feature_flag.context.id": traced.org,
                }
                parent.add_event("feature_flag.evaluation", evaluation, timestamp=_nanoseconds(ready_at))
        elif traced.outcome in ("no_token", "refused"):
            self._end_task(parent, traced, "token", began_at, traced.ended_at, result)

    def _end_task(
        self, parent: Span, traced: Traced, task: str, began_at: datetime, ended_at: datetime, result: Result
    ) -> None:
        attributes = {
            "cicd.pipeline.task.name": task,
            "cicd.pipeline.task.run.id": f"{traced.run_id}/{traced.attempt}/{task}",
            "cicd.pipeline.task.run.url.full": self._page(traced),
            "cicd.pipeline.task.run.result": result,
            "error.type": traced.error_type if result in BAD else None,
        }
        context, start_time = set_span_in_context(parent), _nanoseconds(began_at)
        span = self._tracer.start_span(
            task, context=context, start_time=start_time, attributes=_present(attributes)
        )
        _end(span, ended_at, result)

    def _page(self, traced: Traced) -> str | None:
        return f"{self._pages}/runs/{traced.run_id}" if self._pages else None


class _ChosenIds(RandomIdGenerator):
    """Ids set before a span is made, each used once; otherwise random ids."""

    def __init__(self) -> None:
        self.trace_id = self.span_id = 0

    def generate_trace_id(self) -> int:
        chosen, self.trace_id = self.trace_id, 0
        return chosen or super().generate_trace_id()

    def generate_span_id(self) -> int:
        chosen, self.span_id = self.span_id, 0
        return chosen or super().generate_span_id()


def _resource(version: str) -> Resource:
    resource = Resource.create({SERVICE_VERSION: version})
    if str(resource.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service"):
        return resource.merge(Resource({SERVICE_NAME: "orgworker"}))
    return resource


def _present(attributes: Mapping[str, AttributeValue | None]) -> Mapping[str, AttributeValue]:
    return {name: value for name, value in attributes.items() if value is not None}


def _step(span: StepSpan) -> dict[str, AttributeValue]:
    return {"orgworker.step": span.name, "orgworker.step.occurrence": span.occurrence}


def _end(span: Span, at: datetime, result: Result) -> None:
    if result in BAD:
        span.set_status(Status(StatusCode.ERROR))
    span.end(_nanoseconds(at))


def _parent_of(traceparent: str) -> SpanContext | None:
    """The span that a W3C traceparent names; None for any other text."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    return SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))


def _error_status(status: int) -> str | None:
    """The `error.type` of a response: its status from 400 on, else None."""
    return str(status) if status >= 400 else None


def _trace_id(run_id: str) -> int:
    # A hash, because samplers expect random digits and a run id starts with its time.
    return int.from_bytes(blake2b(run_id.encode(), digest_size=16).digest())


def _span_id(run_id: str, fencing_token: int, part: str) -> int:
    return int.from_bytes(blake2b(f"{run_id}/{fencing_token}/{part}".encode(), digest_size=8).digest())


def _nanoseconds(at: datetime) -> int:
    return int(at.timestamp() * 1_000_000) * 1000
