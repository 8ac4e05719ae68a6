"""The documented table of metrics is the one in the code."""

from __future__ import annotations

import os
from pathlib import Path

from worker.telemetry.metric_table import METRICS

REFERENCE = Path(__file__).parents[3] / "docs" / "reference" / "metrics.md"
HEAD = """\
# Metrics

Everything that `/metrics` serves, in Prometheus' text format. The set is closed. No metric has an org for a
label, so that ten thousand orgs make no more series than ten; `[web] metrics_top_orgs = N` adds
`orgworker_org_attempts_total` for the N orgs that had the most attempts in this process. Every event of
[events.md](events.md) is counted in `orgworker_events_total`. A histogram has the series `_bucket`, `_sum`
and `_count`.

| metric | kind | labels | meaning |
|---|---|---|---|
"""


def test_the_reference_lists_every_metric():
    """`UPDATE_REFERENCE=1 ./dev test tests/unit/telemetry` writes it anew."""
    expected = HEAD
    for metric in METRICS:
        if metric.meaning:
            labels = ", ".join(f"`{label}`" for label in metric.labels)
            expected += f"| `{metric.name}` | {metric.kind} | {labels} | {metric.meaning} |\n"
    if os.environ.get("UPDATE_REFERENCE"):
        REFERENCE.write_text(expected)

    assert REFERENCE.read_text() == expected
