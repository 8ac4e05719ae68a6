"""What a PromQL expression gives over the worker's documented metrics, and why it would give nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import promql_parser as promql

from worker.telemetry.metrics import METRICS, Metric

# Each series by the name that a query has for it.
SERIES: dict[str, Metric] = {
    metric.name + suffix: metric
    for metric in reversed(METRICS)
    for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
}
# Labels that Prometheus adds to all that it scrapes.
ADDED = frozenset({"instance", "job"})


class Wrong(Exception):
    """The expression can be parsed and makes no sense."""


@dataclass(frozen=True)
class Result:
    """What an expression gives: the `labels` of its series; `rises` says that it is a counter still."""

    labels: frozenset[str]
    rises: bool = False
    is_number: bool = False


def selectors(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each series that the expression names, with the labels that it compares with a text."""
    found: list[tuple[str, dict[str, str]]] = []

    def visit(expr: promql.Expr) -> None:
        if isinstance(expr, promql.VectorSelector):
            found.append((expr.name, {one.name: one.value for one in expr.matchers.matchers}))

    promql.walk(promql.parse(text), visit)
    return iter(found)


def result_of(text: str) -> Result:
    """What the expression gives.

    Raises:
        ValueError: it is no PromQL, or a function is given what it does not take.
        Wrong: a metric or label is not documented, a counter is taken by its value or a
            gauge by its rise, two sides can never match.
    """
    return _result(promql.parse(text))


def _result(expr: Any) -> Result:
    match expr:
        case promql.NumberLiteral():
            return Result(frozenset(), is_number=True)
        case promql.ParenExpr():
            return _result(expr.expr)
        case promql.VectorSelector():
            return _of_selector(expr)
        case promql.Call():
            return _of_call(expr)
        case promql.AggregateExpr():
            return _of_aggregation(expr)
        case promql.BinaryExpr():
            return _of_pair(expr)
    raise Wrong(f"no rule or panel needs {type(expr).__name__}; teach it to this module")


def _of_selector(selector: Any) -> Result:
    metric = SERIES.get(selector.name)
    if metric is None:
        raise Wrong(f"{selector.name} is not in docs/reference/metrics.md")
    is_bucket = metric.kind == "histogram" and selector.name.endswith("_bucket")
    labels = ADDED | set(metric.labels) | ({"le"} if is_bucket else set())
    unknown = {one.name for one in selector.matchers.matchers} - labels
    if unknown:
        raise Wrong(f"{selector.name} has no label {', '.join(sorted(unknown))}")
    return Result(frozenset(labels), rises=metric.kind != "gauge")


def _of_call(call: Any) -> Result:
    name, last = call.func.name, call.args[-1]
    if name in ("rate", "increase"):
        given = _of_selector(last.vector_selector)
        if not given.rises:
            raise Wrong(f"{last.vector_selector.name} does not only rise: {name} says nothing of it")
        return Result(given.labels)
    if name == "absent":
        return Result(frozenset(one.name for one in last.matchers.matchers))
    given = _value(last)
    if name == "histogram_quantile" and "le" in given.labels:
        return Result(given.labels - {"le"})
    raise Wrong(f"{name} is given no buckets, or no rule or panel needs it")


def _of_aggregation(aggregation: Any) -> Result:
    given = _result(aggregation.expr)
    if given.rises and str(aggregation.op) != "count":
        raise Wrong("a counter is added up by its value, not by its rise")
    if str(aggregation.op) == "topk":
        return given
    modifier = aggregation.modifier
    if modifier is None:
        return Result(frozenset())
    if modifier.type != promql.AggModifierType.By:
        raise Wrong("`without` keeps whatever comes in future: say `by`")
    missing = set(modifier.labels) - given.labels
    if missing:
        raise Wrong(f"nothing there has the label {', '.join(sorted(missing))}")
    return Result(frozenset(modifier.labels))


def _of_pair(pair: Any) -> Result:
    left, right = _value(pair.lhs), _value(pair.rhs)
    if left.is_number or right.is_number:
        return right if left.is_number else left
    if left.labels != right.labels:
        raise Wrong(f"the two sides never match: {sorted(left.labels)} and {sorted(right.labels)}")
    return left


def _value(expr: Any) -> Result:
    given = _result(expr)
    if given.rises:
        raise Wrong("a counter is taken by its value, not by its rise")
    return given


def labels_in(template: str) -> set[str]:
    """The labels that a template of a rule or a legend puts in."""
    return set(re.findall(r"\{\{ *(?:\$labels\.)?(\w+) *\}\}", template))
