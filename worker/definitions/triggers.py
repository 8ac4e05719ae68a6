"""Crontab: the wall times that five fields, or six with leading seconds, name; cronsim reads the fields."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from itertools import takewhile
from typing import cast
from zoneinfo import ZoneInfo

from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.date import DateTrigger
from apscheduler.triggers.interval import IntervalTrigger
from cronsim import CronSim, CronSimError

from worker.clock import EPOCH, from_text
from worker.definitions.units import parse_duration
from worker.definitions.zones import Stretch, stretches
from worker.errors import InvalidTrigger

_DAY = timedelta(days=1)
# 29 February on one certain weekday comes back within 40 years, across 2100.
_YEARS = 50


class Crontab:
    """A parsed crontab line, asked about naive wall times of whole seconds.

    `elapsed` is true where minute or hour begins with `*`: such a schedule follows
    elapsed time through a clock change (Debian's crontab(5)).
    """

    __slots__ = ("_fields", "_minutes", "_months", "_seconds", "elapsed")

    def __init__(self, text: str) -> None:
        """Raises InvalidTrigger where a field cannot be read, or no day ever matches."""
        self._fields = _parse(text)
        self.elapsed = any(part.startswith("*") for part in self._fields.parts[1:3])
        self._seconds = tuple(sorted(self._fields.seconds))
        self._minutes = _minutes_of_day(frozenset(self._fields.hours), frozenset(self._fields.minutes))
        self._months = self._fields.months
        if self._next_day(date(2000, 1, 1)) is None:
            raise _never_fires(text)

    def next(self, wall: datetime) -> datetime | None:
        """The first matching wall time at or after `wall`."""
        day: date | None = wall.date()
        if self._matches(cast(date, day)):
            second = self._at_or_after(_second_of_day(wall))
            if second is not None:
                return _wall(cast(date, day), second)
        day = self._next_day(cast(date, day) + _DAY)
        return None if day is None else _wall(day, self._minutes[0] * 60 + self._seconds[0])

    def last(self, floor: datetime, wall: datetime) -> datetime | None:
        """The last matching wall time at or before `wall`, not before `floor`."""
        day, first_day = wall.date(), floor.date()
        second: int | None = _second_of_day(wall)
        while day >= first_day:
            if self._matches(day):
                second = self._at_or_before(24 * 3600 if second is None else second)
                if second is not None:
                    found = _wall(day, second)
                    return found if found >= floor else None
            day, second = day - _DAY, None
        return None

    def count(self, start: datetime, end: datetime) -> int:
        """How many wall times match from `start` to `end`, both included; the work is by days."""
        if start > end:
            return 0
        each_day = len(self._minutes) * len(self._seconds)
        day, last_day, total = start.date(), end.date(), 0
        if self._matches(day):
            total -= self._up_to(_second_of_day(start) - 1)
        while day < last_day:
            if self._matches(day):
                total += each_day
            day += _DAY
        if self._matches(last_day):
            total += self._up_to(_second_of_day(end))
        return total

    def _matches(self, day: date) -> bool:
        return day.month in self._months and self._fields.match_day(day)

    def _next_day(self, day: date) -> date | None:
        give_up = day.year + _YEARS
        while day.year <= give_up:
            if day.month not in self._months:
                day = (day.replace(day=1) + timedelta(days=32)).replace(day=1)
            elif self._fields.match_day(day):
                return day
            else:
                day += _DAY
        return None

    def _at_or_after(self, second: int) -> int | None:
        minute, rest = divmod(second, 60)
        place = bisect_left(self._minutes, minute)
        if place < len(self._minutes) and self._minutes[place] == minute:
            if rest <= self._seconds[-1]:
                return minute * 60 + self._seconds[bisect_left(self._seconds, rest)]
            place += 1
        return self._minutes[place] * 60 + self._seconds[0] if place < len(self._minutes) else None

    def _at_or_before(self, second: int) -> int | None:
        minute, rest = divmod(second, 60)
        place = bisect_right(self._minutes, minute)
        if place and self._minutes[place - 1] == minute:
            if rest >= self._seconds[0]:
                return minute * 60 + self._seconds[bisect_right(self._seconds, rest) - 1]
            place -= 1
        return self._minutes[place - 1] * 60 + self._seconds[-1] if place else None

    def _up_to(self, second: int) -> int:
        minute, rest = divmod(second, 60)
        place = bisect_left(self._minutes, minute)
        total = place * len(self._seconds)
        if place < len(self._minutes) and self._minutes[place] == minute:
            total += bisect_right(self._seconds, rest)
        return total


def _parse(text: str) -> CronSim:
    try:
        return CronSim(text, datetime(2000, 1, 1))
    except CronSimError as error:
        problem, parts = str(error), text.split()
        if "day-of-month" in problem and _reads(" ".join([*parts[:-2], "*", parts[-1]])):
            # Only day and month together are at fault, such as 30 February.
            raise _never_fires(text) from error
        raise InvalidTrigger(
            f"{text!r} is no crontab line: {problem[:1].lower()}{problem[1:]}",
            field="schedule",
            fix='write five fields, such as "0 3 * * *", or six with leading seconds',
        ) from error


def _reads(text: str) -> bool:
    try:
        CronSim(text, datetime(2000, 1, 1))
    except CronSimError:
        return False
    return True


def _never_fires(text: str) -> InvalidTrigger:
    return InvalidTrigger(
        f"{text!r} can never fire: no such day ever comes",
        field="schedule",
        fix="correct its day of month, month or day of week",
    )


@lru_cache(maxsize=4096)
def _minutes_of_day(hours: frozenset[int], minutes: frozenset[int]) -> tuple[int, ...]:
    return tuple(sorted(hour * 60 + minute for hour in hours for minute in minutes))


def _second_of_day(wall: datetime) -> int:
    return wall.hour * 3600 + wall.minute * 60 + wall.second


def _wall(day: date, second: int) -> datetime:
    return datetime(day.year, day.month, day.day, second // 3600, second // 60 % 60, second % 60)


NICKNAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_SECOND = timedelta(seconds=1)
_INSTANT = timedelta(microseconds=1)


class Trigger(BaseTrigger):  # type: ignore[misc]
    """The instants a schedule names, all aware UTC, within `starts_at` and `ends_at` (exclusive)."""

    def __init__(self, starts_at: datetime | None, ends_at: datetime | None) -> None:
        self.starts_at = starts_at
        self.ends_at = ends_at

    def after(self, instant: datetime, *, inclusive: bool = False) -> datetime | None:
        """The first instant after `instant`, or at it where `inclusive`."""
        start = instant if inclusive else instant + _INSTANT
        if self.starts_at is not None:
            start = max(start, self.starts_at)
        found = self._next(start)
        return None if found is None or (self.ends_at is not None and found >= self.ends_at) else found

    def last(self, start: datetime, until: datetime) -> datetime | None:
        """The newest instant from `start` to `until`, both included."""
        start, until = self._within(start, until)
        return self._last(start, until) if start <= until else None

    def count(self, start: datetime, until: datetime) -> int:
        """How many instants lie from `start` to `until`, both included, without walking them."""
        start, until = self._within(start, until)
        return self._count(start, until) if start <= until else 0

    def between(self, start: datetime, until: datetime) -> Iterator[datetime]:
        """The instants from `start` to `until`, both included, oldest first."""
        return takewhile(lambda instant: instant <= until, self.instants(start))

    def instants(self, start: datetime) -> Iterator[datetime]:
        """All instants at or after `start`, oldest first."""
        instant = self.after(start, inclusive=True)
        while instant is not None:
            yield instant
            instant = self.after(instant)

    def newest(self, start: datetime, until: datetime, count: int) -> datetime | None:
        """The oldest of the newest `count` instants from `start` to `until`, both included."""
        if count < 1:
            return None
        if self.count(start, until) > count:
            # The latest whole second from which more than `count` are left; they are counted, never walked.
            low, high = start, until
            while high - low > _SECOND:
                middle = low + (high - low) / 2
                if self.count(middle, until) > count:
                    low = middle
                else:
                    high = middle
            start = low
            while self.count(start, until) > count:
                start = (self.after(start, inclusive=True) or until) + _INSTANT
        oldest = self.after(start, inclusive=True)
        return oldest if oldest is not None and oldest <= until else None

    def period(self, instant: datetime) -> timedelta | None:
        """From `instant` to the schedule's next, whatever `ends_at`; None where there is no next."""
        found = self._next(instant + _INSTANT)
        return None if found is None else found - instant

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        """APScheduler's question: the next instant after the previous one, else from now on."""
        if previous_fire_time is not None:
            return self.after(previous_fire_time.astimezone(UTC))
        return self.after(now.astimezone(UTC), inclusive=True)

    def _within(self, start: datetime, until: datetime) -> tuple[datetime, datetime]:
        if self.starts_at is not None:
            start = max(start, self.starts_at)
        if self.ends_at is not None:
            until = min(until, self.ends_at - _INSTANT)
        return start, until

    @abstractmethod
    def _next(self, start: datetime) -> datetime | None:
        """The first instant at or after `start`."""

    @abstractmethod
    def _last(self, start: datetime, until: datetime) -> datetime | None:
        """The newest instant from `start` to `until`."""

    @abstractmethod
    def _count(self, start: datetime, until: datetime) -> int:
        """How many instants lie from `start` to `until`."""


class CronTrigger(Trigger):
    """A crontab line in a zone."""

    def __init__(
        self, text: str, zone: ZoneInfo, starts_at: datetime | None = None, ends_at: datetime | None = None
    ) -> None:
        super().__init__(starts_at, ends_at)
        self.crontab = Crontab(text)
        self.zone = zone

    def _next(self, start: datetime) -> datetime | None:
        at = _whole_second(start)
        for stretch in stretches(self.zone, at):
            if stretch.start >= at and self._leapt_over(stretch):
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
            if stretch.start >= at and self._leapt_over(stretch):
                return stretch.start.replace(tzinfo=UTC)
        return None

    def _count(self, start: datetime, until: datetime) -> int:
        at = _whole_second(start)
        total = 0
        for stretch in self._stretches(start, until):
            first, last = self._first_wall(stretch, at), self._last_wall(stretch, until)
            total += self.crontab.count(first, last)
            if stretch.start >= at and self._leapt_over(stretch):
                total += self.crontab.next(first) != first
        return total

    def _stretches(self, start: datetime, until: datetime) -> list[Stretch]:
        begin, end = start.replace(tzinfo=None), until.replace(tzinfo=None)
        return list(takewhile(lambda stretch: stretch.start <= end, stretches(self.zone, begin)))

    def _leapt_over(self, stretch: Stretch) -> bool:
        """Whether the gap at the start of this stretch swallowed a wall time that fires after it."""
        if self.crontab.elapsed or stretch.offset <= stretch.before:
            return False
        wall = self.crontab.next(stretch.start + stretch.before)
        return wall is not None and wall < stretch.start + stretch.offset

    def _first_wall(self, stretch: Stretch, at: datetime) -> datetime:
        wall = max(stretch.start, at) + stretch.offset
        if not self.crontab.elapsed and stretch.offset < stretch.before:
            # The fold: what came at its first pass does not come again.
            wall = max(wall, stretch.start + stretch.before)
        return wall

    def _last_wall(self, stretch: Stretch, until: datetime) -> datetime:
        last = min(until.replace(microsecond=0, tzinfo=None), stretch.end - _SECOND)
        return last + stretch.offset


class EveryTrigger(Trigger):
    """Whole multiples of an interval since 1970-01-01T00:00:00Z, whatever the zone."""

    def __init__(
        self, interval: timedelta, starts_at: datetime | None = None, ends_at: datetime | None = None
    ) -> None:
        super().__init__(starts_at, ends_at)
        self.interval = interval
        self._multiples = IntervalTrigger(seconds=interval // _SECOND, start_date=EPOCH, timezone=UTC)

    def _next(self, start: datetime) -> datetime | None:
        # Whole seconds: APScheduler reckons in floats, which are exact for them.
        at = _whole_second(start).replace(tzinfo=UTC)
        found: datetime = self._multiples.get_next_fire_time(None, max(at, EPOCH))
        return found

    def _last(self, start: datetime, until: datetime) -> datetime | None:
        found = EPOCH + (until - EPOCH) // self.interval * self.interval
        return found if found >= start else None

    def _count(self, start: datetime, until: datetime) -> int:
        return (until - EPOCH) // self.interval - (start - EPOCH - _INSTANT) // self.interval


class AtTrigger(Trigger):
    """One instant."""

    def __init__(
        self, at: datetime, starts_at: datetime | None = None, ends_at: datetime | None = None
    ) -> None:
        super().__init__(starts_at, ends_at)
        self._date = DateTrigger(run_date=at, timezone=UTC)

    def _next(self, start: datetime) -> datetime | None:
        at: datetime = self._date.get_next_fire_time(None, start)
        return at if at >= start else None

    def _last(self, start: datetime, until: datetime) -> datetime | None:
        at = self._next(start)
        return at if at is not None and at <= until else None

    def _count(self, start: datetime, until: datetime) -> int:
        return int(self._last(start, until) is not None)


@lru_cache(maxsize=16_384)
def parse_schedule(
    text: str, zone: ZoneInfo, *, starts_at: datetime | None = None, ends_at: datetime | None = None
) -> Trigger:
    """The trigger of a schedule's text: a crontab line, `@hourly`, `every 15m` or `at 2027-01-01T08:00:00Z`.

    Raises:
        InvalidTrigger: the text is none of these, or can never fire.
    """
    kind, _, rest = text.strip().partition(" ")
    if kind == "every":
        return EveryTrigger(_interval(text, rest.strip()), starts_at, ends_at)
    if kind == "at":
        return AtTrigger(_instant(rest.strip()), starts_at, ends_at)
    if kind.startswith("@"):
        if text.strip() not in NICKNAMES:
            raise InvalidTrigger(
                f"{text!r} is no schedule", field="schedule", fix=f"known are {', '.join(NICKNAMES)}"
            )
        return CronTrigger(NICKNAMES[kind], zone, starts_at, ends_at)
    return CronTrigger(text, zone, starts_at, ends_at)


def _interval(text: str, rest: str) -> timedelta:
    try:
        interval = parse_duration(rest)
    except ValueError as error:
        raise InvalidTrigger(str(error), field="schedule", fix='write it as "every 15m"') from error
    if interval < _SECOND or interval % _SECOND:
        raise InvalidTrigger(
            f"{text!r} is no interval of whole seconds", field="schedule", fix='write it as "every 15m"'
        )
    return interval


def _instant(rest: str) -> datetime:
    try:
        return from_text(rest)
    except ValueError as error:
        raise InvalidTrigger(
            str(error), field="schedule", fix='write it as "at 2027-01-01T08:00:00Z"'
        ) from error


def _whole_second(instant: datetime) -> datetime:
    """The naive UTC instant, rounded up to a whole second."""
    floor = instant.replace(microsecond=0, tzinfo=None)
    return floor + _SECOND if instant.microsecond else floor
