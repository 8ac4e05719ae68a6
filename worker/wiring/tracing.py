"""Traces of a worker process, where `[tracing]` asks for them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

from worker.clock import Clock
from worker.errors import ConfigurationError
from worker.settings.sections import TracingSettings
from worker.telemetry import events, tracing
from worker.telemetry.masking import masker

if TYPE_CHECKING:
    from worker.telemetry.otel import OtelTracer

# The standard variables with what may be a collector's key.
HEADERS = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")


def tracing_of(
    settings: TracingSettings, clock: Clock, *, version: str
) -> Callable[[], AbstractContextManager[None]]:
    """What makes traces for as long as its block lasts; nothing is sent before.

    Raises:
        ConfigurationError: OpenTelemetry is not installed.
    """
    if not settings.enabled or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return contextlib.nullcontext
    try:
        from worker.telemetry import otel, span_export
    except ImportError as error:
        raise ConfigurationError(
            f"tracing.enabled asks for traces, and OpenTelemetry is not installed ({error.name} is missing)",
            fix="pip install 'orgworker[otel]', or set tracing.enabled to false",
        ) from error
    for headers in (settings.headers, *(os.environ.get(name, "") for name in HEADERS)):
        for part in headers.split(","):
            masker.register(part.partition("=")[2])

    def made() -> OtelTracer:
        exporter = span_export.ToldExporter(span_export.otlp_exporter(settings.endpoint, settings.headers))
        return otel.OtelTracer(exporter, clock, version=version, dashboard_url=settings.dashboard_url)

    return partial(_traced, made)


@contextlib.contextmanager
def _traced(made: Callable[[], OtelTracer]) -> Iterator[None]:
    tracer = made()
    unheard = events.listen(tracer.hear)
    unused = tracing.use(tracer)
    try:
        yield
    finally:
        unused()
        unheard()
        tracer.close()
