"""How many scheduled times come due in each of the next hours, over all orgs."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection

from worker.clock import Clock, from_text
from worker.definitions.calendars import read_dates
from worker.definitions.triggers import parse_schedule, without_dates
from worker.definitions.zones import parse_zone
from worker.errors import InvalidTrigger
from worker.ids import ALL_ORGS
from worker.store.lists.morning import Timing, timings
from worker.web.callers import Caller, CallerDatabase

HOUR = timedelta(hours=1)
# The current hour and those after it.
HOURS = 25
# Seconds for which a count is kept.
KEPT = 300.0
# Definitions read by one statement, and those that are counted.
PAGE = 1_000
MAX_DEFINITIONS = 50_000
_TICK = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class DueHours:
    """Scheduled times by hour; `is_part` if there are more than MAX_DEFINITIONS definitions."""

    by_hour: Mapping[datetime, int]
    is_part: bool = False


class DueByHour:
    """Counted for all viewers, a few definitions at a time.

    The first viewer waits for the first count; later ones see the last one while the next is made.
    """

    def __init__(self, database: CallerDatabase, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._kept: DueHours | None = None
        self._until = 0.0
        self._counting: asyncio.Task[DueHours] | None = None

    async def read(self, caller: Caller) -> DueHours:
        """The next 24 hours, the rest of the current one included."""
        counting = self._counting
        if counting is None or (counting.done() and self._clock.monotonic() >= self._until):
            counting = self._counting = asyncio.create_task(self._count(caller))
            # The next viewer tries again; the database reports its error by itself.
            counting.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(counting) if self._kept is None else self._kept

    async def _count(self, caller: Caller) -> DueHours:
        now = self._clock.now()
        end = hour_of(now) + HOUR * HOURS
        hours: dict[Timing, Mapping[datetime, int]] = {}
        total: Counter[datetime] = Counter()
        after: str | None = None

        def add_page(connection: Connection) -> str | None:
            counted, last = timings(connection, ALL_ORGS, end, after, PAGE)
            for timing, definitions in counted.items():
                if timing not in hours:
                    hours[timing] = by_hour(timing, now, end)
                for hour, times in hours[timing].items():
                    total[hour] += times * definitions
            return last

        for _ in range(MAX_DEFINITIONS // PAGE):
            # Each page gives the database's thread back.
            after = await self._database.read(caller, add_page)
            if after is None:
                break
        self._kept = DueHours(total, is_part=after is not None)
        self._until = self._clock.monotonic() + KEPT
        return self._kept


def by_hour(timing: Timing, start: datetime, end: datetime) -> Mapping[datetime, int]:
    """How often one definition with this timing is due in [start, end), by hour."""
    try:
        bounds = {name: at and from_text(at) for name, at in timing._asdict().items() if name.endswith("_at")}
        zone = parse_zone(timing.timezone)
        trigger = parse_schedule(timing.schedule, zone, **bounds)
        if timing.calendar_dates:
            trigger = without_dates(trigger, read_dates(json.loads(timing.calendar_dates)), zone)
    except (InvalidTrigger, ValueError):
        # Of another release: its worker reports it.
        return {}
    last = end - _TICK
    if trigger.count(start, last) <= HOURS:
        return Counter(hour_of(at) for at in trigger.between(start, last))
    first = hour_of(start)
    hours = [first + HOUR * ahead for ahead in range(round((end - first) / HOUR))]
    return {hour: trigger.count(max(hour, start), hour + HOUR - _TICK) for hour in hours}


def hour_of(at: datetime) -> datetime:
    return at.replace(minute=0, second=0, microsecond=0)
