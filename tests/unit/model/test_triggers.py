"""Schedules by their text: crontab lines, nicknames, every and at; zones, bounds and clock changes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice
from zoneinfo import ZoneInfo

import pytest
from apscheduler.triggers.cron import CronTrigger as ApschedulerCron
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.clock import utc
from worker.errors import InvalidTrigger
from worker.model.definitions import NICKNAMES
from worker.model.definitions.triggers import Trigger, parse_schedule
from worker.model.definitions.zones import parse_zone


def schedule(text: str, zone: str = "UTC", **bounds: datetime) -> Trigger:
    return parse_schedule(text, parse_zone(zone), **bounds)


def local(trigger: Trigger, zone: str, start: datetime, count: int) -> list[str]:
    """The first instants from `start` on, as the zone's wall clock shows them."""
    shown = (instant.astimezone(ZoneInfo(zone)) for instant in trigger.occurrences(start))
    return [f"{instant:%d %H:%M %z}" for instant in islice(shown, count)]


def test_a_daily_midnight_job_in_new_york_loses_no_day_of_march_2026():
    """APScheduler's own cron leaves out 9 March, the day after clocks went forward: why ours is our own."""
    zone = ZoneInfo("America/New_York")
    start, end = datetime(2026, 3, 1, tzinfo=zone), datetime(2026, 4, 1, tzinfo=zone)

    midnights = schedule("0 0 * * *", zone.key).between(start.astimezone(UTC), end.astimezone(UTC))
    ours = [instant.astimezone(zone).day for instant in midnights][:-1]

    theirs: list[int] = []
    trigger = ApschedulerCron.from_crontab("0 0 * * *", timezone=zone)
    fired = trigger.get_next_fire_time(None, start)
    while fired is not None and fired < end:
        theirs.append(fired.day)
        fired = trigger.get_next_fire_time(fired, fired)

    assert ours == list(range(1, 32))
    assert theirs == [day for day in range(1, 32) if day != 9]


@pytest.mark.parametrize(
    ("text", "zone", "start", "expected"),
    [
        # Forward at 02:00: a fixed time within the gap fires once, at its end.
        (
            "30 2 * * *",
            "Europe/Berlin",
            "2026-03-28T00:00Z",
            ["28 02:30 +0100", "29 03:00 +0200", "30 02:30 +0200"],
        ),
        ("0,30 2 * * *", "Europe/Berlin", "2026-03-29T00:00Z", ["29 03:00 +0200", "30 02:00 +0200"]),
        ("0 2,3 * * *", "Europe/Berlin", "2026-03-29T00:00Z", ["29 03:00 +0200", "30 02:00 +0200"]),
        # A star follows elapsed time: nothing is made up for the hour that was not.
        ("*/30 2 * * *", "Europe/Berlin", "2026-03-29T00:00Z", ["30 02:00 +0200", "30 02:30 +0200"]),
        # Back at 03:00: a fixed time that comes twice fires at its first pass.
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T00:00Z", ["25 02:30 +0200", "26 02:30 +0100"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T01:00Z", ["26 02:30 +0100", "27 02:30 +0100"]),
        ("30 * * * *", "Europe/Berlin", "2026-10-25T00:00Z", ["25 02:30 +0200", "25 02:30 +0100"]),
        # Half an hour back at 02:00: cronsim 2.8 loses 06:00 of that day.
        ("0 */6 * * *", "Australia/Lord_Howe", "2026-04-04T13:00Z", ["05 00:00 +1100", "05 06:00 +1030"]),
        ("45 1 * * *", "Australia/Lord_Howe", "2026-04-04T14:00Z", ["05 01:45 +1100", "06 01:45 +1030"]),
        ("15 2 * * *", "Australia/Lord_Howe", "2026-10-03T15:00Z", ["04 02:30 +1100", "05 02:15 +1100"]),
        # 02:45 becomes 03:45.
        ("0 3 * * *", "Pacific/Chatham", "2026-09-26T12:00Z", ["27 03:45 +1345", "28 03:00 +1345"]),
        # Midnight itself is missing.
        ("0 0 * * *", "Africa/Cairo", "2026-04-23T20:00Z", ["24 01:00 +0300", "25 00:00 +0300"]),
        # A whole day is missing: what it held fires once, when the next begins.
        ("0 9 * * *", "Pacific/Apia", "2011-12-29T20:00Z", ["31 00:00 +1400", "31 09:00 +1400"]),
        # Seconds obey the same rule.
        ("0 30 2 * * *", "Europe/Berlin", "2026-03-29T00:00Z", ["29 03:00 +0200", "30 02:30 +0200"]),
        ("*/30 30 2 * * *", "Europe/Berlin", "2026-03-29T00:00Z", ["29 03:00 +0200", "30 02:30 +0200"]),
    ],
)
def test_wall_times_in_a_gap_fire_once_after_it_and_those_in_a_fold_once(text, zone, start, expected):
    assert local(schedule(text, zone), zone, utc(start.replace("Z", "+00:00")), len(expected)) == expected


