"""Charts: well-formed SVG with a text alternative, nothing inline, and every value escaped."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from worker.features.console.charts import (
    ChartSeries,
    Dot,
    Lane,
    LanePiece,
    bars,
    gantt,
    lengths,
    percentile,
    short,
)

START = datetime(2030, 1, 1, tzinfo=UTC)
EVIL = '"><script>alert(1)</script>'


def tree(chart: Markup) -> ElementTree.Element:
    return ElementTree.fromstring(str(chart))


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def hourly(title: str = "Ended by hour") -> Markup:
    return bars(
        [ChartSeries("succeeded", "succeeded", [3, 0, 5]), ChartSeries("failed", "failed", [1, 0, 0])],
        ["00:00", "01:00", "02:00"],
        title=title,
        ticks=["0h", "", "2h"],
        links=["/a", "/b", "/c"],
    )


def test_bars_stack_to_the_scale_and_say_what_they_show():
    chart = tree(hourly())
    svg = chart.find("div/svg")
    assert svg is not None

    assert svg.get("role") == "img"
    assert svg.find("desc").text == "9 in all; most at 02:00: 5; 8 succeeded, 1 failed"  # type: ignore[union-attr]
    blocks = {rect.find("title").text: rect for rect in svg.iter("rect")}  # type: ignore[union-attr]
    assert set(blocks) == {"00:00: 3 succeeded", "00:00: 1 failed", "02:00: 5 succeeded"}
    full, part = (
        float(blocks[name].get("height", "")) for name in ("02:00: 5 succeeded", "00:00: 3 succeeded")
    )
    assert part / full == pytest.approx(3 / 5, abs=0.01)
    bottom = float(blocks["00:00: 1 failed"].get("y", "")) + float(
        blocks["00:00: 1 failed"].get("height", "")
    )
    assert bottom == pytest.approx(float(blocks["00:00: 3 succeeded"].get("y", "")), abs=0.2)


def test_the_data_is_also_a_table_with_links_and_without_empty_rows():
    rows = [["".join(cell.itertext()) for cell in row] for row in tree(hourly()).iter("tr")]

    assert rows == [["", "succeeded", "failed"], ["00:00", "3", "1"], ["02:00", "5", "0"]]
    links = [(link.get("href"), link.get("tabindex")) for link in tree(hourly()).iter("a")]
    # Over the bars for pointers, in the table for keyboards too.
    assert links == [("/a", "-1"), ("/c", "-1"), ("/a", None), ("/c", None)]


def test_trouble_is_hatched_as_well_as_coloured_and_two_charts_share_no_id():
    one, other = str(hourly("one")), str(hourly("other"))

    ids = [re.findall(r' id="([^"]+)"', text) for text in (one, other)]
    assert all(
        len(found) == 1 and f"url(#{found[0]})" in text for found, text in zip(ids, (one, other), strict=True)
    )
    assert ids[0] != ids[1]


def test_a_gantt_has_one_lane_an_attempt_on_one_time_line():
    lanes = [
        Lane(
            "Attempt 1",
            [
                LanePiece("waiting", "waiting", START, after(50)),
                LanePiece("running", "running", after(50), after(75)),
            ],
        ),
        Lane("Attempt 2", [LanePiece("running", "running", after(75), after(100))], "failed"),
    ]
    chart = gantt(lanes, title="Attempts", now=after(100))

    places = {
        rect.find("title").text: (rect.get("x"), rect.get("width"), rect.get("y"))  # type: ignore[union-attr]
        for rect in tree(chart).iter("rect")
        if rect.find("title") is not None and rect.get("class") != "over"
    }
    assert places["Attempt 1: waiting 50s"] == ("0.00%", "50.00%", "19")
    assert places["Attempt 1: running 25s"] == ("50.00%", "25.00%", "19")
    assert places["Attempt 2: running 25s"] == ("75.00%", "25.00%", "59")
    assert "waiting 50s, running 50s" in str(chart)


def test_a_short_piece_after_a_long_wait_is_still_seen_and_within_the_chart():
    lanes = [
        Lane(
            "Attempt 1",
            [
                LanePiece("waiting", "waiting", START, after(86_400)),
                LanePiece("running", "running", after(86_400), after(86_401)),
            ],
        )
    ]

    last = list(tree(gantt(lanes, title="t", now=START)).iter("rect"))
    left, width = (float(str(last[2].get(name)).rstrip("%")) for name in ("x", "width"))
    assert width >= 0.5
    assert left + width <= 100.01


def test_run_lengths_have_lines_at_the_median_and_the_95th_percentile():
    dots = [Dot(f"run {n}", float(n), "succeeded", f"/runs/{n}") for n in range(1, 101)]
    chart = lengths([*dots, Dot("run x", 30, "failed", "/runs/x")], title="Run lengths")

    assert "median 50s, 95 % within 1m 35s, longest 1m 40s" in str(chart)
    shapes = [node.tag for node in tree(chart).iter() if (node.get("class") or "").startswith("c-")]
    assert shapes.count("circle") == 100
    assert [link.get("href") for link in tree(chart).iter("a")][:2] == ["/runs/x", "/runs/100"]


@pytest.mark.parametrize(
    "chart",
    [
        bars([ChartSeries(EVIL, "failed", [1])], [EVIL], title=EVIL, ticks=[EVIL], links=[EVIL]),
        gantt([Lane(EVIL, [LanePiece(EVIL, "failed", START, after(1))], EVIL)], title=EVIL, now=START),
        lengths([Dot(EVIL, 1, "failed", EVIL)], title=EVIL),
    ],
)
def test_hostile_texts_stay_texts_and_nothing_is_inline(chart: Markup):
    root = tree(chart)

    assert all(node.tag != "script" for node in root.iter())
    assert not [
        name for node in root.iter() for name in node.attrib if name == "style" or name.startswith("on")
    ]


def test_a_kind_is_a_class_name_only():
    with pytest.raises(ValueError, match="not a kind"):
        bars([ChartSeries("x", 'failed" onload="x', [1])], ["a"], title="t")


@pytest.mark.parametrize(
    "chart",
    [
        bars([], [], title="Nothing"),
        bars([ChartSeries("failed", "failed", [0, 0])], ["a", "b"], title="Nothing"),
        gantt([], title="Nothing", now=START),
        lengths([], title="Nothing"),
    ],
)
def test_no_data_is_an_empty_chart_without_a_table(chart: Markup):
    assert tree(chart).find("details") is None


def test_percentiles_are_values_of_the_list():
    assert [percentile([1, 2, 3, 4], share) for share in (0.25, 0.5, 0.95, 1)] == [1, 2, 4, 4]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.04, "40ms"),
        (1.25, "1.2s"),
        (60, "1m"),
        (59.99, "1m"),
        (270, "4m 30s"),
        (7500, "2h 5m"),
        (273_600, "3d 4h"),
        (3600, "1h"),
    ],
)
def test_durations_for_people(seconds: float, text: str):
    assert short(timedelta(seconds=seconds)) == text
