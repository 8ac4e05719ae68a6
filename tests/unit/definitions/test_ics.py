"""iCalendar files: whole days are read exactly as RFC 5545 has them, and nothing else is guessed."""

from __future__ import annotations

from datetime import date

import pytest

from worker.definitions.calendars import InvalidCalendar, all_day_dates


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
