"""Span export: spans on their way to a collector by OTLP, whose absence is told once, and its return.

Only imported where traces are asked for: it needs the extra `orgworker[otel]`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from hashlib import blake2b

from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.util.types import AttributeValue

from worker.clock import Clock
from worker.telemetry.events import Emitted, emit
from worker.telemetry.tracing import BAD, RESULTS, Marks, Result, Traced


def otlp_exporter(endpoint: str, headers: str) -> SpanExporter:
    """An exporter to this URL with these headers, `name=value,…`; what is empty the OTEL_* variables say."""
    given = dict(part.split("=", 1) for part in headers.split(",")) if headers else None
    return trace_exporter.OTLPSpanExporter(endpoint=endpoint or None, headers=given)


class QuietExporter(SpanExporter):
    """Drops what is not taken, as the exporter inside does, and keeps the log short meanwhile.

    By itself that says so every other second, with each of its tries.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._dropped = 0
        self._words: list[str] = []
        self._logger = logging.getLogger(trace_exporter.__name__)
        self._logger.addFilter(self._keep)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send them, for some seconds; called from a thread that does nothing else."""
        self._words.clear()
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            if not self._dropped:
                emit("traces.lost", error=next(iter(self._words), result.name))
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
        """Take the library's words for the event; the first says why, the last that it gives up."""
        self._words.append(record.getMessage())
        return False


Key = tuple[str, int]
Attributes = Mapping[str, AttributeValue]

# Attempts of which something is remembered; more are on only where ends are lost.
BOUND = 100_000
# Seconds that the last spans are given at the end.
LAST_EXPORT = 5.0


