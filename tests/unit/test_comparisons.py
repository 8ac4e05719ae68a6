"""docs/comparisons.md answers the same questions for each product, with sources."""

from __future__ import annotations

import re

import pytest

from tests.fakes.pages import ROOT, anchors

PAGE = (ROOT / "docs" / "comparisons.md").read_text(encoding="utf-8")
SECTIONS = dict(
    re.findall(r"(?ms)^## ((?!orgworker)[^\n]+)\n(.*?)(?=^## |\Z)", PAGE),
)
PRODUCTS = (
    "Celery beat",
    "RedBeat",
    "APScheduler",
    "Temporal",
    "Airflow",
    "Kubernetes CronJob",
    "EventBridge Scheduler",
    "Oban",
    "River",
    "trigger.dev",
    "Hatchet",
)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_has_a_row_and_a_section(product: str):
    [row] = [line for line in PAGE.splitlines() if re.match(rf"\| \[{re.escape(product)}\]\(", line)]
    anchor = re.search(r"\(#([\w-]+)\)", row)

    assert anchor is not None and anchor[1] in anchors(PAGE)
    assert sum(product in title for title in SECTIONS) == 1


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_answers_every_question_from_sources(title: str):
    section = SECTIONS[title]
    asked = " ".join(re.findall(r"(?m)^\| ([^|]+) \|", section))
    text, _, _ = section.partition("\n[")

    for question in (
        "schedules",
        "missed",
        "clock changes",
        "long runs",
        "why did it not run",
        "cost to operate",
    ):
        assert question in asked, f"{title} does not say: {question}"
    assert "**Better if**" in section
    used = set(re.findall(r"\[(\d+)\](?!:)", text))
    assert len(used) >= 2
    assert used <= set(re.findall(r"(?m)^\[(\d+)\]: https://", section))


def test_every_source_is_used():
    defined = re.findall(r"(?m)^\[(\d+)\]: ", PAGE)

    assert len(set(defined)) == len(defined)
    assert set(defined) == set(re.findall(r"\[(\d+)\](?!:)", PAGE))


def test_it_says_when_it_was_read():
    assert re.search(r"read on \d+ \w+ 20\d\d", PAGE)
