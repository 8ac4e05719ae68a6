"""The names of the metrics follow Prometheus' conventions, as `promtool check metrics` has them."""

from __future__ import annotations

import itertools
import re

from tests.fakes.log import PAGE
from worker.telemetry.events import EVENTS
from worker.telemetry.metrics import METRICS, SECONDS

DOCUMENTED = [metric for metric in METRICS if metric.meaning]
UNITS = {"seconds", "bytes"}
# No part of a name: units other than the base ones, abbreviations, and types.
BANNED = {"s", "ms", "us", "ns", "sec", "milliseconds", "microseconds", "minutes", "hours", "days"}
BANNED |= {"kb", "mb", "kib", "mib", "kilobytes", "megabytes", "bits", "percent"}
BANNED |= {"counter", "gauge", "histogram", "summary", "metric"}


def test_a_name_is_plain_and_says_its_kind_and_unit_at_its_end():
    for metric in DOCUMENTED:
        words = metric.name.split("_")
        assert re.fullmatch(r"(orgworker|process)(_[a-z]+)+", metric.name)
        assert not BANNED & set(words), metric.name
        assert (words[-1] == "total") == (metric.kind == "counter"), metric.name
        assert words[-1] not in {"bucket", "sum", "count"}, metric.name
        stem = words[:-1] if metric.kind == "counter" else words
        units = [word for word in stem if word in UNITS]
        assert units in ([], stem[-1:]), metric.name
        assert metric.kind != "histogram" or units == ["seconds"], metric.name
        assert re.fullmatch(r"[a-z0-9][^\n|]+[^.\n|]", metric.meaning), metric.name


def test_no_two_series_have_one_name():
    names = [
        metric.name + suffix
        for metric in DOCUMENTED
        for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
    ]

    assert len(set(names)) == len(names)


def test_rows_of_one_metric_agree():
    for _, rows in itertools.groupby(METRICS, lambda metric: metric.name):
        assert len({(row.kind, row.labels) for row in rows}) == 1


def test_seconds_are_measured_by_what_events_give_in_seconds():
    measured = [metric for metric in METRICS if metric.event and "_seconds" in metric.name]

    assert measured
    assert {metric.value for metric in measured} == {"seconds", "lateness", "ended"}
    assert list(SECONDS) == sorted(set(SECONDS))


def test_no_label_takes_a_value_for_each_org_run_or_error():
    labels = {
        label
        for metric in METRICS
        for label in metric.labels
        if metric.name != "orgworker_org_attempts_total"
    }

    # Meters are those that operators limit by a budget, pools those that they name; a worker names at most
    # `MAX_ORIGINS` origins.
    of_what_is_installed = {"handler", "issuer", "version", "isolation", "loop", "meter", "origin", "pool"}
    closed = {"event", "outcome", "state", "reason", "kind", "status", "result", "request", "per", "tariff"}
    # The first hundred; others are counted together.
    limited = {"origin"}
    assert labels == of_what_is_installed | closed | limited


def test_the_page_has_exactly_these_metrics_and_labels():
    rows = re.findall(
        r"(?m)^\| `(\w+)` \| (\w+) \| (.*?) \| (.*) \|$", (PAGE.parent / "metrics.md").read_text()
    )

    assert [
        (name, kind, tuple(re.findall(r"\w+", labels)), meaning) for name, kind, labels, meaning in rows
    ] == [(metric.name, metric.kind, metric.labels, metric.meaning) for metric in DOCUMENTED]


def test_every_event_has_a_metric():
    """`orgworker_events_total` counts them all; these have one that says more."""
    told = {metric.event for metric in METRICS if metric.event}

    assert told <= set(EVENTS)
    assert {"clock.went_back", "run.ended", "token.requested", "lease.lost", "loop.failed"} <= told
