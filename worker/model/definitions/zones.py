"""Time zones: IANA names, the changes of a zone's offset, and the release of the time zone database."""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from worker.errors import InvalidTrigger
from worker.model.definitions.fields import text

# Every time zone database has this file; the first folder that has it is the one in use.
_PROBE = "Europe/Berlin"
# The longest name of a zone has 32 letters.
_LONGEST = 50
_OFFSET = re.compile(r"[+-]\d")
_SECOND = timedelta(seconds=1)
_DAY = timedelta(days=1)


def zone_data_version() -> str:
    """The release, such as `2026a`; a fingerprint of the files if they do not state it."""
    for folder in map(Path, zoneinfo.TZPATH):
        if (folder / _PROBE).is_file():
            return _of_folder(folder)
    version: str = import_module("tzdata").IANA_VERSION
    return version


def _of_folder(folder: Path) -> str:
    for name, prefix in (("tzdata.zi", "# version "), ("+VERSION", "")):
        path = folder / name
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as lines:
                first = lines.readline().strip()
            if first.startswith(prefix) and first != prefix.strip():
                return first.removeprefix(prefix)
    digest = sha256()
    for key in sorted(zoneinfo.available_timezones()):
        path = folder / key
        if path.is_file():
            digest.update(key.encode() + b"\0" + path.read_bytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def find_zone(name: str) -> ZoneInfo | None:
    """The zone with this IANA name, such as `Europe/Berlin`, or None."""
    # ZoneInfo recurses into each folder of a name.
    if len(name) > _LONGEST:
        return None
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None


def parse_zone(name: str) -> ZoneInfo:
    """As `find_zone`; raises InvalidTrigger, which names the nearest zone, if it is unknown."""
    zone = find_zone(name)
    if zone is None:
        near = nearest(name)
        raise InvalidTrigger(
            f"unknown time zone {name!r}",
            field="timezone",
            fix=f"did you mean {near}?" if near else 'use an IANA name, such as "Europe/Berlin" or "UTC"',
        )
    return zone


def zone_name(value: Any) -> str:
    """The name of a zone in a file; raises as `parse_zone`, and ValueError unless it is text."""
    name = text(value)
    parse_zone(name)
    return name


def nearest(name: str) -> str | None:
    """The zone whose name, or whose city, is closest to this one; None if none is close."""
    # Comparing takes some milliseconds, longer for a long text. An offset such as GMT+2 names no zone:
    # Etc/GMT+2 is the opposite.
    if len(name) > _LONGEST or _OFFSET.search(name):
        return None
    from difflib import get_close_matches

    zones = sorted(zoneinfo.available_timezones())
    known = {zone.rpartition("/")[2].lower(): zone for zone in zones} | {zone.lower(): zone for zone in zones}
    close = get_close_matches(name.strip().lower().replace(" ", "_"), known, n=1, cutoff=0.7)
    return known[close[0]] if close else None


class OffsetChange(NamedTuple):
    """The offset changes at the naive UTC time `at`."""

    at: datetime
    before: timedelta
    after: timedelta


class Stretch(NamedTuple):
    """From `start` until before `end` (naive UTC) wall time is UTC + `offset`.

    `before` is the previous offset, equal to `offset` if the stretch merely continues one.
    """

    start: datetime
    end: datetime
    offset: timedelta
    before: timedelta


def stretches(zone: ZoneInfo, start: datetime) -> Iterator[Stretch]:
    """The stretches from the one that contains the naive UTC time `start`, without end."""
    year = start.year - 1
    begin = datetime(year, 1, 1)
    before = offset = _offset(zone, begin)
    while year < datetime.max.year:
        # A year without a change ends its stretch anyway, so that a caller can stop.
        for change in changes_of(zone, year) or (OffsetChange(datetime(year + 1, 1, 1), offset, offset),):
            if change.at > start:
                yield Stretch(begin, change.at, offset, before)
            begin, before, offset = change
        year += 1


@lru_cache(maxsize=16_384)
def changes_of(zone: ZoneInfo, year: int) -> tuple[OffsetChange, ...]:
    """The changes of a zone's offset within one UTC year, oldest first."""
    found = []
    at, end = datetime(year, 1, 1), datetime(year + 1, 1, 1)
    before = _offset(zone, at - _SECOND)
    # A day at a time: since 1970 no zone has changed twice within a week.
    while at < end:
        until = at + _DAY
        after = _offset(zone, until - _SECOND)
        if after != before:
            found.append(OffsetChange(_time_of_change(zone, at - _SECOND, until - _SECOND), before, after))
            before = after
        at = until
    return tuple(found)


def _time_of_change(zone: ZoneInfo, low: datetime, high: datetime) -> datetime:
    """The first second after `low` with the offset of `high`, by bisection."""
    target = _offset(zone, high)
    while high - low > _SECOND:
        middle = low + (high - low) // _SECOND // 2 * _SECOND
        if _offset(zone, middle) == target:
            high = middle
        else:
            low = middle
    return high


def _offset(zone: ZoneInfo, at: datetime) -> timedelta:
    offset = at.replace(tzinfo=UTC).astimezone(zone).utcoffset()
    return offset if offset is not None else timedelta()
