"""The alert rules and the Grafana board name metrics and labels that the worker has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.telemetry.metric_table import METRICS

CONFIG = Path(__file__).parents[2] / "config"
SERIES = {
    metric.name + suffix: metric
    for metric in METRICS
    for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
}
# Words of PromQL, and labels that Prometheus adds.
FUNCTIONS = {"absent", "count", "histogram_quantile", "increase", "max", "rate", "sum", "topk"}
WORDS = {"by", "and", "or", "unless"}
ADDED = {"instance", "job", "le"}


def rules() -> Iterator[dict[str, str]]:
    """The rules of alerts.yml: scalars of one line each."""
    for block in re.split(r"(?m)^      - ", (CONFIG / "alerts.yml").read_text())[1:]:
        yield {
            name: value.strip("'").replace("''", "'")
            for name, value in re.findall(r"(?m)^ *(\w+): (.+)$", block)
        }


def panels() -> list[dict]:
    return json.loads((CONFIG / "grafana.json").read_text())["panels"]


def expressions() -> list[str]:
    return [rule["expr"] for rule in rules()] + [
        target["expr"] for panel in panels() for target in panel["targets"]
    ]


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_names_only_what_the_documented_table_has(expression: str):
    bare = re.sub(r"\[[0-9]+[smhd]\]", "", expression)
    selectors = re.findall(r"\{([^}]*)\}", bare)
    groupings = re.findall(r"by \(([^)]*)\)", bare)
    bare = re.sub(r"\{[^}]*\}|by \([^)]*\)", "", bare)
    names = set(re.findall(r"[a-zA-Z_:][\w:]*", bare)) - FUNCTIONS - WORDS

    assert names
    assert names <= set(SERIES)
    labels = {label for name in names for label in SERIES[name].labels} | ADDED
    used = {re.split("[=!~]", part)[0].strip() for text in selectors for part in text.split(",")}
    used |= {label.strip() for text in groupings for label in text.split(",")}
    assert used <= labels
    assert bare.count("(") == bare.count(")")


def test_a_counter_is_looked_at_by_its_rise_and_a_gauge_by_its_value():
    for expression in expressions():
        for function, name in re.findall(r"(\w+)\((\w+)(?:\{[^}]*\})?\[", expression):
            assert (function, SERIES[name].kind != "gauge") in {("rate", True), ("increase", True)}
        for name in re.findall(r"\w+(?=[^\w\[{(]|$)", re.sub(r"\w+(\{[^}]*\})?\[\w+\]", "", expression)):
            assert name not in SERIES or SERIES[name].kind == "gauge", expression


def test_every_rule_says_how_bad_it_is_what_it_is_and_what_to_do():
    found = list(rules())

    assert len({rule["alert"] for rule in found}) == len(found) >= 15
    for rule in found:
        assert rule["severity"] in ("warning", "critical")
        assert re.fullmatch(r"\d+m", rule["for"])
        assert rule["summary"].endswith(".")
        assert rule["description"]


def test_a_rules_words_name_only_labels_that_its_series_has():
    for rule in rules():
        used = set(re.findall(r"\$labels\.(\w+)", rule["summary"] + rule["description"]))
        grouped = re.search(r"^(?:max|sum) by \(([^)]*)\)", rule["expr"])
        names = [name for name in re.findall(r"orgworker_\w+", rule["expr"]) if name in SERIES]
        has = {"instance"} | {label for name in names for label in SERIES[name].labels}
        assert used <= ({part.strip() for part in grouped[1].split(",")} if grouped else has), rule["alert"]


def test_the_boards_panels_lie_beside_each_other():
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels()]

    assert len(set(places)) == len(places)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels())
