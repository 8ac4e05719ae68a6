"""The morning page: what needs attention over all orgs, most harmful first, and the day around now."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from markupsafe import Markup
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.clock import Clock, from_text
from worker.diagnosis.matters import matters
from worker.errors import InvalidTrigger
from worker.features.console.callers import Caller, CallerDatabase, caller_of
from worker.features.console.charts import ChartSeries, bars
from worker.features.console.live_lists import OVERVIEW
from worker.features.console.pages.base import Pages, query
from worker.features.console.pages.links import hour_path, org_path, step_path
from worker.ids import ALL_ORGS
from worker.model.definitions.calendars import read_dates
from worker.model.definitions.triggers import parse_schedule, without_dates
from worker.model.definitions.zones import parse_zone
from worker.model.runs.causes import WHOSE
from worker.store.lists import morning
from worker.store.lists.morning import Timing, timings

# The layers of the chart, from the bottom.
_ENDED = ("succeeded", "skipped", "cancelled", "refused", "failed")
HOUR = timedelta(hours=1)
# The current hour and those after it.
HOURS = 25
# Seconds for which a count is kept.
KEPT = 300.0
# Definitions read by one statement, and those that are counted.
PAGE = 1_000
MAX_DEFINITIONS = 50_000
_TICK = timedelta(microseconds=1)


class MorningPage:
    def __init__(self, pages: Pages, installation: str, hours: EndedByHour) -> None:
        self._pages = pages
        self._installation = installation
        self._hours = hours
        self._due = DueByHour(pages.database, pages.clock)

    def routes(self) -> Sequence[Route]:
        return (Route("/", self._morning),)

    async def _morning(self, request: Request) -> Response:
        caller = caller_of(request)
        query(request)
        if caller.org is not None:
            return RedirectResponse(org_path(caller.org), 303)
        now = self._pages.clock.now()
        due = await self._due.read(caller)

        def work(connection: Connection) -> dict[str, Any]:
            ended = self._hours.read(connection, now)
            return {
                "matters": matters(
                    connection, now, is_admin=caller.role == "admin", installation=self._installation
                ),
                "is_new": not morning.has_orgs(connection, ALL_ORGS),
                "path": step_path,
                "whose": WHOSE,
                "running": morning.running(connection, ALL_ORGS),
                "ended": _ended_chart(ended),
                "due": _due_chart(due, now),
                "due_of": MAX_DEFINITIONS if due.is_part else None,
                "totals": totals(ended),
            }

        return await self._pages.show(request, "morning.html", work, stream=OVERVIEW)


@dataclass(frozen=True, slots=True)
class DueHours:
    """Scheduled times by hour, the first of which `begins` says.

    `is_part` if there are more than MAX_DEFINITIONS definitions.
    """

    by_hour: Mapping[datetime, int]
    begins: datetime
    is_part: bool = False


class DueByHour:
    """The scheduled times of all orgs by hour, counted for all viewers, a few definitions at a time.

    The first viewer of an hour waits for its count; later ones see the last one while the next is made.
    """

    def __init__(self, database: CallerDatabase, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._kept: DueHours | None = None
        self._until = 0.0
        self._counting: asyncio.Task[DueHours] | None = None

    async def read(self, caller: Caller) -> DueHours:
        """The next 24 hours, the rest of the current one included."""
        counting, kept = self._counting, self._kept
        # A count of an earlier hour lacks the last hours.
        is_usable = kept is not None and kept.begins == hour_of(self._clock.now())
        is_over = not is_usable or self._clock.monotonic() >= self._until
        if counting is None or (counting.done() and is_over):
            counting = self._counting = asyncio.create_task(self._count(caller))
            # The next viewer tries again; the database reports its error by itself.
            counting.add_done_callback(lambda task: task.cancelled() or task.exception())
        return kept if kept is not None and is_usable else await asyncio.shield(counting)

    async def _count(self, caller: Caller) -> DueHours:
        now = self._clock.now()
        begins = hour_of(now)
        end = begins + HOUR * HOURS
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
        self._kept = DueHours(total, begins, is_part=after is not None)
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


def last_hours(now: datetime) -> list[datetime]:
    """The last 24 hours, the current one included."""
    return [hour_of(now) - HOUR * back for back in reversed(range(24))]


class EndedByHour:
    """Runs of all orgs that ended by hour and state. Hours that are long over are read once and kept."""

    def __init__(self) -> None:
        self._kept: dict[datetime, Mapping[str, int]] = {}

    def read(self, connection: Connection, now: datetime) -> Mapping[datetime, Mapping[str, int]]:
        """The last 24 hours, the current one included."""
        last, hours, kept = hour_of(now), last_hours(now), self._kept
        # A worker may write the outcomes of the previous hour late.
        missing = [hour for hour in hours if hour not in kept or hour >= last - HOUR]
        found: dict[datetime, dict[str, int]] = {hour: {} for hour in missing}
        counted = morning.ended_by_hour(connection, ALL_ORGS, missing[0], last + HOUR)
        for (hour, state), runs in counted.items():
            if hour in found:
                found[hour][state] = runs
        # Replaced as a whole: pages are made in several threads.
        self._kept = {hour: found.get(hour, kept.get(hour, {})) for hour in hours}
        return self._kept


def _ended_chart(ended: Mapping[datetime, Mapping[str, int]]) -> Markup:
    series = [
        ChartSeries(state, state, [by_state.get(state, 0) for by_state in ended.values()]) for state in _ENDED
    ]
    labels, ticks = _axis(ended)
    return bars(
        series,
        labels,
        title="Runs that ended, by hour (UTC)",
        ticks=ticks,
        links=[hour_path(hour, by_state) for hour, by_state in ended.items()],
    )


def _due_chart(due: DueHours, now: datetime) -> Markup:
    hours = [hour_of(now) + HOUR * ahead for ahead in range(HOURS)]
    labels, ticks = _axis(hours)
    counts = [due.by_hour.get(hour, 0) for hour in hours]
    return bars(
        [ChartSeries("due", "due", counts)],
        labels,
        title="Scheduled times that come due, by hour (UTC)",
        ticks=ticks,
    )


def _axis(hours: Iterable[datetime]) -> tuple[list[str], list[str]]:
    """Labels of all hours, and the ticks of every sixth."""
    known = list(hours)
    ticks = [f"{hour:%H:%M}" if at % 6 == 0 else "" for at, hour in enumerate(known)]
    return [f"{hour:%d %b %H:%M}" for hour in known], ticks


def totals(ended: Mapping[datetime, Mapping[str, int]]) -> dict[str, int]:
    """Runs of the last day by final state."""
    return {state: sum(by_state.get(state, 0) for by_state in ended.values()) for state in _ENDED}
