"""The alert rules and the Grafana dashboard make sense over the worker's metrics."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from worker.engine.loops.supervisor import PATIENCE
from worker.telemetry.events import EVENTS
from worker.telemetry.metrics import METRICS, PREFIX, STATES, Metric

CONFIG = Path(__file__).parents[2] / "config"
GROUPS: list[dict[str, Any]] = yaml.safe_load((CONFIG / "alerts.yml").read_text())["groups"]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
PANELS: list[dict[str, Any]] = json.loads((CONFIG / "grafana.json").read_text())["panels"]
QUERIES = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]
EXPRESSIONS = [(rule["alert"], rule["expr"]) for rule in RULES] + [
    (title, target["expr"]) for title, target in QUERIES
]

# Each series by its name in a query.
SERIES: dict[str, Metric] = {
    metric.name + suffix: metric
    for metric in reversed(METRICS)
    for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
}
# Labels that Prometheus adds to every scraped series.
ADDED = frozenset({"instance", "job"})


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
        ("rate(orgworker_overdue[5m]) > 0", "rate of a gauge"),
        ("orgworker_runs_fired_total > 0", "by its value"),
        ("sum(orgworker_runs_fired_total) > 0", "by its value"),
        ('orgworker_slots{loop="x"} > 0', "no label loop"),
        ("sum by (org) (rate(orgworker_attempts_total[5m]))", "no series has the label org"),
        ("orgworker_slots_used / sum(orgworker_slots)", "never match"),
        ("histogram_quantile(0.9, sum(rate(orgworker_lateness_seconds_bucket[5m])))", "without buckets"),
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


def test_a_first_rise_is_seen_since_the_series_is_there_before_it():
    """Prometheus takes a counter that appears as 1 for one that has always been 1."""
    begun = (f"{PREFIX}events_total", f"{PREFIX}attempt_states_total")
    for rule in RULES:
        if "increase" in rule["expr"] and rule["expr"].endswith("> 0"):
            names = [name for name, _ in selectors(rule["expr"])]
            assert not [name for name in names if SERIES[name].labels and name not in begun], rule["alert"]


def test_a_rule_has_what_prometheus_takes_and_says_what_to_do_with_labels_that_it_has():
    for rule in RULES:
        assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}
        assert re.fullmatch(r"Orgworker([A-Z][a-z]+)+", rule["alert"])
        assert promql.parse_duration(rule.get("for", "1m")) <= timedelta(hours=1), rule["alert"]
        assert set(rule["labels"]) == {"severity"}, rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        annotations = rule["annotations"]
        assert set(annotations) == {"summary", "description"}, rule["alert"]
        assert all(text.endswith(".") for text in annotations.values()), rule["alert"]
        assert labels_in("".join(annotations.values())) <= result_of(rule["expr"]).labels, rule["alert"]


def test_a_loop_is_reported_as_stalled_when_its_worker_says_so():
    [stalled] = [rule for rule in RULES if rule["alert"] == "OrgworkerLoopStalled"]

    assert stalled["expr"].endswith(f"> {PATIENCE:g}")


def test_a_legend_names_only_labels_that_its_query_has():
    for title, target in QUERIES:
        assert labels_in(target["legendFormat"]) <= result_of(target["expr"]).labels, title


def test_a_panel_shows_seconds_as_seconds_and_bytes_as_bytes():
    units = {"s": "_seconds", "bytes": "_bytes"}
    for panel in PANELS:
        names = [name for target in panel["targets"] for name, _ in selectors(target["expr"])]
        unit = panel["fieldConfig"]["defaults"]["unit"]
        measured = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
        ends = (units[unit],) if unit in units else tuple(units.values())
        assert {name.endswith(ends) for name in measured} == {unit in units}, panel["title"]


def test_the_boards_panels_lie_beside_each_other():
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        x, y, w, h = (panel["gridPos"][side] for side in "xywh")
        cells = {(column, row) for column in range(x, x + w) for row in range(y, y + h)}
        assert x + w <= 24
        assert not taken & cells, panel["title"]
        taken |= cells


# ---- what a PromQL expression gives over the worker's metrics


class Wrong(Exception):
    """The expression parses but makes no sense."""


@dataclass(frozen=True)
class Result:
    """The labels of an expression's series; a counter `rises` until `rate` or `increase` is applied."""

    labels: frozenset[str]
    rises: bool = False
    is_number: bool = False


