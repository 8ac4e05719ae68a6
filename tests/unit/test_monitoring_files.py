"""The alert rules and the Grafana board make sense over the metrics that the worker has."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tests.fakes.promql import SERIES, Wrong, labels_in, result_of, selectors
from worker.execution.loops.supervisor import PATIENCE
from worker.telemetry.events import EVENTS
from worker.telemetry.metrics import PREFIX, STATES

CONFIG = Path(__file__).parents[2] / "config"
GROUPS: list[dict[str, Any]] = yaml.safe_load((CONFIG / "alerts.yml").read_text())["groups"]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
PANELS: list[dict[str, Any]] = json.loads((CONFIG / "grafana.json").read_text())["panels"]
QUERIES = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]
EXPRESSIONS = [(rule["alert"], rule["expr"]) for rule in RULES] + [
    (title, target["expr"]) for title, target in QUERIES
]

rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])


def test_the_files_hold_rules_and_panels():
    assert len({rule["alert"] for rule in RULES}) == len(RULES) >= 15
    assert len({panel["id"] for panel in PANELS}) == len(PANELS) >= 15


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS)
def test_an_expression_makes_sense_over_the_documented_metrics(where: str, expression: str):
    result_of(expression)


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("orgworker_overdu == 1", "not in docs/reference/metrics.md"),
        ("orgworker_overdue == ", "invalid promql query"),
        ("rate(orgworker_runs_fired_total) > 0", "expected type matrix"),
        ("rate(orgworker_runs_fired_total[5x]) > 0", "duration"),
        ("rate(orgworker_overdue[5m]) > 0", "does not only rise"),
        ("orgworker_runs_fired_total > 0", "by its value"),
        ("sum(orgworker_runs_fired_total) > 0", "by its value"),
        ('orgworker_slots{loop="x"} > 0', "no label loop"),
        ("sum by (org) (rate(orgworker_attempts_total[5m]))", "nothing there has the label org"),
        ("orgworker_slots_used / sum(orgworker_slots)", "never match"),
        ("histogram_quantile(0.9, sum(rate(orgworker_lateness_seconds_bucket[5m])))", "no buckets"),
    ],
)
def test_what_makes_no_sense_is_found(expression: str, fault: str):
    with pytest.raises((Wrong, ValueError), match=fault):
        result_of(expression)


def test_a_value_that_is_compared_is_one_that_comes():
    closed = {"event": set(EVENTS), "state": set(STATES)}
    compared = {
        (label, value)
        for _, expression in EXPRESSIONS
        for _, labels in selectors(expression)
        for label, value in labels.items()
    }

    assert compared
    assert {(label, value) for label, value in compared if value not in closed[label]} == set()


@rules
def test_a_first_rise_is_seen_since_the_series_is_there_before_it(rule: dict[str, Any]):
    """Prometheus takes a counter that appears as 1 for one that has always been 1."""
    if "increase" in rule["expr"] and rule["expr"].endswith("> 0"):
        for name, _ in selectors(rule["expr"]):
            begun = (f"{PREFIX}events_total", f"{PREFIX}attempt_states_total")
            assert not SERIES[name].labels or name in begun


@rules
def test_a_rule_has_what_prometheus_takes_and_no_more(rule: dict[str, Any]):
    assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}
    assert re.fullmatch(r"Orgworker([A-Z][a-z]+)+", rule["alert"])
    assert promql_parser.parse_duration(rule.get("for", "1m")) <= timedelta(hours=1)
    assert set(rule["labels"]) == {"severity"}
    assert rule["labels"]["severity"] in ("warning", "critical")


@rules
def test_a_rule_says_what_it_is_and_what_to_do_with_labels_that_it_has(rule: dict[str, Any]):
    annotations = rule["annotations"]

    assert set(annotations) == {"summary", "description"}
    assert all(text.endswith(".") for text in annotations.values())
    assert labels_in("".join(annotations.values())) <= result_of(rule["expr"]).labels


def test_a_loop_is_reported_as_stalled_when_its_worker_says_so():
    [stalled] = [rule for rule in RULES if rule["alert"] == "OrgworkerLoopStalled"]

    assert stalled["expr"].endswith(f"> {PATIENCE:g}")


@pytest.mark.parametrize(("title", "target"), QUERIES)
def test_a_legend_names_only_labels_that_its_query_has(title: str, target: dict[str, Any]):
    assert labels_in(target["legendFormat"]) <= result_of(target["expr"]).labels


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_shows_seconds_as_seconds_and_bytes_as_bytes(panel: dict[str, Any]):
    names = [name for target in panel["targets"] for name, _ in selectors(target["expr"])]
    units = {"s": "_seconds", "bytes": "_bytes"}
    unit = panel["fieldConfig"]["defaults"]["unit"]
    measured = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}

    if unit in units:
        assert all(name.endswith(units[unit]) for name in measured)
    else:
        assert not any(name.endswith(tuple(units.values())) for name in measured)


def test_the_boards_panels_lie_beside_each_other():
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        x, y, w, h = (panel["gridPos"][side] for side in "xywh")
        cells = {(column, row) for column in range(x, x + w) for row in range(y, y + h)}
        assert x + w <= 24
        assert not taken & cells, panel["title"]
        taken |= cells
