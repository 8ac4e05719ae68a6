"""Units: durations and sizes as text, and the depth of nested values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Any

from worker.clock import Clock, from_text, to_text
from worker.errors import UsageError

MAX_DEPTH = 64
"""The maximum nesting of params, and of a handler's schema."""
TOO_DEEP = f"it nests more than {MAX_DEPTH} levels"


def depth_of(value: Any) -> int:
    """Levels of nested tables and lists: 0 for text, 1 for a table of texts; not recursive."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, Mapping | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, Mapping) else item)]
    return depth


_MICROSECONDS = {
    "w": 604_800_000_000,
    "d": 86_400_000_000,
    "h": 3_600_000_000,
    "m": 60_000_000,
    "s": 1_000_000,
    "ms": 1_000,
    "us": 1,
}
_PART = re.compile(r"(\d+)(?:\.(\d{1,6}))?(ms|us|[wdhms])")
_DURATION = re.compile(rf"(?:{_PART.pattern})+")
LONGEST = timedelta(days=36_500)
_LONGEST = LONGEST // timedelta(microseconds=1)
# Of a time that is given. No schedule is computed near the first year of a calendar.
FIRST_YEAR = 1900

_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_BYTES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# Longer texts are not parsed.
_MAX_TEXT = 100
_SIZE = re.compile(r"(\d{1,15})\s*([KMGT]i?B|B)")


def parse_duration(text: str) -> timedelta:
    """The duration of a text such as `30s`, `15m`, `2h`, `1d`, `1h30m` or `0.5s`; raises ValueError."""
    if not isinstance(text, str) or len(text) > _MAX_TEXT or _DURATION.fullmatch(text) is None:
        shown = text[:_MAX_TEXT] if isinstance(text, str) else text
        raise ValueError(f"{shown!r} is not a duration; write it as text, such as 30s, 15m, 2h or 1d")
    total = 0
    for whole, fraction, unit in _PART.findall(text):
        size = _MICROSECONDS[unit]
        total += int(whole) * size + int(fraction.ljust(6, "0")) * size // 1_000_000
        if total > _LONGEST:
            raise ValueError(f"{text!r} is longer than a hundred years")
    return timedelta(microseconds=total)


def format_duration(duration: timedelta) -> str:
    """The canonical text of a duration of 0 or more; `parse_duration` reads it back exactly."""
    left = duration // timedelta(microseconds=1)
    parts = []
    for unit in ("d", "h", "m", "s", "ms", "us"):
        whole, left = divmod(left, _MICROSECONDS[unit])
        if whole:
            parts.append(f"{whole}{unit}")
    return "".join(parts) or "0s"


def took(value: timedelta | None) -> str:
    """A duration in its two largest units at most, such as `2 min 5 s`."""
    if value is None:
        return ""
    seconds = value.total_seconds()
    if seconds < 10:
        return f"{seconds:.1f} s"
    for size, unit, smaller, name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= size:
            rest = int(seconds % size // smaller)
            return f"{int(seconds // size)} {unit}" + (f" {rest} {name}" if rest else "")
    return f"{int(seconds)} s"


# As `datetime.weekday` counts.
_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


def parse_time(text: str, clock: Clock, *, name: str) -> datetime:
    """As `time_of`, at the clock's time and in UTC."""
    return time_of(text, now=clock.now(), name=name)


def time_of(text: str, *, now: datetime, zone: tzinfo = UTC, name: str) -> datetime:
    """A time from RFC 3339, a day or a time without an offset in `zone`, or a duration ago, in UTC.

    A day is a date, `today`, `yesterday` or the last such weekday, and means its start. `name` is
    for errors.

    Raises:
        UsageError: the text has another form, or is before FIRST_YEAR.
    """
    for read in (
        from_text,
        lambda given: datetime.combine(_day(given, now.astimezone(zone).date()), time(), zone),
        lambda given: _local(given, zone),
        lambda given: now - parse_duration(given),
    ):
        try:
            found = read(text).astimezone(UTC)
            if found.year >= FIRST_YEAR:
                return found
        except (ValueError, OverflowError):
            continue
    raise UsageError(
        f"{name} {text!r} is not a time",
        fix="write 2027-01-01T08:00:00Z, 2027-01-01, yesterday, monday, or a duration ago such as 2h",
    )


def _local(text: str, zone: tzinfo) -> datetime:
    """A time without an offset; raises ValueError."""
    local = datetime.fromisoformat(text)
    if local.tzinfo is not None:
        raise ValueError(f"{text!r} has an offset")
    return local.replace(tzinfo=zone)


def _day(text: str, today: date) -> date:
    """A date, or the name of a day that is not in the future; raises ValueError."""
    word = text.lower()
    if word in ("today", "yesterday"):
        return today - timedelta(days=word == "yesterday")
    if word in _WEEKDAYS:
        return today - timedelta(days=(today.weekday() - _WEEKDAYS.index(word)) % 7)
    return date.fromisoformat(text)


def json_default(value: Any) -> Any:
    """For `json.dumps`: times in RFC 3339 UTC, durations as in worker.toml, anything else as text."""
    if isinstance(value, datetime):
        return to_text(value)
    if isinstance(value, timedelta):
        return format_duration(value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)


def plain_json(text: str | bytes) -> Any:
    """The value of a JSON text; raises ValueError, also for NaN and Infinity, or RecursionError."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def parse_memory(text: str) -> int:
    """The number of bytes of a text such as `512MiB` or `1GiB`; raises ValueError."""
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it as text, such as 512MiB or 1GiB")
    return int(match[1]) * _BYTES[match[2]]


def format_memory(size: int) -> str:
    """The shortest exact text of a size in bytes, in powers of 1024."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % _BYTES[unit] == 0:
            return f"{size // _BYTES[unit]}{unit}"
    return f"{size}B"