@pytest.mark.parametrize("weekday", ["0", "7", "sun", "SUN"])
def test_zero_and_seven_are_sunday(weekday):
    assert schedule(f"0 0 * * {weekday}").after(utc("2026-01-01")) == utc("2026-01-04")


def test_day_of_month_and_day_of_week_are_joined_by_or():
    found = list(schedule("0 0 13 * FRI").between(utc("2026-03-01"), utc("2026-03-31")))

    assert [instant.day for instant in found] == [6, 13, 20, 27]
    assert [i.day for i in schedule("0 0 13 * FRI").between(utc("2026-04-01"), utc("2026-04-30"))] == [
        3,
        10,
        13,
        17,
        24,
    ]


def test_six_fields_lead_with_seconds():
    found = list(islice(schedule("*/20 0 12 * * *").occurrences(utc("2026-01-01")), 4))

    assert found == [utc(f"2026-01-01T12:00:{s}") for s in ("00", "20", "40")] + [utc("2026-01-02T12:00")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("@hourly", "2026-01-01T01:00"),
        ("@daily", "2026-01-02"),
        ("@midnight", "2026-01-02"),
        ("@weekly", "2026-01-04"),
        ("@monthly", "2026-02-01"),
        ("@yearly", "2027-01-01"),
        ("@annually", "2027-01-01"),
    ],
)
def test_nicknames_name_the_usual_lines(text, expected):
    assert text in NICKNAMES
    assert schedule(text).after(utc("2026-01-01")) == utc(expected)


def test_every_names_whole_multiples_since_1970_in_any_zone():
    trigger = schedule("every 7m", "America/New_York")
    start = utc("2026-03-08T06:59:59.000001")

    found = list(islice(trigger.occurrences(start), 3))

    assert all(int(instant.timestamp()) % 420 == 0 for instant in found)
    assert found[0] == utc("2026-03-08T07:06")
    assert found[2] - found[0] == timedelta(minutes=14)


def test_starts_at_only_bounds_every_and_does_not_shift_it():
    trigger = schedule("every 15m", starts_at=utc("2026-01-01T00:07"), ends_at=utc("2026-01-01T00:45"))

    assert list(trigger.occurrences(utc("2020-01-01"))) == [utc("2026-01-01T00:15"), utc("2026-01-01T00:30")]
    assert trigger.count(utc("2020-01-01"), utc("2030-01-01")) == 2
    assert trigger.last(utc("2020-01-01"), utc("2030-01-01")) == utc("2026-01-01T00:30")


def test_at_names_one_instant_once():
    trigger = schedule("at 2027-01-01T10:00:00+02:00")

    assert trigger.after(utc("2026-01-01")) == utc("2027-01-01T08:00")
    assert trigger.after(utc("2027-01-01T08:00")) is None
    assert trigger.after(utc("2027-01-01T08:00"), inclusive=True) == utc("2027-01-01T08:00")
    assert trigger.count(utc("2026-01-01"), utc("2028-01-01")) == 1
    assert trigger.period(utc("2027-01-01T08:00")) is None


