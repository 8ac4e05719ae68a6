"""Schedules in words."""

from __future__ import annotations

from datetime import timedelta

import pytest

from worker.model.definitions.words import duration_in_words, in_brief, in_words


@pytest.mark.parametrize(
    ("schedule", "zone", "words"),
    [
        ("0 3 * * *", "Europe/Berlin", "At 03:00 every day, Europe/Berlin time"),
        ("0 9 * * 1-5", "UTC", "At 09:00 on Monday through Friday, UTC"),
        ("*/15 * * * *", "UTC", "Every 15 minutes, UTC"),
        ("*/5  * * * *", "Asia/Kolkata", "Every 5 minutes, Asia/Kolkata time"),
        ("*/1 * * * *", "UTC", "Every minute, UTC"),
        # 7 does not divide an hour: the last step of each is shorter.
        ("*/7 * * * *", "UTC", "Every seventh minute of every hour, UTC"),
        ("*/15 9 * * *", "UTC", "Every 15th minute from 09:00 through 09:59, UTC"),
        ("30 0 3 * * *", "UTC", "At 03:00:30 every day, UTC"),
        # Two restricted day fields are joined by "or", unless one begins with a star.
        ("0 3 1 * 1", "UTC", "At 03:00 on the first day of month or on Monday, UTC"),
        ("0 3 */2 * 1", "UTC", "At 03:00 on every second day of month if it's on Monday, UTC"),
        ("@hourly", "Asia/Kolkata", "At the start of every hour, Asia/Kolkata time"),
        ("@daily", "UTC", "At 00:00 every day, UTC"),
        (" every 15m ", "Asia/Tokyo", "Every 15 minutes, counted from midnight UTC"),
        ("every 90m", "UTC", "Every 1h30m, counted from midnight UTC"),
        ("every 7m", "UTC", "Every 7 minutes, counted from 1970-01-01 00:00 UTC"),
        ("every 1d", "UTC", "Every day at 00:00 UTC"),
        ("every 1h", "UTC", "Every hour at minute 0"),
        ("every 2w", "UTC", "Every 14 days, counted from 1970-01-01 00:00 UTC"),
        ("at 2027-01-01T08:00:00Z", "UTC", "Once, on Friday 1 January 2027 at 08:00 UTC"),
        (
            "at 2027-01-01T08:00:00Z",
            "Asia/Tokyo",
            "Once, on Friday 1 January 2027 at 08:00 UTC (2027-01-01 17:00 Asia/Tokyo time)",
        ),
    ],
)
def test_a_schedule_in_words(schedule: str, zone: str, words: str):
    assert in_words(schedule, zone) == words


@pytest.mark.parametrize("schedule", ["61 * * * *", "every soon", "at noon", "@sometimes", "every 0s", ""])
def test_an_invalid_schedule_stays_as_it_is(schedule: str):
    assert in_words(schedule, "UTC") == schedule


def test_an_unknown_zone_leaves_the_schedule():
    assert in_words("at 2027-01-01T08:00:00Z", "Nowhere/Land") == "at 2027-01-01T08:00:00Z"


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("every 15m", "every 15 minutes"),
        (" every  1h ", "every hour"),
        ("every 90m", "every 1 hour 30 minutes"),
        ("every 1d", "every day"),
        ("every soon", "every soon"),
        ("0 3 * * *", "at 03:00 every day"),
        ("@hourly", "at the start of every hour"),
        ("at 2027-01-01T08:00:00Z", "once, on Friday 1 January 2027 at 08:00 UTC"),
        ("61 * * * *", "61 * * * *"),
        ("At noon", "At noon"),
        ("", ""),
    ],
)
def test_a_schedule_within_a_sentence(schedule: str, words: str):
    assert in_brief(schedule) == words


@pytest.mark.parametrize(
    ("duration", "words"),
    [
        ("15m", "15 minutes"),
        ("1d2h", "1 day 2 hours"),
        ("1.5s", "1 second 500 ms"),
        ("0s", "0 seconds"),
        ("2w", "14 days"),
        (timedelta(hours=1), "1 hour"),
        ("auto", "auto"),
        ("9" * 50 + "w", "9" * 50 + "w"),
    ],
)
def test_a_duration_in_words(duration: str | timedelta, words: str):
    assert duration_in_words(duration) == words
