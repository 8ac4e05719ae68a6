"""Span export: spans on their way to a collector by OTLP, whose absence is told once, and its return.

Only imported where traces are asked for: it needs the extra `orgworker[otel]`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from worker.telemetry.events import emit


def otlp_exporter(endpoint: str, headers: str) -> SpanExporter:
    """An exporter to this URL with these headers, `name=value,…`; what is empty the OTEL_* variables say."""
    given = dict(part.split("=", 1) for part in headers.split(",")) if headers else None
    return trace_exporter.OTLPSpanExporter(endpoint=endpoint or None, headers=given)


class ToldExporter(SpanExporter):
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
