"""Which release of the time zone database this machine computes with."""

from __future__ import annotations

import zoneinfo
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from worker.errors import InvalidTrigger

# A file that each set of zones has; the first folder that has it is the one in use.
_PROBE = "Europe/Berlin"


def zone_data_version() -> str:
    """The release, such as `2026a`; a fingerprint of the files where they do not say."""
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


_SECOND = timedelta(seconds=1)
_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Change:
    """At the naive UTC instant `at` the offset goes from `before` to `after`."""

    at: datetime
    before: timedelta
    after: timedelta


@dataclass(frozen=True, slots=True)
class Stretch:
    """From `start` until before `end` (naive UTC) wall time is UTC + `offset`.

    `start_is_change` is false where the stretch merely continues an earlier one;
    `before` is the offset ahead of `start`, equal to `offset` then.
    """

    start: datetime
    end: datetime
    offset: timedelta
    before: timedelta


def parse_zone(name: str) -> ZoneInfo:
    """The zone with this IANA name, such as `Europe/Berlin`.

    Raises:
        InvalidTrigger: there is none.
    """
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InvalidTrigger(
            f"no time zone is named {name!r}",
            field="timezone",
            fix='use an IANA name, such as "Europe/Berlin" or "UTC"',
        ) from error


def stretches(zone: ZoneInfo, start: datetime) -> Iterator[Stretch]:
    """The stretches from the one that holds the naive UTC instant `start` on, without end."""
    year = start.year
    changes = changes_of(zone, year - 1) + changes_of(zone, year)
    position = bisect_right(changes, start, key=lambda change: change.at)
    if position:
        latest = changes[position - 1]
        begin, before, offset = latest.at, latest.before, latest.after
    else:
        begin, before = datetime(year - 1, 1, 1), _offset(zone, datetime(year - 1, 1, 1))
        offset = before
    ahead = changes[position:]
    while True:
        for change in ahead:
            yield Stretch(begin, change.at, offset, before)
            begin, before, offset = change.at, change.before, change.after
        year += 1
        if year >= datetime.max.year:
            return
        ahead = changes_of(zone, year)
        if not ahead:
            # A year without a change: end the stretch anyway, so that a caller can stop.
            end = datetime(year + 1, 1, 1)
            yield Stretch(begin, end, offset, before)
            begin, before = end, offset


@lru_cache(maxsize=16_384)
def changes_of(zone: ZoneInfo, year: int) -> tuple[Change, ...]:
    """The changes of a zone's offset within one UTC year, oldest first."""
    found = []
    at, end = datetime(year, 1, 1), datetime(year + 1, 1, 1)
    before = _offset(zone, at - _SECOND)
    # A day at a time: since 1970 no zone has changed twice within a week.
    while at < end:
        until = at + _DAY
        after = _offset(zone, until - _SECOND)
        if after != before:
            found.append(Change(_moment(zone, at - _SECOND, until - _SECOND), before, after))
            before = after
        at = until
    return tuple(found)


def _moment(zone: ZoneInfo, low: datetime, high: datetime) -> datetime:
    """The first second after `low` with the offset of `high`."""
    target = _offset(zone, high)
    while high - low > _SECOND:
        middle = low + (high - low) // _SECOND // 2 * _SECOND
        if _offset(zone, middle) == target:
            high = middle
        else:
            low = middle
    return high


def _offset(zone: ZoneInfo, instant: datetime) -> timedelta:
    offset = instant.replace(tzinfo=UTC).astimezone(zone).utcoffset()
    return offset if offset is not None else timedelta()
