"""Triggers: the scheduled times of a crontab line, `@hourly`, `every 15m` or `at 2027-01-01T08:00:00Z`."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from itertools import takewhile
from operator import itemgetter
from typing import NamedTuple
from zoneinfo import ZoneInfo

from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.date import DateTrigger
from apscheduler.triggers.interval import IntervalTrigger
from cronsim import CronSim, CronSimError

from worker.clock import EPOCH, from_text
from worker.errors import InvalidTrigger
from worker.model.definitions import NICKNAMES
from worker.model.definitions.units import parse_duration
from worker.model.definitions.zones import Stretch, stretches

_DAY = timedelta(days=1)
_SECOND = timedelta(seconds=1)
_TICK = timedelta(microseconds=1)
_ANY_TIME = datetime(2000, 1, 1)
# 29 February on a given weekday recurs within 40 years, even across 2100.
_YEARS = 50
_LIMITS = {
    "second": "0-59",
    "minute": "0-59",
    "hour": "0-23",
    "day-of-month": "1-31",
    "month": "1-12 or JAN-DEC",
    "day-of-week": "0-7 or SUN-SAT",
}


class Crontab:
    """A parsed crontab line over naive wall times of whole seconds.

    `elapsed` if minute or hour begins with `*`: such a schedule follows elapsed time
    through a clock change (Debian's crontab(5)).
    """

    __slots__ = ("_fields", "_minutes", "_per_day", "_seconds", "elapsed")

    def __init__(self, text: str) -> None:
        """Raises InvalidTrigger if a field is invalid, or no day ever matches."""
        self._fields = _parse(text)
        self.elapsed = any(part.startswith("*") for part in self._fields.parts[1:3])
        self._seconds = tuple(sorted(self._fields.seconds))
        self._minutes = _minutes_of_day(frozenset(self._fields.hours), frozenset(self._fields.minutes))
        self._per_day = len(self._minutes) * len(self._seconds)
        if self._next_day(date(2000, 1, 1)) is None:
            raise _never_fires(text)

    def next(self, wall: datetime) -> datetime | None:
        """The first matching wall time at or after `wall`."""
        day = wall.date()
        if self._matches(day):
            earlier = self._rank(_second_of_day(wall) - 1)
            if earlier < self._per_day:
                return self._at(day, earlier)
        next_day = self._next_day(day + _DAY)
        return None if next_day is None else self._at(next_day, 0)

    def last(self, floor: datetime, wall: datetime) -> datetime | None:
        """The last matching wall time at or before `wall`, not before `floor`."""
        day, first_day, rank = wall.date(), floor.date(), self._rank(_second_of_day(wall))
        while day >= first_day:
            if rank and self._matches(day):
                found = self._at(day, rank - 1)
                return found if found >= floor else None
            day, rank = day - _DAY, self._per_day
        return None

    def count(self, start: datetime, end: datetime) -> int:
        """The number of matching wall times from `start` to `end`, both included; the cost is per day."""
        if start > end:
            return 0
        day, last_day = start.date(), end.date()
        total = -self._rank(_second_of_day(start) - 1) if self._matches(day) else 0
        while day < last_day:
            if self._matches(day):
                total += self._per_day
            day += _DAY
        return total + (self._rank(_second_of_day(end)) if self._matches(last_day) else 0)

    def _matches(self, day: date) -> bool:
        return day.month in self._fields.months and self._fields.match_day(day)

    def _next_day(self, day: date) -> date | None:
        give_up = day.year + _YEARS
        while day.year <= give_up:
            if day.month not in self._fields.months:
                day = (day.replace(day=1) + timedelta(days=32)).replace(day=1)
            elif self._fields.match_day(day):
                return day
            else:
                day += _DAY
        return None

    def _rank(self, second: int) -> int:
        """The number of a matching day's times at or before this second of the day."""
        minute, rest = divmod(second, 60)
        place = bisect_left(self._minutes, minute)
        rank = place * len(self._seconds)
        if place < len(self._minutes) and self._minutes[place] == minute:
            rank += bisect_right(self._seconds, rest)
        return rank

    def _at(self, day: date, index: int) -> datetime:
        """The time with this index among those of a matching day."""
        place, second = divmod(index, len(self._seconds))
        hour, minute = divmod(self._minutes[place], 60)
        return datetime(day.year, day.month, day.day, hour, minute, self._seconds[second])


def _parse(text: str) -> CronSim:
    try:
        return CronSim(text, _ANY_TIME)
    except CronSimError as error:
        parts, field = text.split(), str(error).removeprefix("Bad ")
        if field == "day-of-month":
            with suppress(CronSimError):
                CronSim(" ".join([*parts[:-2], "*", parts[-1]]), _ANY_TIME)
                # Only day and month together are invalid, such as 30 February.
                raise _never_fires(text) from error
        problem = (
            f"{field} must be {_LIMITS[field]}" if field in _LIMITS else "it must have five or six fields"
        )
        raise InvalidTrigger(
            f'"{text}": {problem}',
            field="schedule",
            fix='write five fields, such as "0 3 * * *", or six with leading seconds',
        ) from error


def _never_fires(text: str) -> InvalidTrigger:
    return InvalidTrigger(
        f'"{text}" can never fire: no such day exists',
        field="schedule",
        fix="correct its day of month, month or day of week",
    )


@lru_cache(maxsize=4096)
def _minutes_of_day(hours: frozenset[int], minutes: frozenset[int]) -> tuple[int, ...]:
    return tuple(sorted(hour * 60 + minute for hour in hours for minute in minutes))


def _second_of_day(wall: datetime) -> int:
    return wall.hour * 3600 + wall.minute * 60 + wall.second


class RangePiece(NamedTuple):
    """A range, both ends included; `closed` if all of it is on dates of a calendar."""

    start: datetime
    until: datetime
    closed: bool


class Trigger(BaseTrigger):  # type: ignore[misc]
    """The scheduled times of a schedule, aware UTC, from `starts_at` until before `ends_at`."""

    def __init__(self, *, starts_at: datetime | None = None, ends_at: datetime | None = None) -> None:
        self.starts_at = starts_at
        self.ends_at = ends_at

    def after(self, at: datetime, *, inclusive: bool = False) -> datetime | None:
        """The first scheduled time after `at`, or at it if `inclusive`."""
        start = at if inclusive else at + _TICK
        if self.starts_at is not None:
            start = max(start, self.starts_at)
        found = self._next(start)
        return None if found is None or (self.ends_at is not None and found >= self.ends_at) else found

    def last(self, start: datetime, until: datetime) -> datetime | None:
        """The newest scheduled time from `start` to `until`, both included."""
        start, until = self._within(start, until)
        return self._last(start, until) if start <= until else None

    def count(self, start: datetime, until: datetime) -> int:
        """The number of scheduled times from `start` to `until`, both included, without walking them."""
        start, until = self._within(start, until)
        return self._count(start, until) if start <= until else 0

    def between(self, start: datetime, until: datetime) -> Iterator[datetime]:
        """The scheduled times from `start` to `until`, both included, oldest first."""
        return takewhile(lambda at: at <= until, self.occurrences(start))

    def occurrences(self, start: datetime) -> Iterator[datetime]:
        """All scheduled times at or after `start`, oldest first."""
        at = self.after(start, inclusive=True)
        while at is not None:
            yield at
            at = self.after(at)

    def newest(self, start: datetime, until: datetime, count: int) -> datetime | None:
        """The oldest of the newest `count` scheduled times from `start` to `until`, both included."""
        if count < 1:
            return None
        if self.count(start, until) > count:
            # Bisect for the latest second from which more than `count` remain; they are counted, not walked.
            seconds, first = range((until - start) // _SECOND + 2), start
            few = bisect_left(seconds, True, key=lambda at: self.count(first + at * _SECOND, until) <= count)
            start += (few - 1) * _SECOND
            while self.count(start, until) > count:
                start = (self.after(start, inclusive=True) or until) + _TICK
        oldest = self.after(start, inclusive=True)
        return oldest if oldest is not None and oldest <= until else None

    def period(self, at: datetime) -> timedelta | None:
        """From `at` to the next scheduled time, ignoring `ends_at`; None if the schedule has ended."""
        found = self._next(at + _TICK)
        return None if found is None else found - at

    @property
    def nominal(self) -> Trigger:
        """All scheduled times, also those on the dates of a calendar."""
        return self

    def pieces(self, start: datetime, until: datetime) -> Iterator[RangePiece]:
        """What lies from `start` to `until`, divided where a date of the calendar begins or ends."""
        yield RangePiece(start, until, closed=False)

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        """APScheduler's interface: the next time after the previous one, else from now on."""
        if previous_fire_time is not None:
            return self.after(previous_fire_time.astimezone(UTC))
        return self.after(now.astimezone(UTC), inclusive=True)

    def _within(self, start: datetime, until: datetime) -> tuple[datetime, datetime]:
        if self.starts_at is not None:
            start = max(start, self.starts_at)
        if self.ends_at is not None:
            until = min(until, self.ends_at - _TICK)
        return start, until

    # As `after` (inclusive), `last` and `count`, without `starts_at` and `ends_at`.
    @abstractmethod
    def _next(self, start: datetime) -> datetime | None: ...

    @abstractmethod
    def _last(self, start: datetime, until: datetime) -> datetime | None: ...

    @abstractmethod
    def _count(self, start: datetime, until: datetime) -> int: ...


class CronTrigger(Trigger):
    """A crontab line in a zone."""

    def __init__(self, text: str, zone: ZoneInfo, **bounds: datetime | None) -> None:
        super().__init__(**bounds)
        self.crontab = Crontab(text)
        self.zone = zone

    def _next(self, start: datetime) -> datetime | None:
        at = _whole_second(start)
        for stretch in stretches(self.zone, at):
            if stretch.start >= at and self._skipped_a_time(stretch):
                return stretch.start.replace(tzinfo=UTC)
            wall = self.crontab.next(self._first_wall(stretch, at))
            if wall is None:
                return None
            if wall - stretch.offset < stretch.end:
                return (wall - stretch.offset).replace(tzinfo=UTC)
        return None

    def _last(self, start: datetime, until: datetime) -> datetime | None:
        at = _whole_second(start)
        for stretch in reversed(self._stretches(start, until)):
            wall = self.crontab.last(self._first_wall(stretch, at), self._last_wall(stretch, until))
            if wall is not None:
                return (wall - stretch.offset).replace(tzinfo=UTC)
            if stretch.start >= at and self._skipped_a_time(stretch):
                return stretch.start.replace(tzinfo=UTC)
        return None

    def _count(self, start: datetime, until: datetime) -> int:
        at = _whole_second(start)
        total = 0
        for stretch in self._stretches(start, until):
            first, last = self._first_wall(stretch, at), self._last_wall(stretch, until)
            total += self.crontab.count(first, last)
            if stretch.start >= at and self._skipped_a_time(stretch):
                total += self.crontab.next(first) != first
        return total

    def _stretches(self, start: datetime, until: datetime) -> list[Stretch]:
        begin, end = start.replace(tzinfo=None), until.replace(tzinfo=None)
        return list(takewhile(lambda stretch: stretch.start <= end, stretches(self.zone, begin)))

    def _skipped_a_time(self, stretch: Stretch) -> bool:
        """Whether the gap at the start of this stretch skipped a wall time, which fires after the gap."""
        if self.crontab.elapsed or stretch.offset <= stretch.before:
            return False
        wall = self.crontab.next(stretch.start + stretch.before)
        return wall is not None and wall < stretch.start + stretch.offset

    def _first_wall(self, stretch: Stretch, at: datetime) -> datetime:
        wall = max(stretch.start, at) + stretch.offset
        if not self.crontab.elapsed and stretch.offset < stretch.before:
            # Wall times that the fold repeats fire at their first pass only.
            wall = max(wall, stretch.start + stretch.before)
        return wall

    def _last_wall(self, stretch: Stretch, until: datetime) -> datetime:
        last = min(until.replace(microsecond=0, tzinfo=None), stretch.end - _SECOND)
        return last + stretch.offset


class EveryTrigger(Trigger):
    """Whole multiples of an interval since 1970-01-01T00:00:00Z, in any zone."""

    def __init__(self, interval: timedelta, **bounds: datetime | None) -> None:
        super().__init__(**bounds)
        self.interval = interval
        self._multiples = IntervalTrigger(seconds=interval // _SECOND, start_date=EPOCH, timezone=UTC)

    def _next(self, start: datetime) -> datetime | None:
        # APScheduler computes in floats, which are exact for whole seconds.
        at = _whole_second(start).replace(tzinfo=UTC)
        found: datetime = self._multiples.get_next_fire_time(None, max(at, EPOCH))
        return found

    def _last(self, start: datetime, until: datetime) -> datetime | None:
        found = EPOCH + (until - EPOCH) // self.interval * self.interval
        return found if found >= start else None

    def _count(self, start: datetime, until: datetime) -> int:
        return (until - EPOCH) // self.interval - (start - EPOCH - _TICK) // self.interval


class AtTrigger(Trigger):
    """One scheduled time."""

    def __init__(self, at: datetime, **bounds: datetime | None) -> None:
        super().__init__(**bounds)
        self._date = DateTrigger(run_date=at, timezone=UTC)

    def _next(self, start: datetime) -> datetime | None:
        at: datetime = self._date.get_next_fire_time(None, start)
        return at if at >= start else None

    def _last(self, start: datetime, until: datetime) -> datetime | None:
        at = self._next(start)
        return at if at is not None and at <= until else None

    def _count(self, start: datetime, until: datetime) -> int:
        return int(self._last(start, until) is not None)


class OpenTrigger(Trigger):
    """The scheduled times of another trigger that are not on the dates of a calendar, in a zone."""

    def __init__(self, nominal: Trigger, dates: tuple[date, ...], zone: ZoneInfo) -> None:
        super().__init__(starts_at=nominal.starts_at, ends_at=nominal.ends_at)
        self._nominal = nominal
        self._closed = _ranges_of(dates, zone)

    @property
    def nominal(self) -> Trigger:
        return self._nominal

    def pieces(self, start: datetime, until: datetime) -> Iterator[RangePiece]:
        for first, end in self._closed_from(start):
            if first > until:
                break
            if start < first:
                yield RangePiece(start, first - _TICK, closed=False)
            yield RangePiece(max(start, first), min(until, end - _TICK), closed=True)
            start = end
        if start <= until:
            yield RangePiece(start, until, closed=False)

    def _next(self, start: datetime) -> datetime | None:
        at = self._nominal._next(start)
        for first, end in self._closed_from(start):
            if at is None or at < first:
                break
            if at < end:
                at = self._nominal._next(end)
        return at

    def _last(self, start: datetime, until: datetime) -> datetime | None:
        for piece in reversed(list(self.pieces(start, until))):
            if not piece.closed and (at := self._nominal._last(piece.start, piece.until)) is not None:
                return at
        return None

    def _count(self, start: datetime, until: datetime) -> int:
        closed = [piece for piece in self.pieces(start, until) if piece.closed]
        return self._nominal._count(start, until) - sum(
            self._nominal._count(piece.start, piece.until) for piece in closed
        )

    def _closed_from(self, start: datetime) -> Iterator[tuple[datetime, datetime]]:
        """The closed ranges that end after `start`, oldest first."""
        for index in range(bisect_right(self._closed, start, key=itemgetter(1)), len(self._closed)):
            yield self._closed[index]


@lru_cache(maxsize=256)
def _ranges_of(dates: tuple[date, ...], zone: ZoneInfo) -> tuple[tuple[datetime, datetime], ...]:
    """The times whose local date is one of these: from the first, until before the second of each pair."""
    ranges: list[tuple[datetime, datetime]] = []
    for day in sorted(dates):
        midnight = datetime(day.year, day.month, day.day)
        # No zone is a day or more from UTC.
        for stretch in stretches(zone, midnight - _DAY):
            if stretch.start >= midnight + 2 * _DAY:
                break
            start = max(stretch.start, midnight - stretch.offset)
            end = min(stretch.end, midnight + _DAY - stretch.offset)
            if start < end:
                ranges.append((start.replace(tzinfo=UTC), end.replace(tzinfo=UTC)))
    joined: list[tuple[datetime, datetime]] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            start = joined.pop()[0]
        joined.append((start, end))
    return tuple(joined)


@lru_cache(maxsize=1024)
def without_dates(nominal: Trigger, dates: tuple[date, ...], zone: ZoneInfo) -> Trigger:
    """A trigger without its scheduled times on these dates, in a zone."""
    return OpenTrigger(nominal, dates, zone)


@lru_cache(maxsize=16_384)
def parse_schedule(text: str, zone: ZoneInfo, **bounds: datetime | None) -> Trigger:
    """The trigger of a schedule's text: a crontab line, `@hourly`, `every 15m` or `at 2027-01-01T08:00:00Z`.

    `bounds` are `starts_at` (inclusive) and `ends_at` (exclusive). Raises InvalidTrigger.
    """
    kind, _, rest = text.strip().partition(" ")
    example = ""
    try:
        if kind == "every":
            example = "every 15m"
            interval = parse_duration(rest.strip())
            if interval < _SECOND or interval % _SECOND:
                raise ValueError(f'"{text}": the interval must be whole seconds, at least one')
            return EveryTrigger(interval, **bounds)
        if kind == "at":
            example = "at 2027-01-01T08:00:00Z"
            return AtTrigger(from_text(rest.strip()), **bounds)
    except ValueError as error:
        raise InvalidTrigger(str(error), field="schedule", fix=f'write it as "{example}"') from error
    if kind.startswith("@"):
        if text.strip() not in NICKNAMES:
            fix = f"use one of {', '.join(NICKNAMES)}"
            raise InvalidTrigger(f'"{text}" is not a schedule', field="schedule", fix=fix)
        text = NICKNAMES[kind]
    return CronTrigger(text, zone, **bounds)


def _whole_second(at: datetime) -> datetime:
    """The naive UTC time, rounded up to a whole second."""
    floor = at.replace(microsecond=0, tzinfo=None)
    return floor + _SECOND if at.microsecond else floor
