"""Spans on their way: to where the settings say, and a collector that is away is told once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import pytest
import requests
from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from requests.adapters import HTTPAdapter

from worker.telemetry.otel import QuietExporter, otlp_exporter

SPANS = [ReadableSpan("a"), ReadableSpan("b")]


class Way(SpanExporter):
    """An exporter that is as talkative as the library's while its collector is `away`."""

    away = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if not self.away:
            return SpanExportResult.SUCCESS
        logger = logging.getLogger(trace_exporter.__name__)
        logger.warning("Transient error %s, retrying in 1 s", "refused")
        logger.error("Failed to export spans batch due to timeout")
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        pass


@pytest.fixture
def way() -> Way:
    return Way()


@pytest.fixture
def exporter(way: Way) -> Iterator[QuietExporter]:
    made = QuietExporter(way)
    yield made
    made.shutdown()


def test_a_collector_that_is_away_is_told_once_with_why_and_once_when_it_is_back(
    way, exporter, emitted, caplog
):
    exporter.export(SPANS)
    way.away = True
    results = [exporter.export(SPANS) for _ in range(3)]
    way.away = False
    exporter.export(SPANS)
    exporter.export(SPANS)

    assert results == [SpanExportResult.FAILURE] * 3
    assert [(one.event.name, one.fields) for one in emitted] == [
        ("traces.lost", {"error": "Transient error refused, retrying in 1 s"}),
        ("traces.back", {"spans": 6}),
    ]
    assert caplog.text == ""


def test_once_it_is_closed_the_library_speaks_for_itself(way, exporter, caplog):
    exporter.shutdown()
    way.away = True
    way.export(SPANS)

    assert "Transient error refused" in caplog.text


def test_an_exporters_address_and_headers_are_those_of_the_settings_else_of_the_variables(monkeypatch):
    sent: list[tuple[str, str, str]] = []

    def send(adapter: object, request: requests.PreparedRequest, **_: object) -> requests.Response:
        sent.append((request.url or "", request.headers["authorization"], request.headers["a"]))
        response = requests.Response()
        response.status_code = 200
        return response

    monkeypatch.setattr(HTTPAdapter, "send", send)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector.test:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=standard,a=c")
    for exporter in (
        otlp_exporter("http://other.test/v1/traces", "authorization=Bearer x=,a=b"),
        otlp_exporter("", ""),
    ):
        assert exporter.export([]) is SpanExportResult.SUCCESS
        exporter.shutdown()

    assert sent == [
        ("http://other.test/v1/traces", "Bearer x=", "b"),
        ("http://collector.test:4318/v1/traces", "standard", "c"),
    ]
