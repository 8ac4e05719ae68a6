"""Calendars: what an entry or an iCalendar file may have, and which scheduled times are on their dates."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from itertools import islice, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.clock import utc
from worker.errors import DefinitionError
from worker.model.definitions.calendars import MAX_DATES, InvalidCalendar, all_day_dates, parse_calendar
from worker.model.definitions.definition import from_spec, parse_definition, to_spec
from worker.model.definitions.triggers import Trigger, parse_schedule, without_dates
from worker.model.definitions.zones import parse_zone

TICK = timedelta(microseconds=1)
CHRISTMAS = (date(2026, 12, 25), date(2026, 12, 26))


def open_trigger(schedule: str, zone: str, *dates: str, **bounds: datetime) -> Trigger:
    found = tuple(map(date.fromisoformat, dates))
    return without_dates(parse_schedule(schedule, parse_zone(zone), **bounds), found, parse_zone(zone))


def test_dates_are_texts_or_dates_of_toml_sorted_and_each_once():
    values = {"name": "holidays", "dates": ["2026-12-26", date(2026, 12, 25), "2026-12-26"]}

    calendar = parse_calendar(values, "calendar holidays")

    assert (calendar.name, calendar.dates) == ("holidays", CHRISTMAS)


@pytest.mark.parametrize(
    ("keys", "field", "problem"),
    [
        ({}, "dates", "one of dates and ics"),
        ({"dates": ["2026-12-25"], "ics": "a.ics"}, "dates", "one of dates and ics"),
        ({"dates": "2026-12-25"}, "dates", "as a list"),
        ({"dates": ["2026-02-30"]}, "dates", "2026-02-30: there is no such date"),
        ({"dates": ["25.12.2026"]}, "dates", "a date such as 2026-12-25"),
        ({"dates": ["20261225"]}, "dates", "a date such as 2026-12-25"),
        ({"dates": [datetime(2026, 12, 25, 8)]}, "dates", "a date such as 2026-12-25"),
        ({"dates": [20261225]}, "dates", "a date such as 2026-12-25"),
        ({"dates": ["0001-01-01"]}, "dates", "not between 1970 and 2199"),
        ({"dates": ["9999-12-31"]}, "dates", "not between 1970 and 2199"),
        (
            {"dates": [date(2000, 1, 1) + timedelta(day) for day in range(MAX_DATES + 1)]},
            "dates",
            "2001 dates",
        ),
        ({"ics": "absent.ics"}, "ics", "absent.ics cannot be read"),
        ({"dates": [], "zone": "UTC"}, "zone", "unknown key"),
    ],
)
def test_an_invalid_entry_names_entry_and_field(keys: dict[str, Any], field: str, problem: str):
    with pytest.raises(DefinitionError, match=problem) as caught:
        parse_calendar({"name": "holidays"} | keys, "calendar holidays")

    assert (caught.value.entry, caught.value.field) == ("calendar holidays", field)
    assert str(caught.value).startswith(f"calendar holidays, {field}: ")


def test_a_revision_has_the_dates_of_its_calendar_and_a_file_has_not():
    spec = {
        "handler": "acme.digest",
        "schedule": "0 3 * * *",
        "calendar": "holidays",
        "calendar_dates": ["2026-12-25", "2026-12-26"],
    }

    definition = from_spec("org_acme", "digest", spec)

    assert definition.calendar_dates == CHRISTMAS
    assert to_spec(definition) == spec
    with pytest.raises(DefinitionError, match="unknown key 'calendar_dates'"):
        parse_definition({"org": "org_acme", "name": "digest"} | spec, "definition 1")


def test_the_dates_are_those_of_the_definitions_zone():
    """Midnight of Berlin's Christmas is 23:00 UTC of the day before."""
    berlin = open_trigger("every 1h", "Europe/Berlin", "2026-12-25")

    assert berlin.after(utc("2026-12-24T21:30")) == utc("2026-12-24T22:00")
    assert berlin.after(utc("2026-12-24T22:00")) == utc("2026-12-25T23:00")


@pytest.mark.parametrize(
    ("zone", "dates", "first", "hours"),
    [
        ("Europe/Berlin", ["2026-03-29"], "2026-03-28T23:00", 23),
        ("Europe/Berlin", ["2026-10-25"], "2026-10-24T22:00", 25),
        ("Europe/Berlin", ["2026-12-25", "2026-12-26"], "2026-12-24T23:00", 48),
        # Clocks went back at 00:01, so that a minute of 7 November was before the last hour of the 6th.
        ("America/St_Johns", ["2010-11-07"], "2010-11-07T02:30", 24),
        # Samoa had no 30 December 2011.
        ("Pacific/Apia", ["2011-12-30"], "2011-12-30T10:00", 0),
        ("Pacific/Kiritimati", ["2027-01-01"], "2026-12-31T10:00", 24),
    ],
)
def test_as_many_hours_are_closed_as_the_dates_have(zone: str, dates: list[str], first: str, hours: int):
    trigger = open_trigger("every 1h", zone, *dates)
    day = timedelta(days=4)
    start, end = utc(first) - day, utc(first) + day

    closed = set(trigger.nominal.between(start, end)) - set(trigger.between(start, end))

    assert len(closed) == hours
    local = parse_zone(zone)
    assert {at.astimezone(local).date().isoformat() for at in closed} <= set(dates)
    assert len(closed) == trigger.nominal.count(start, end) - trigger.count(start, end)


