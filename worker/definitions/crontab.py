"""Crontab: the wall times that five fields, or six with leading seconds, name; cronsim reads the fields."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from datetime import date, datetime, timedelta
from functools import lru_cache
from typing import cast

from cronsim import CronSim, CronSimError

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
