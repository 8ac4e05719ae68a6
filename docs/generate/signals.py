"""Events and metrics, each from its one table."""

from __future__ import annotations

from docs.generate.tables import code, codes, table
from worker.telemetry.events import EVENTS
from worker.telemetry.metric_table import METRICS


def events() -> str:
    rows = [(code(event.name), event.level, codes(event.fields), event.meaning) for event in EVENTS.values()]
    return table(("event", "level", "fields", "meaning"), rows)


def metrics() -> str:
    rows = [
        (code(metric.name), metric.kind, codes(metric.labels), metric.meaning)
        for metric in METRICS
        if metric.meaning
    ]
    return table(("metric", "kind", "labels", "meaning"), rows)
