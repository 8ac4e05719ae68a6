"""Traces of a process, if they are turned on and OpenTelemetry is installed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager

from worker.clock import Clock
from worker.errors import ConfigurationError
from worker.settings.sections import TracingSettings
from worker.telemetry import events, tracing
from worker.telemetry.masking import masker

# Standard variables that may contain the key of a collector.
HEADERS = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")


def traces_of(
    settings: TracingSettings, clock: Clock, *, version: str, record_content: bool = False
) -> AbstractContextManager[None]:
    """A context manager that makes and sends traces; nothing starts before its block.

    With `record_content` they have what people, models and tools say.

    Raises ConfigurationError if OpenTelemetry is not installed.
    """
    if not settings.enabled or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return contextlib.nullcontext()
    try:
        from worker.telemetry import otel  # noqa: F401 - fails here rather than later
    except ImportError as error:
        raise ConfigurationError(
            f"tracing.enabled is true, but OpenTelemetry is not installed ({error.name} is missing)",
            fix="install orgworker with its extra otel (the documentation's page Install), "
            "or set tracing.enabled to false",
        ) from error
    for headers in (settings.headers, *(os.environ.get(name, "") for name in HEADERS)):
        for part in headers.split(","):
            masker.register(part.partition("=")[2])
    return _tracing(settings, clock, version, record_content)


@contextlib.contextmanager
def _tracing(settings: TracingSettings, clock: Clock, version: str, record_content: bool) -> Iterator[None]:
    from worker.telemetry import otel

    exporter = otel.QuietExporter(otel.otlp_exporter(settings.endpoint, settings.headers))
    tracer = otel.OtelTracer(
        exporter,
        clock,
        version=version,
        dashboard_url=settings.dashboard_url,
        records_texts=record_content,
    )
    stop_listening = events.listen(tracer.hear)
    stop_tracing = tracing.use(tracer)
    try:
        yield
    finally:
        stop_tracing()
        stop_listening()
        tracer.close()
