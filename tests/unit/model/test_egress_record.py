"""The record of what a run sent: rows of one origin add up, and what they say has limits."""

from __future__ import annotations

import math

from worker.model.runs.egress import (
    MAX_ORIGIN,
    MAX_ORIGINS,
    MAX_STATUSES,
    MAX_TOTAL,
    MAX_WAITED,
    OTHERS,
    EgressRow,
    busiest,
    merge,
    waited_for,
)

API = "https://api.example.com"
CRM = "https://crm.example.com"


def test_rows_of_an_origin_add_up_in_the_order_of_origins():
    rows = [
        EgressRow(CRM, 1, 10, 20, {"200": 1}),
        EgressRow(API, 2, 5, 6, {"200": 1, "500": 1}, denied=1, waited_seconds=0.1),
        EgressRow(API, 3, 1, 1, {"200": 2}, denied=2, waited_seconds=0.2),
    ]

    assert merge(rows) == (
        EgressRow(CRM, 1, 10, 20, {"200": 1}),
        EgressRow(API, 5, 6, 7, {"200": 3, "500": 1}, denied=3, waited_seconds=0.3),
    )


def test_origins_beyond_the_first_hundred_are_one_row():
    rows = [EgressRow(f"https://{n}.example.com", 1, statuses={"200": 1}) for n in range(MAX_ORIGINS + 20)]

    merged = merge([*rows, rows[0], *rows])

    assert [row.origin for row in merged[:2]] == ["https://0.example.com", "https://1.example.com"]
    assert len(merged) == MAX_ORIGINS + 1
    assert merged[0].requests == 3
    assert merged[-1] == EgressRow(OTHERS, 40, statuses={"200": 40})
    assert merge(merged) == merged


def test_the_origins_with_the_most_requests_are_named_and_the_rest_is_one_row():
    rows = [EgressRow(f"https://{n}", n, denied=n == 1) for n in (1, 5, 3, 2)]

    assert busiest(rows, 4) == rows
    assert busiest(rows, 2) == (
        EgressRow("https://5", 5),
        EgressRow("https://3", 3),
        EgressRow(OTHERS, 3, denied=1),
    )


def test_a_sentence_names_the_longest_waits():
    waits = [
        ("https://a", 0.0),
        ("https://b", 12.0),
        ("https://c", 1.54),
        ("https://d", 90),
        ("https://e", 1),
    ]
    rows = [{"origin": origin, "waited_seconds": seconds} for origin, seconds in waits]

    assert waited_for(rows[:2]) == "waited 12 s for https://b"
    assert waited_for(rows) == (
        "waited 1 min 30 s for https://d, 12 s for https://b, 1.5 s for https://c, and for 1 more"
    )
    assert waited_for(rows[:1]) is None


def test_what_is_no_printable_origin_of_limited_length_is_merged():
    longest = "https://" + "a" * (MAX_ORIGIN - 8)
    bad = ["", longest + "a", "https://a\n.example.com", "https://\x00", "https://\ud800"]

    merged = merge(EgressRow(origin, 1) for origin in (*bad, longest))

    assert merged == (EgressRow(longest, 1), EgressRow(OTHERS, len(bad)))


def test_numbers_stay_within_their_limits():
    hostile = EgressRow(API, 2**70, -5, 2**64, {"200": 2**80, "404": -3}, -1, math.inf)

    (row,) = merge([hostile, hostile, EgressRow(API, waited_seconds=math.nan)])

    assert row == EgressRow(API, MAX_TOTAL, 0, MAX_TOTAL, {"200": MAX_TOTAL, "404": 0}, 0, MAX_WAITED)


def test_statuses_are_a_few_of_http():
    many = {str(status): 1 for status in range(200, 200 + MAX_STATUSES + 5)}

    (row,) = merge([EgressRow(API, 40, statuses={"<script>": 2, "999": 1, "²00": 1, **many})])

    assert len(row.statuses) == MAX_STATUSES
    assert row.statuses[OTHERS] == 4 + 6
    assert row.statuses["200"] == 1


def test_requests_by_class_of_status_name_those_without_a_response():
    row = EgressRow(API, 10, statuses={"200": 4, "204": 1, "503": 2, OTHERS: 1})

    assert row.by_class() == {"2xx": 5, "5xx": 2, OTHERS: 1, "none": 2}
