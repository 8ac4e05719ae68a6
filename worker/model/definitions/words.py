"""A schedule in words, with its zone: `At 03:00 every day, Europe/Berlin time`. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from worker.clock import from_text
from worker.model.definitions import NICKNAMES
from worker.model.definitions.units import format_duration, parse_duration

_ANY_TIME = datetime(2000, 1, 1)
_DAY = timedelta(days=1)
_MINUTES = re.compile(r"\*/([1-9]|[1-5][0-9]) +\* +\* +\* +\*")
_PARTS = re.compile(r"(\d+)([a-z]+)")
_UNITS = {"d": "day", "h": "hour", "m": "minute", "s": "second"}


def in_words(schedule: str, zone_name: str) -> str:
    """What a schedule means, without a full stop; the schedule itself if it is invalid."""
    text = schedule.strip()
    kind, _, rest = text.partition(" ")
    try:
        if kind == "every":
            return _every(rest.strip())
        if kind == "at":
            return _at(from_text(rest.strip()), zone_name)
        zone = "UTC" if zone_name == "UTC" else f"{zone_name} time"
        return f"{_crontab(NICKNAMES.get(text, text))}, {zone}"
    except (ValueError, ZeroDivisionError, KeyError, CronSimError, ZoneInfoNotFoundError):
        return text


def in_brief(schedule: str) -> str:
    """What a schedule means within a sentence, without its zone: `every 15 minutes`, `at 03:00 every day`."""
    given = schedule.strip()
    kind, _, rest = given.partition(" ")
    if kind == "every":
        span = duration_in_words(rest.strip())
        return f"every {span.removeprefix('1 ') if span.count(' ') == 1 else span}"
    text = in_words(given, "UTC").removesuffix(", UTC")
    return text if text == given else f"{text[:1].lower()}{text[1:]}"


def duration_in_words(duration: timedelta | str) -> str:
    """A duration, or the text of one, as `1 hour 30 minutes`; a text of another form as it is."""
    try:
        shown = duration if isinstance(duration, timedelta) else parse_duration(duration)
    except ValueError:
        return str(duration)
    parts = _PARTS.findall(format_duration(shown))
    named = ((int(count), _UNITS.get(unit, unit)) for count, unit in parts)
    return " ".join(f"{count:,} {unit}{'s' if count != 1 and len(unit) > 2 else ''}" for count, unit in named)


def _every(text: str) -> str:
    interval = parse_duration(text)
    shown = format_duration(interval)
    number, unit = shown[:-1], shown[-1]
    # An interval that divides a day begins again at each midnight.
    since = "midnight UTC" if not _DAY % interval else "1970-01-01 00:00 UTC"
    if not number.isdecimal():
        return f"Every {shown}, counted from {since}"
    if number == "1":
        return f"Every {_UNITS[unit]}" + {"d": " at 00:00 UTC", "h": " at minute 0"}.get(unit, "")
    return f"Every {number} {_UNITS[unit]}s, counted from {since}"


def _at(at: datetime, zone_name: str) -> str:
    here = at.astimezone(ZoneInfo(zone_name))
    text = f"Once, on {at:%A} {at.day} {at:%B %Y} at {at:%H:%M} UTC"
    if here.utcoffset() != at.astimezone(UTC).utcoffset():
        text += f" ({here:%Y-%m-%d %H:%M} {zone_name} time)"
    return text


def _crontab(text: str) -> str:
    if (step := _MINUTES.fullmatch(text)) and not 60 % (minutes := int(step[1])):
        return "Every minute" if minutes == 1 else f"Every {minutes} minutes"
    words = str(CronSim(text, _ANY_TIME).explain())
    day, weekday = text.split()[-3], text.split()[-1]
    # Cron joins two restricted day fields with "or"; a field that begins with * restricts with "and".
    if not day.startswith("*") and not weekday.startswith("*"):
        first, both, last = words.rpartition(" and on ")
        words = f"{first} or on {last}" if both else words
    return words
