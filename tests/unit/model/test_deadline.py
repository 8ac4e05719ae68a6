"""Deadlines: `done_by` at clock changes and with calendars, `done_within`, and what can never be."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.clock import utc
from worker.errors import DefinitionError
from worker.model.definitions.deadline import beyond_period, deadline, read_time
from worker.model.definitions.definition import Definition, from_spec, parse_definition, to_spec
from worker.model.definitions.triggers import parse_schedule
from worker.model.definitions.zones import parse_zone
from worker.model.runs.fire import decide
from worker.model.runs.run import Declared, DueDefinition

HOUR = timedelta(hours=1)
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Chatham", "Asia/Tokyo")


def defined(**keys: Any) -> Definition:
    entry = {"org": "acme", "name": "digest", "handler": "acme.note", "schedule": "0 3 * * *"}
    return parse_definition(entry | keys, "definition acme/digest")


def until(scheduled_for: str, zone: str = "UTC", *, closed: Sequence[date] = (), **keys: str) -> datetime:
    by, within = keys.get("done_by"), keys.get("done_within")
    made = deadline(
        None if by is None else read_time(by),
        None if within is None else HOUR * int(within.rstrip("h")),
        parse_zone(zone),
        tuple(closed),
    )
    assert made is not None
    return made.of(utc(scheduled_for))


@pytest.mark.parametrize(
    ("scheduled_for", "zone", "expected"),
    [
        ("2027-01-04T03:00", "UTC", "2027-01-04T06:00"),
        ("2027-01-04T05:59:59", "UTC", "2027-01-04T06:00"),
        # The next one: what is due at that time has a day.
        ("2027-01-04T06:00", "UTC", "2027-01-05T06:00"),
        ("2027-01-04T22:00", "UTC", "2027-01-05T06:00"),
        ("2027-01-04T03:00", "Europe/Berlin", "2027-01-04T05:00"),
        ("2027-07-04T03:00", "Europe/Berlin", "2027-07-04T04:00"),
        # 22:00 of the day before there.
        ("2027-01-04T03:00", "America/New_York", "2027-01-04T11:00"),
    ],
)
def test_done_by_is_the_next_such_time_of_day_in_the_zone(
    scheduled_for: str, zone: str, expected: str
) -> None:
    assert until(scheduled_for, zone, done_by="06:00") == utc(expected)


@pytest.mark.parametrize(
    ("scheduled_for", "expected"),
    [
        # 02:30 does not exist on 28 March: it comes when the clocks have skipped it.
        ("2027-03-27T23:00", "2027-03-28T01:00"),
        ("2027-03-28T01:00", "2027-03-29T00:30"),
        # It exists twice on 31 October: the first counts, also for what is due in between.
        ("2027-10-30T23:00", "2027-10-31T00:30"),
        ("2027-10-31T00:45", "2027-11-01T01:30"),
        ("2027-10-31T01:15", "2027-11-01T01:30"),
    ],
)
def test_done_by_at_clock_changes(scheduled_for: str, expected: str) -> None:
    assert until(scheduled_for, "Europe/Berlin", done_by="02:30") == utc(expected)


def test_done_by_does_not_come_on_the_dates_of_the_calendar() -> None:
    holidays = (date(2026, 12, 25), date(2026, 12, 26))
    assert until("2026-12-24T22:00", done_by="06:00", closed=holidays) == utc("2026-12-27T06:00")
    assert until("2026-12-24T03:00", done_by="06:00", closed=holidays) == utc("2026-12-24T06:00")
    # The dates are those of the zone: 24 December, 23:00 UTC is Christmas Day in Tokyo.
    assert until("2026-12-24T12:00", "Asia/Tokyo", done_by="08:00", closed=holidays) == utc(
        "2026-12-26T23:00"
    )


def test_the_earlier_of_both_counts() -> None:
    assert until("2027-01-04T03:00", done_by="06:00", done_within="2h") == utc("2027-01-04T05:00")
    assert until("2027-01-04T03:00", done_by="04:00", done_within="2h") == utc("2027-01-04T04:00")
    assert until("2027-01-04T03:00", done_within="30h") == utc("2027-01-05T09:00")


@given(
    zone=st.sampled_from(ZONES),
    hour=st.integers(0, 23),
    minute=st.integers(0, 59),
    start=st.datetimes(datetime(2026, 1, 1), datetime(2028, 1, 1)),
    later=st.timedeltas(timedelta(0), timedelta(days=3)),
)
def test_each_day_has_one_deadline_and_a_later_time_never_an_earlier_one(
    zone: str, hour: int, minute: int, start: datetime, later: timedelta
) -> None:
    """That lets one row stand for all scheduled times with one deadline, and a later success end them all."""
    made = deadline(read_time(f"{hour:02}:{minute:02}"), None, parse_zone(zone))
    assert made is not None
    first = utc(start.isoformat())

    found, following = made.of(first), made.of(first + later)

    assert first < found <= first + timedelta(hours=25)
    assert found <= following
    assert timedelta(hours=23) <= made.of(found) - found <= timedelta(hours=25)


def test_the_last_time_of_each_deadline_stands_for_those_before() -> None:
    made = deadline(read_time("06:00"), None, parse_zone("UTC"))
    assert made is not None
    times = [utc(f"2027-01-04T{hour:02}:00") for hour in range(24)]

    assert made.of_each(reversed(times)) == [
        (utc("2027-01-04T05:00"), utc("2027-01-04T06:00")),
        (utc("2027-01-04T23:00"), utc("2027-01-05T06:00")),
    ]


@pytest.mark.parametrize("text", ["6:00", "24:00", "06:60", "06:00:00", "6am", "", 600, None, ["06:00"]])
def test_what_is_no_time_of_day_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match=r'is not a time of day; write it as text, such as "06:00"'):
        read_time(text)


def test_keys_come_back_from_a_spec_as_they_were() -> None:
    made = defined(done_by="06:30", done_within="90m", timezone="Europe/Berlin")
    spec = to_spec(made)

    assert (spec["done_by"], spec["done_within"]) == ("06:30", "1h30m")
    assert from_spec("acme", "digest", spec) == made
    assert made.has_deadline
    assert not defined().has_deadline
    assert defined().deadline() is None
    in_tokyo = defined(done_by="06:00").deadline("Asia/Tokyo")
    assert in_tokyo is not None
    assert in_tokyo.of(utc("2027-01-04T03:00")) == utc("2027-01-04T21:00")


@pytest.mark.parametrize(
    ("keys", "is_refused"),
    [
        ({"schedule": "0 6 * * *"}, True),
        ({"schedule": "0 6 * * 1-5", "timezone": "Europe/Berlin"}, True),
        ({"schedule": "0 6 1 * *"}, True),
        ({"schedule": "0 5 * * *"}, False),
        ({"schedule": "0 * * * *"}, False),
        ({"schedule": "30 6 * * *"}, False),
        ({"schedule": "@daily", "done_by": "00:00"}, True),
        # 06:00 UTC is another time of day in most zones; which one is the org's is not known here.
        ({"schedule": "at 2027-01-04T06:00:00Z"}, False),
        ({"schedule": "at 2027-01-04T06:00:00Z", "timezone": "UTC"}, True),
        ({"schedule": "at 2027-01-04T06:00:00Z", "timezone": "Europe/Berlin"}, False),
    ],
)
def test_done_by_at_the_time_of_the_schedule_is_refused(keys: dict[str, str], is_refused: bool) -> None:
    given = {"done_by": "06:00"} | keys
    if not is_refused:
        assert defined(**given).done_by is not None
        return
    with pytest.raises(DefinitionError, match="is the time of the schedule itself") as refused:
        defined(**given)
    assert refused.value.field == "done_by"
    assert str(refused.value).startswith("definition acme/digest, done_by: ")
    assert "done_within" in refused.value.fix


@pytest.mark.parametrize(("hours", "is_beyond"), [(24, False), (25, True), (72, False), (73, True)])
def test_done_within_beyond_the_longest_period_is_warned_of(hours: int, is_beyond: bool) -> None:
    zone, now = parse_zone("UTC"), utc("2027-01-04T00:00")
    trigger = parse_schedule("0 3 * * *" if hours < 48 else "0 3 * * 1-5", zone)

    assert bool(beyond_period(hours * HOUR, trigger, now)) is is_beyond
    assert beyond_period(hours * HOUR, parse_schedule("at 2027-01-05T06:00:00Z", zone), now) == ""


def due(first: str, **spec: Any) -> DueDefinition:
    keys = {"handler": "acme.note", "schedule": "0 3 * * *"} | spec
    ids: Any = ("definition", "org", "acme", None, "digest", 1)
    return DueDefinition(*ids, utc(first), keys)


def deadlines_of(definition: DueDefinition, now: str) -> list[tuple[datetime, datetime]]:
    decision = decide(definition, utc(now), lambda handler: Declared())
    return [(each.scheduled_for, each.deadline_at) for each in decision.deadlines]


def test_firing_decides_the_deadlines_with_the_runs() -> None:
    assert deadlines_of(due("2027-01-04T03:00"), "2027-01-04T03:00:01") == []
    assert deadlines_of(due("2027-01-04T03:00", done_by="06:00"), "2027-01-04T03:00:01") == [
        (utc("2027-01-04T03:00"), utc("2027-01-04T06:00"))
    ]
    # It counts from the scheduled time, not from the spread.
    spread = due("2027-01-04T03:00", done_within="2h", spread="30m")
    assert deadlines_of(spread, "2027-01-04T03:31") == [(utc("2027-01-04T03:00"), utc("2027-01-04T05:00"))]


def test_what_a_worker_that_was_down_missed_has_deadlines_and_a_holiday_has_none() -> None:
    """Of each day's range the first and the last; the newest of all runs."""
    hourly = due("2027-01-04T20:00", schedule="0 * * * *", done_within="1h")
    assert deadlines_of(hourly, "2027-01-05T03:30") == [
        (utc(f"2027-01-0{day}T{hour:02}:00"), utc(f"2027-01-0{day}T{hour:02}:00") + HOUR)
        for day, hour in ((4, 20), (4, 23), (5, 0), (5, 2), (5, 3))
    ]
    skipping = due("2027-01-04T03:00", misfire="skip", done_by="06:00")
    assert deadlines_of(skipping, "2027-01-05T12:00") == [
        (utc(f"2027-01-0{day}T03:00"), utc(f"2027-01-0{day}T06:00")) for day in (4, 5)
    ]
    closed = due("2027-01-04T03:00", calendar="holidays", calendar_dates=["2027-01-04"], done_by="06:00")
    assert deadlines_of(closed, "2027-01-04T12:00") == []