def test_a_minute_that_is_out_of_order_is_closed_with_its_date():
    trigger = open_trigger("every 1m", "America/St_Johns", "2010-11-07")

    assert trigger.after(utc("2010-11-07T02:29")) == utc("2010-11-07T02:31")


ZONES = ["UTC", "Europe/Berlin", "America/St_Johns", "Pacific/Apia", "Australia/Lord_Howe", "Asia/Gaza"]
SCHEDULES = [
    "*/20 * * * *",
    "every 45m",
    "30 2 * * *",
    "0 0 * * 0",
    "0 0,23 * * *",
    "at 2011-12-31T10:00:00Z",
]
STARTS = [
    utc(text) for text in ("2010-11-05T21:17:03", "2011-12-28", "2026-03-27T13:00", "2026-10-23T04:59:59")
]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(ZONES),
    st.sampled_from(SCHEDULES),
    st.sampled_from(STARTS),
    st.lists(st.integers(-1, 8), max_size=5),
    st.integers(0, 6 * 24 * 3600),
    st.integers(1, 4),
)
def test_a_trigger_with_a_calendar_is_the_other_one_without_those_dates(
    zone: str, schedule: str, start: datetime, days: list[int], seconds: int, count: int
):
    """Compared with a walk over the scheduled times that looks at the local date of each."""
    dates = [(start + timedelta(days=day)).date().isoformat() for day in days]
    trigger = open_trigger(schedule, zone, *dates)
    end, local = start + timedelta(seconds=seconds), parse_zone(zone)
    walked = [
        at
        for at in trigger.nominal.between(start, end)
        if at.astimezone(local).date().isoformat() not in dates
    ]

    assert list(trigger.between(start, end)) == walked
    assert trigger.count(start, end) == len(walked)
    assert trigger.last(start, end) == (walked[-1] if walked else None)
    assert trigger.newest(start, end, count) == (walked[-count:][0] if walked else None)
    pieces = list(trigger.pieces(start, end))
    assert [piece.start for piece in pieces] == [start, *(piece.until + TICK for piece in pieces[:-1])]
    assert pieces[-1].until == end
    assert all(one.closed is not other.closed for one, other in pairwise(pieces))


def test_bounds_hold_and_a_schedule_may_end_on_a_closed_date():
    bounds = {"starts_at": utc("2026-12-25"), "ends_at": utc("2026-12-28")}
    trigger = open_trigger("0 3 * * *", "UTC", "2026-12-25", "2026-12-27", **bounds)

    assert list(islice(trigger.occurrences(utc("2026-01-01")), 9)) == [utc("2026-12-26T03:00")]
    assert trigger.period(utc("2026-12-26T03:00")) == timedelta(days=2)


def read(*lines: str, end: str = "\r\n", most: int = 400) -> list[str]:
    text = end.join(("BEGIN:VCALENDAR", "VERSION:2.0", *lines, "END:VCALENDAR", ""))
    return [day.isoformat() for day in sorted(all_day_dates(text.encode(), most=most))]


def event(*lines: str) -> tuple[str, ...]:
    return ("BEGIN:VEVENT", "UID:1@acme", "SUMMARY:Christmas", *lines, "END:VEVENT")


def test_an_event_without_an_end_is_one_day():
    assert read(*event("DTSTART;VALUE=DATE:20261225")) == ["2026-12-25"]


def test_the_end_is_exclusive_and_each_day_counts():
    days = read(*event("DTSTART;VALUE=DATE:20261230", "DTEND;VALUE=DATE:20270102"))

    assert days == ["2026-12-30", "2026-12-31", "2027-01-01"]


@pytest.mark.parametrize(("duration", "days"), [("P1D", 1), ("P3D", 3), ("P1W", 7), ("+P2D", 2)])
def test_a_duration_is_whole_days(duration: str, days: int):
    assert len(read(*event("DTSTART;VALUE=DATE:20261225", f"DURATION:{duration}"))) == days


def test_folded_lines_quoted_parameters_and_other_line_ends_are_read():
    lines = (
        'ATTENDEE;CN="a:b;DTSTART":mailto:a@acme.example',
        'DTSTART;X-NOTE="one: two; three";VALUE=DATE:2026',
        " 1225",
        "DESCRIPTION:a long",
        "\tone\\, with DTSTART:20200101 in it",
    )

    for end in ("\r\n", "\n"):
        assert read(*event(*lines), end=end) == ["2026-12-25"]