def test_the_period_looks_past_ends_at():
    trigger = schedule("0 3 * * *", ends_at=utc("2026-01-02"))

    assert trigger.after(utc("2026-01-01T03:00")) is None
    assert trigger.period(utc("2026-01-01T03:00")) == timedelta(days=1)


def test_apscheduler_may_ask_as_of_any_trigger():
    trigger = schedule("*/10 * * * *")

    assert trigger.get_next_fire_time(None, utc("2026-01-01T00:10")) == utc("2026-01-01T00:10")
    assert trigger.get_next_fire_time(utc("2026-01-01T00:10"), utc("2026-01-01T00:10")) == utc(
        "2026-01-01T00:20"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "* * * *",
        "* * * * * * *",
        "60 * * * *",
        "* 24 * * *",
        "* * 0 * *",
        "* * * 13 *",
        "* * * * 8",
        "*/0 * * * *",
        "5-1 * * * *",
        "a b c d e",
        "@reboot",
        "@hourly now",
        "every",
        "every 0s",
        "every 1.5s",
        "every fortnight",
        "at noon",
        "at 2027-01-01T08:00:00",
    ],
)
def test_a_text_that_is_no_schedule_is_refused_with_a_fix(text):
    with pytest.raises(InvalidTrigger) as refused:
        schedule(text)

    assert refused.value.field == "schedule"
    assert refused.value.fix


@pytest.mark.parametrize("text", ["0 0 30 2 *", "0 0 31 4,6,9,11 *", "0 0 31 2 */2"])
def test_a_line_that_can_never_fire_is_refused(text):
    with pytest.raises(InvalidTrigger, match="never fire"):
        schedule(text)


def test_a_line_that_fires_once_in_28_years_is_not_refused():
    assert schedule("0 0 29 2 */7").after(utc("2026-01-01")) == utc("2032-02-29")


@pytest.mark.parametrize("name", ["Mars/Olympus", "", "../etc/passwd", "Europe", "europe/berlin\0"])
def test_a_zone_that_does_not_exist_is_refused(name):
    with pytest.raises(InvalidTrigger) as refused:
        parse_zone(name)

    assert refused.value.field == "timezone"


texts = st.sampled_from(
    [
        "* * * * * *",
        "*/7 */3 * * * *",
        "5,50 1,31 2 * * *",
        "0 30 2,3 * * *",
        "*/10 * * * *",
        "0 */6 * * *",
        "15 2 * * 0",
        "every 45s",
        "every 36m",
        "at 2026-03-29T01:10:00Z",
    ]
)
zones = st.sampled_from(["UTC", "Europe/Berlin", "Australia/Lord_Howe", "Africa/Cairo"])
nights = st.sampled_from(["2026-03-29T01:00", "2026-10-25T01:00", "2026-04-04T15:00", "2026-10-03T15:30"])


@settings(deadline=None)
@given(texts, zones, nights, st.floats(-3000, 3000), st.floats(0, 4000), st.integers(1, 60))
def test_counting_agrees_with_walking(text, zone, night, begin, length, newest):
    """Count, newest and last give without walking what a walk over the instants gives."""
    trigger = schedule(text, zone)
    start = utc(night) + timedelta(seconds=begin)
    until = start + timedelta(seconds=length)

    walked = list(trigger.between(start, until))

    assert walked == sorted(set(walked))
    assert trigger.count(start, until) == len(walked)
    assert trigger.last(start, until) == (walked[-1] if walked else None)
    assert trigger.newest(start, until, newest) == (walked[-newest:][0] if walked else None)


def test_a_year_of_seconds_is_counted_by_its_days():
    """31,536,000 instants are counted in far less time than it takes to walk them."""
    trigger = schedule("* * * * * *", "Europe/Berlin")

    assert trigger.count(utc("2026-01-01"), utc("2027-01-01") - timedelta(seconds=1)) == 365 * 86400
    assert trigger.newest(utc("2026-01-01"), utc("2027-01-01"), 11) == utc("2026-12-31T23:59:50")
