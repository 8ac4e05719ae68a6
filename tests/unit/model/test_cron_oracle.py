"""Crontab lines against a brute-force oracle over the minutes of wall clocks, around clock changes.

The oracle shares no code with cronsim.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache
from random import Random
from zoneinfo import ZoneInfo

from worker.model.definitions.triggers import parse_schedule

# ORACLE_CASES=10000 is the long form; a failure message contains the seed.
CASES = int(os.environ.get("ORACLE_CASES", "200"))
SEED = int(os.environ.get("ORACLE_SEED", "2026"))
ZONES = {
    "Europe/Berlin": (2025, 2027),
    "America/New_York": (2025, 2027),
    "Australia/Lord_Howe": (2025, 2027),
    "Pacific/Chatham": (2025, 2027),
    "Africa/Cairo": (2024, 2026),
    "America/Nuuk": (2023, 2025),
    # Samoa left out 30 December 2011, and gave up its summer time in 2021.
    "Pacific/Apia": (2011, 2012),
}
BEFORE = timedelta(hours=30)
AFTER = timedelta(hours=54)


def test_random_crontab_lines_fire_as_the_oracle_says_around_every_change_of_the_clock():
    random = Random(SEED)
    fired = 0
    for case in range(CASES):
        zone = random.choice(list(ZONES))
        change = random.choice(clock_changes(zone, *ZONES[zone]))
        start, end = change - BEFORE, change + AFTER
        cron = random_cron(random)
        expected = fire_times(cron, zone, start, end)
        until = end - timedelta(microseconds=1)
        what = f"case {case} of seed {SEED}: {cron.text!r} in {zone} around {change}"

        trigger = parse_schedule(cron.text, ZoneInfo(zone)) if _can_fire(cron) else None
        if trigger is None:
            assert not expected, what
            continue
        assert list(trigger.between(start, until)) == expected, what
        assert trigger.count(start, until) == len(expected), what
        assert trigger.last(start, until) == (expected[-1] if expected else None), what

        # From and to anywhere within, also between whole minutes.
        low = start + (end - start) * random.random()
        high = low + (end - low) * random.random()
        inner = [instant for instant in expected if low <= instant <= high]
        assert trigger.count(low, high) == len(inner), what
        assert trigger.last(low, high) == (inner[-1] if inner else None), what
        later = [instant for instant in expected if instant > low]
        if later:
            assert trigger.after(low) == later[0], what
        fired += len(expected)
    assert fired > CASES


def _can_fire(cron: Cron) -> bool:
    """Whether any day of a leap year allows the line; other lines are rejected."""
    return not cron.both_days or min(cron.days) <= max(
        (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)[month - 1] for month in cron.months
    )


# ---- the oracle

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)

_MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]
_DAYS = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"]


@dataclass(frozen=True)
class Cron:
    """A crontab line and the values that it allows, which are generated with it, not parsed from it."""

    text: str
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]  # 0 is Sunday
    elapsed: bool  # minute or hour begins with a star
    both_days: bool  # day of month or day of week begins with a star

    def allows_day(self, day: date) -> bool:
        by_month, by_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return day.month in self.months and (
            (by_month and by_week) if self.both_days else (by_month or by_week)
        )

    def allows(self, wall: datetime) -> bool:
        return wall.minute in self.minutes and wall.hour in self.hours and self.allows_day(wall.date())


def random_cron(random: Random) -> Cron:
    """A random line that uses every way to write a field, and often fires."""
    minute, minutes = _field(random, 0, 59, stars=0.3)
    hour, hours = _field(random, 0, 23, stars=0.4)
    day, days = _field(random, 1, 31, stars=0.8)
    month, months = _field(random, 1, 12, stars=0.9, names=_MONTHS)
    weekday, weekdays = _field(random, 0, 7, stars=0.7, names=_DAYS)
    return Cron(
        " ".join((minute, hour, day, month, weekday)),
        minutes,
        hours,
        days,
        months,
        frozenset(each % 7 for each in weekdays),
        elapsed=minute.startswith("*") or hour.startswith("*"),
        both_days=day.startswith("*") or weekday.startswith("*"),
    )


def _field(
    random: Random, low: int, high: int, *, stars: float, names: list[str] | None = None
) -> tuple[str, frozenset[int]]:
    if random.random() < stars:
        if random.random() < 0.6:
            return "*", frozenset(range(low, high + 1))
        step = random.randint(2, max(2, (high - low) // 2))
        return f"*/{step}", frozenset(range(low, high + 1, step))
    texts, values = [], set()
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        start = random.randint(low, high)
        kind = random.random()
        if kind < 0.6:
            texts.append(_name(random, start, low, names))
            values.add(start)
        else:
            end = random.randint(start, high)
            step = random.randint(1, 5) if kind > 0.8 else 1
            text = f"{_name(random, start, low, names)}-{_name(random, end, low, names)}"
            values.update(range(start, end + 1, step))
            if step > 1:
                # A step after a single value would run to the end: use it with a range only.
                text = f"{start}-{end}/{step}" if end > start else str(start)
            texts.append(text)
    return ",".join(texts), frozenset(values)


def _name(random: Random, value: int, low: int, names: list[str] | None) -> str:
    if names is None or random.random() < 0.6 or value - low >= len(names):
        return str(value)
    name = names[value - low]
    return name if random.random() < 0.5 else name.lower()


@cache
def clock_changes(zone: str, first_year: int, last_year: int) -> tuple[datetime, ...]:
    """The hours (UTC) at whose end the zone's offset changes; looks at every hour."""
    found = []
    at, end = datetime(first_year, 1, 1, tzinfo=UTC), datetime(last_year + 1, 1, 1, tzinfo=UTC)
    tz = ZoneInfo(zone)
    while at < end:
        if at.astimezone(tz).utcoffset() != (at + HOUR).astimezone(tz).utcoffset():
            found.append(at)
        at += HOUR
    return tuple(found)


@cache
def walls(zone: str, start: datetime, end: datetime) -> tuple[tuple[datetime, datetime], ...]:
    """Each minute from `start` to before `end`, in UTC and as the zone's wall clock shows it."""
    tz = ZoneInfo(zone)
    shown, at = [], start
    while at < end:
        shown.append((at, at.astimezone(tz).replace(tzinfo=None, fold=0)))
        at += MINUTE
    return tuple(shown)


def fire_times(cron: Cron, zone: str, start: datetime, end: datetime) -> list[datetime]:
    """When the line fires from `start` to before `end`: whole minutes in UTC, away from clock changes."""
    if cron.elapsed:
        return [at for at, wall in walls(zone, start, end) if cron.allows(wall)]
    found = []
    latest: datetime | None = None
    for at, wall in walls(zone, start, end):
        if latest is None or wall - latest == MINUTE:
            fires = cron.allows(wall)
        elif wall > latest:
            # The clock jumped forward: what the skipped minutes would have fired fires once, now.
            skipped = (latest + MINUTE * n for n in range(1, (wall - latest) // MINUTE + 1))
            fires = any(cron.allows(each) for each in skipped)
        else:
            fires = False
        if fires:
            found.append(at)
        latest = wall if latest is None else max(latest, wall)
    return found