def test_a_byte_order_mark_and_names_in_any_case_are_read():
    text = "\ufeffbegin:vcalendar\nBegin:VEvent\ndtstart;value=date:20261225\nend:vevent\nEND:VCALENDAR\n"

    assert all_day_dates(text.encode(), most=1) == {date(2026, 12, 25)}


def test_other_components_and_what_is_nested_in_an_event_are_not_its_own():
    zone = (
        "BEGIN:VTIMEZONE",
        "BEGIN:STANDARD",
        "DTSTART:19701025T030000",
        "RRULE:FREQ=YEARLY",
        "END:STANDARD",
    )
    alarm = ("BEGIN:VALARM", "DTSTART:20200101T000000", "RRULE:FREQ=DAILY", "DURATION:PT5M", "END:VALARM")
    todo = ("BEGIN:VTODO", "DTSTART;VALUE=DATE:20200101", "RRULE:FREQ=DAILY", "END:VTODO")

    days = read(*zone, "END:VTIMEZONE", *event("DTSTART;VALUE=DATE:20261225", *alarm), *todo)

    assert days == ["2026-12-25"]


def test_a_cancelled_event_does_not_count():
    kept = event("DTSTART;VALUE=DATE:20261226")

    assert read(*event("DTSTART;VALUE=DATE:20261225", "STATUS:CANCELLED"), *kept) == ["2026-12-26"]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (
            event("DTSTART;VALUE=DATE:20261225", "RRULE:FREQ=YEARLY"),
            "line 7: event 'Christmas' recurs (RRULE)",
        ),
        (event("RDATE;VALUE=DATE:20261225", "DTSTART;VALUE=DATE:20261225"), "line 6: .* recurs (RDATE)"),
        (event("DTSTART;VALUE=DATE:20261225", "EXDATE;VALUE=DATE:20271225"), "recurs (EXDATE)"),
        (event("DTSTART;VALUE=DATE:20261225", "RECURRENCE-ID:20261225"), "recurs (RECURRENCE-ID)"),
        (event("RRULE:FREQ=YEARLY", "STATUS:CANCELLED", "DTSTART;VALUE=DATE:20261225"), "recurs (RRULE)"),
        (event("DTSTART:20261225T080000Z"), "line 6: event 'Christmas' has a time of day (DTSTART)"),
        (event("DTSTART;TZID=Europe/Berlin:20261225T000000"), "has a time of day (DTSTART)"),
        (event("DTSTART;VALUE=DATE:20261225", "DTEND:20261226T000000"), "has a time of day (DTEND)"),
        (event("DTSTART;VALUE=DATE:20261225", "DTEND;VALUE=DATE:20261225"), "the day after its last"),
        (event("DTSTART;VALUE=DATE:20261225", "DTEND;VALUE=DATE:20261224"), "the day after its last"),
        (event("DTSTART;VALUE=DATE:20261225", "DURATION:PT24H"), "a DURATION that is not whole days"),
        (event("DTSTART;VALUE=DATE:20260229"), "has a DTSTART that is not a date"),
        (event("DTSTART;VALUE=DATE:99991231"), "has a DTSTART after 9000"),
        (event("DTSTART;VALUE=DATE:20260101", "DTEND;VALUE=DATE:20280101"), "lasts for more than 400 days"),
        (event("DTSTART;VALUE=DATE:20261225", "DTSTART;VALUE=DATE:20261226"), "has DTSTART twice"),
        (event(), "line 3: event 'Christmas' has no DTSTART"),
        (("BEGIN:VEVENT", "UID:7@acme", "RRULE:FREQ=DAILY", "END:VEVENT"), "event '7@acme' recurs"),
        (("BEGIN:VEVENT", "END:VEVENT"), "event 'without a name' has no DTSTART"),
        ((), "there is no event in it"),
        (("BEGIN:VEVENT", "END:VTODO"), "line 4: END:VTODO ends nothing"),
        (("BEGIN:VEVENT", "no colon", "END:VEVENT"), "line 4: expected NAME:VALUE"),
    ],
)
def test_what_is_not_a_whole_day_is_refused_with_line_and_event(lines: tuple[str, ...], problem: str):
    with pytest.raises(InvalidCalendar, match=problem.replace("(", r"\(").replace(")", r"\)")):
        read(*lines)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "there is no event"),
        (b"<html>", "line 1: expected NAME:VALUE"),
        (b"NAME:value", "line 1: expected BEGIN:VCALENDAR"),
        (b"BEGIN:VEVENT\r\n", "line 1: expected BEGIN:VCALENDAR"),
        (b"BEGIN:VCALENDAR\r\nBEGIN:VEVENT\r\nDTSTART:20261225\r\n", "line 3: it ends within VEVENT"),
        (b"BEGIN:VCALENDAR\r\nSUMMARY:\xff\xfe", "line 2: it is not UTF-8"),
    ],
)
def test_what_is_no_calendar_is_refused(content: bytes, problem: str):
    with pytest.raises(InvalidCalendar, match=problem):
        all_day_dates(content, most=9)
