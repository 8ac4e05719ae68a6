"""Where nobody asks for traces there are none, and no library of theirs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from worker.settings.sections import TracingSettings
from worker.telemetry import events, tracing
from worker.wiring.traces import traces_of


def test_without_a_tracer_an_attempt_has_no_place_in_a_trace():
    assert tracing.in_use() is None
    assert tracing.traceparent("r", 1) is None


def test_a_worker_that_traces_nothing_loads_no_opentelemetry():
    program = (
        "import sys, worker.app, worker.app.process; print([m for m in sys.modules if 'telemetry' in m])"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert "worker.telemetry.tracing" in loaded.stdout
    assert "opentelemetry" not in loaded.stdout


@pytest.mark.parametrize(
    ("enabled", "environment"), [(False, {}), (True, {"OTEL_SDK_DISABLED": "true"}), (True, {})]
)
def test_nothing_listens_but_where_traces_are_asked_for(clock, monkeypatch, enabled, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    traces = traces_of(TracingSettings(enabled=enabled), clock, version="1")

    with traces:
        asked = enabled and not environment
        assert (tracing.in_use() is not None) == asked
        assert len(events.listeners) == asked

    assert tracing.in_use() is None
    assert events.listeners == []