def selectors(text: str) -> list[tuple[str, dict[str, str]]]:
    """The series in the expression, each with the labels that it compares with a text."""
    found: list[tuple[str, dict[str, str]]] = []

    def visit(expr: promql.Expr) -> None:
        if isinstance(expr, promql.VectorSelector):
            found.append((expr.name, {one.name: one.value for one in expr.matchers.matchers}))

    promql.walk(promql.parse(text), visit)
    return found


def result_of(text: str) -> Result:
    """The result of the expression.

    Raises:
        ValueError: it is not PromQL, or a function gets an argument of the wrong type.
        Wrong: a metric or label is not documented, a counter is used by its value or a
            gauge by its rise, or two sides can never match.
    """
    return evaluate(promql.parse(text))


def evaluate(expr: Any) -> Result:
    match expr:
        case promql.NumberLiteral():
            return Result(frozenset(), is_number=True)
        case promql.ParenExpr():
            return evaluate(expr.expr)
        case promql.VectorSelector():
            return of_selector(expr)
        case promql.Call() if expr.func.name == "time":
            return Result(frozenset(), is_number=True)
        case promql.Call():
            return of_call(expr.func.name, expr.args[-1])
        case promql.AggregateExpr():
            return of_aggregation(expr)
        case promql.BinaryExpr():
            left, right = value_of(expr.lhs), value_of(expr.rhs)
            if left.is_number or right.is_number:
                return right if left.is_number else left
            if left.labels != right.labels:
                raise Wrong(f"the two sides never match: {sorted(left.labels)} and {sorted(right.labels)}")
            return left
    raise Wrong(f"this test does not support {type(expr).__name__}")


def of_selector(selector: Any) -> Result:
    metric = SERIES.get(selector.name)
    if metric is None:
        raise Wrong(f"{selector.name} is not in docs/reference/metrics.md")
    labels = ADDED | set(metric.labels) | ({"le"} if selector.name.endswith("_bucket") else set())
    unknown = {one.name for one in selector.matchers.matchers} - labels
    if unknown:
        raise Wrong(f"{selector.name} has no label {', '.join(sorted(unknown))}")
    return Result(frozenset(labels), rises=metric.kind != "gauge")


def of_call(function: str, argument: Any) -> Result:
    if function in ("rate", "increase"):
        given = of_selector(argument.vector_selector)
        if not given.rises:
            raise Wrong(f"{function} of a gauge: {argument.vector_selector.name}")
        return Result(given.labels)
    if function == "absent":
        return Result(frozenset(one.name for one in argument.matchers.matchers))
    given = value_of(argument)
    if function == "histogram_quantile" and "le" in given.labels:
        return Result(given.labels - {"le"})
    raise Wrong(f"{function} without buckets, or a function that this test does not support")


def of_aggregation(aggregation: Any) -> Result:
    operator, modifier = str(aggregation.op), aggregation.modifier
    given = evaluate(aggregation.expr) if operator == "count" else value_of(aggregation.expr)
    if operator == "topk":
        return given
    if modifier is None:
        return Result(frozenset())
    if modifier.type != promql.AggModifierType.By:
        raise Wrong("`without` also keeps labels that are added later: use `by`")
    missing = set(modifier.labels) - given.labels
    if missing:
        raise Wrong(f"no series has the label {', '.join(sorted(missing))}")
    return Result(frozenset(modifier.labels))


def value_of(expr: Any) -> Result:
    """The result of an expression whose value is used, which must not be a bare counter."""
    given = evaluate(expr)
    if given.rises:
        raise Wrong("a counter is used by its value, not by its rise")
    return given


def labels_in(template: str) -> set[str]:
    """The labels in a template of a rule or a legend."""
    return set(re.findall(r"\{\{ *(?:\$labels\.)?(\w+) *\}\}", template))
