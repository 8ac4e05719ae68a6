"""Events and metrics from their tables in the code, alert rules from config/alerts.yml."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from docs.generate.tables import code, codes, table
from worker.telemetry.events import EVENTS
from worker.telemetry.metrics import METRICS

RULES = Path(__file__).parents[2] / "config/alerts.yml"


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


def rules() -> str:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    rows = [
        (
            code(rule["alert"]),
            rule["labels"]["severity"],
            _in_words(rule["annotations"]["summary"]),
            _in_words(rule["annotations"]["description"]),
        )
        for group in groups
        for rule in group["rules"]
    ]
    return table(("rule", "severity", "says", "then"), rows)


def _in_words(template: str) -> str:
    """Replace `{{ $labels.NAME }}` in an annotation by NAME in capitals."""
    return re.sub(r"\{\{ *\$labels\.(\w+) *\}\}", lambda found: found[1].upper(), template)
