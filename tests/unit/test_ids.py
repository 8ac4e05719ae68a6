"""Ids sort by age, and those of scheduled runs by the time at which they were due."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.ids import GivenId, given_id, new_id, new_id_at, short_id, short_ids

MINUTE = timedelta(minutes=1)
RUN = "01a22a45-2bd0-7000-8000-00a3f1d2c8fb"
# With the same time and the same last digits.
ALIKE = "01a22a45-2bd0-7000-8000-00a3f1d3c8fb"


def time_of(id_: str) -> float:
    return (UUID(id_).int >> 80) / 1000


def test_new_ids_increase():
    made = [new_id() for _ in range(1000)]

    assert made == sorted(made)
    assert len(set(made)) == len(made)


def test_an_id_has_the_time_at_which_its_run_was_due():
    due_at = datetime.now(UTC) - MINUTE

    made = UUID(new_id_at(due_at))

    assert (made.version, made.variant) == (7, "specified in RFC 4122")
    assert abs(time_of(str(made)) - due_at.timestamp()) < 0.002


def test_ids_of_one_due_time_increase_and_come_before_later_ones():
    due_at = datetime.now(UTC) - MINUTE
    first, second, later = new_id_at(due_at), new_id_at(due_at), new_id_at(due_at + timedelta(seconds=1))

    assert first[:19] < second[:19] or first != second
    assert max(first, second) < later < new_id()


def test_a_run_that_is_late_by_hours_or_due_in_the_future_gets_the_time_of_its_making():
    now = datetime.now(UTC)
    for due_at in (now - timedelta(hours=1), now + timedelta(hours=1), datetime(2030, 1, 1, tzinfo=UTC)):
        assert abs(time_of(new_id_at(due_at)) - now.timestamp()) < 5


def test_a_short_id_is_the_time_and_the_tail():
    assert short_id(RUN) == "01a22a45-2bd0…c8fb"
    assert short_ids([RUN]) == {RUN: "01a22a45-2bd0…c8fb"}
    assert short_ids([]) == {}


def test_ids_that_would_look_the_same_have_a_longer_tail():
    other = "01a22a45-2bd0-7000-8000-00a3f1d20000"

    assert short_ids([RUN, ALIKE, other, RUN]) == {
        RUN: "01a22a45-2bd0…2c8fb",
        ALIKE: "01a22a45-2bd0…3c8fb",
        other: "01a22a45-2bd0…0000",
    }
    # With the same digits but one in the middle, the tail has dashes; at last it is the whole id.
    assert short_ids([RUN, RUN.replace("8000", "9000")])[RUN] == "01a22a45-2bd0…8000-00a3f1d2c8fb"
    assert short_ids([RUN, RUN.replace("7000", "6000")])[RUN] == RUN


ids = st.builds(
    lambda time, middle, tail: f"01a22a45-2bd{time}-7000-8{middle}-00a3f1d{tail}",
    *(st.sampled_from("01"), st.sampled_from(("000", "001")), st.sampled_from(("2c8fb", "3c8fb", "2c8fc"))),
)


@given(st.lists(ids, max_size=12))
def test_short_ids_differ_and_each_fits_its_id_only(found: list[str]):
    short = short_ids(found)

    assert len(set(short.values())) == len(set(found))
    for id_, text in short.items():
        assert [one for one in set(found) if fits(text, one)] == [id_]


def fits(text: str, id_: str) -> bool:
    known = given_id(text)
    assert known is not None
    return known.first <= id_ <= known.last and id_.endswith(known.tail)


@pytest.mark.parametrize(
    "text",
    [
        *(RUN, RUN.upper(), RUN.replace("-", ""), RUN[:8], RUN[:18], "01A22A452BD07", "01a22a45-"),
        *("01a22a45-2bd0…c8fb", "01a22a45-2bd0..c8fb", "01a22a45-2bd0...C8FB", "01a22a452bd0…fb"),
        *("01a22a45…c8fb", "01a22a45-2bd0…8000-00a3f1d2c8fb", "01a22a45-2bd0…800000a3f1d2c8fb"),
    ],
)
def test_what_people_give_of_an_id_fits_it(text: str):
    known = given_id(text)

    assert known is not None
    assert fits(text, RUN)
    assert not fits(text, "01a22a46-0000-7000-8000-00a3f1d20000")
    assert known.is_whole is (len(text) in (32, 36))
    assert re.fullmatch("[0-9a-f-]*", known.tail)


def test_the_beginning_of_an_id_is_a_range_of_ids():
    first, last = "0192aaaa-0000-0000-0000-000000000000", "0192aaaa-ffff-ffff-ffff-ffffffffffff"

    assert given_id("0192AAAA") == GivenId(first, last)
    assert given_id("0192aaaa..F0") == GivenId(first, last, "f0")
    assert given_id(RUN) == given_id(RUN.replace("-", "")) == GivenId(RUN, RUN)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "acme",
            "0192aaa",
            "0192-aaaa",
            "deadbeefs",
            RUN + "0",
            "0192aaaa…",
            "0192aaaa…b",
            "0192aaa…c8fb",
        ),
        *("0192aaaa.c8fb", "0192aaaa....c8fb", "0192aaaa…c8…fb", "0192aaaa…--", "0192aaaa…xyz", "…c8fb"),
        *("0192aaaa…" + 33 * "0", "0192aaaa…c8fb ", "0192aaaa%c8fb"),
    ],
)
def test_other_texts_are_no_ids(text: str):
    assert given_id(text) is None