class OtelTracer:
    """A trace for each run, under an id that follows from the run's: its attempts lie side by side in it.

    What the standard variables OTEL_* say holds: sampler, resource, limits, batches.
    `dashboard_url` is where the worker's pages are reached from outside, if anywhere.
    """

    def __init__(
        self, exporter: SpanExporter, clock: Clock, *, version: str, dashboard_url: str = ""
    ) -> None:
        self._clock = clock
        self._pages = dashboard_url.rstrip("/")
        self._ids = _ChosenIds()
        self._provider = TracerProvider(
            resource=_resource(version), id_generator=self._ids, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("orgworker", version)
        self._marks: dict[Key, Marks] = {}

    def hear(self, emitted: Emitted) -> None:
        """Note when an attempt begins, and forget one that is another worker's by now."""
        if emitted.event.name == "run.admitted":
            fields = emitted.fields
            if len(self._marks) >= BOUND:
                del self._marks[next(iter(self._marks))]
            self._marks[fields["run"], fields["fencing_token"]] = Marks(self._clock.now())
        elif emitted.event.name == "run.fenced_out":
            self.marks(emitted.fields["run"], emitted.fields["fencing_token"])

    def hand_over(self, run_id: str, fencing_token: int) -> str | None:
        """The traceparent of a handler that is to be called now."""
        self._marks.setdefault((run_id, fencing_token), Marks()).handler_began_at = self._clock.now()
        trace_id = _trace_id(run_id)
        sampling = self._provider.sampler.should_sample(None, trace_id, "RUN", SpanKind.SERVER)
        handler = _span_id(run_id, fencing_token, "handler")
        return f"00-{trace_id:032x}-{handler:016x}-{sampling.decision is Decision.RECORD_AND_SAMPLE:02x}"

    def marks(self, run_id: str, fencing_token: int) -> Marks:
        """What is known of an attempt that has ended; asked for once."""
        return self._marks.pop((run_id, fencing_token), Marks())

    def end(self, traced: Traced, marks: Marks) -> None:
        """Make the spans of an attempt that has ended."""
        result = RESULTS[traced.outcome]
        self._ids.trace_id = _trace_id(traced.run_id)
        self._ids.span_id = _span_id(traced.run_id, traced.fencing_token, "attempt")
        span = self._tracer.start_span(
            f"RUN {traced.pipeline}",
            kind=SpanKind.SERVER,
            start_time=_nanoseconds(traced.started_at),
            attributes=self._of_run(traced, result),
        )
        if span.is_recording():
            self._end_token(span, traced, marks, result)
            self._end_handler(span, traced, marks, result)
        _end(span, traced.ended_at, result)

    def close(self) -> None:
        """Send the last spans, for a few seconds at most."""
        ending = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        ending.start()
        ending.join(LAST_EXPORT)

    def _of_run(self, traced: Traced, result: Result) -> Attributes:
        known = {
            "cicd.pipeline.name": traced.pipeline,
            "cicd.pipeline.action.name": "RUN",
            "cicd.pipeline.run.id": traced.run_id,
            "cicd.pipeline.run.url.full": self._page(traced),
            "cicd.pipeline.result": result,
            "error.type": traced.error_type if result in BAD else None,
            "orgworker.org": traced.org,
            "orgworker.definition": traced.definition,
            "orgworker.handler": traced.handler,
            "orgworker.origin": traced.origin,
            "orgworker.isolation": traced.isolation,
            "orgworker.attempt": traced.attempt,
            "orgworker.outcome": traced.outcome,
            "orgworker.state": traced.state,
            "orgworker.reason": traced.reason,
        }
        return {name: value for name, value in known.items() if value is not None}

    def _end_token(self, parent: Span, traced: Traced, marks: Marks, result: Result) -> None:
        """The span of the token: until it was there, or until the attempt ended for the lack of it."""
        ready_at = traced.token_ready_at
        if ready_at is not None:
            self._end_task(parent, traced, "token", marks.token_began_at, ready_at, "success")
            for flag, is_on in traced.flags:
                parent.add_event(
                    "feature_flag.evaluation",
                    {
                        "feature_flag.key": flag,
                        "feature_flag.result.variant": "on" if is_on else "off",
                        "feature_flag.provider.name": traced.issuer,
                        "feature_flag.context.id": traced.org,
                    },
                    timestamp=_nanoseconds(ready_at),
                )
        elif traced.outcome in ("no_token", "refused"):
            self._end_task(parent, traced, "token", marks.token_began_at, traced.ended_at, result)

    def _end_handler(self, parent: Span, traced: Traced, marks: Marks, result: Result) -> None:
        if marks.handler_began_at is not None:
            self._ids.span_id = _span_id(traced.run_id, traced.fencing_token, "handler")
            began_at = marks.handler_began_at
            self._end_task(parent, traced, "handler", began_at, traced.ended_at, result)

    def _end_task(
        self,
        parent: Span,
        traced: Traced,
        task: str,
        began_at: datetime | None,
        ended_at: datetime,
        result: Result,
    ) -> None:
        known = {
            "cicd.pipeline.task.name": task,
            "cicd.pipeline.task.run.id": f"{traced.run_id}/{traced.attempt}/{task}",
            "cicd.pipeline.task.run.url.full": self._page(traced),
            "cicd.pipeline.task.run.result": result,
            "error.type": traced.error_type if result in BAD else None,
        }
        span = self._tracer.start_span(
            task,
            context=set_span_in_context(parent),
            start_time=_nanoseconds(began_at or traced.started_at),
            attributes={name: value for name, value in known.items() if value is not None},
        )
        _end(span, ended_at, result)

    def _page(self, traced: Traced) -> str | None:
        return f"{self._pages}/runs/{traced.run_id}" if self._pages else None


class _ChosenIds(RandomIdGenerator):
    """Ids that are set before a span is made, each used once; other spans get random ones."""

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


def _end(span: Span, at: datetime, result: Result) -> None:
    if result in BAD:
        span.set_status(Status(StatusCode.ERROR))
    span.end(_nanoseconds(at))


def _trace_id(run_id: str) -> int:
    # Not the id itself: its upper digits are the time, and samplers take them for random.
    return int.from_bytes(blake2b(run_id.encode(), digest_size=16).digest())


def _span_id(run_id: str, fencing_token: int, part: str) -> int:
    return int.from_bytes(blake2b(f"{run_id}/{fencing_token}/{part}".encode(), digest_size=8).digest())


def _nanoseconds(at: datetime) -> int:
    return int(at.timestamp() * 1_000_000) * 1000
