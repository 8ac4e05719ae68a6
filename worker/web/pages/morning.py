"""The morning page: what needs attention over all orgs, most harmful first, and the day around now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from markupsafe import Markup
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.ids import ALL_ORGS
from worker.operations.matters import matters
from worker.runs.causes import WHOSE
from worker.store.lists import morning
from worker.web.charts import ChartSeries, bars
from worker.web.pages.base import Pages, caller_of, query
from worker.web.pages.due import HOUR, HOURS, MAX_DEFINITIONS, DueByHour, DueHours, hour_of
from worker.web.pages.links import hour_path, org_path, step_path

# The layers of the chart, from the bottom.
_ENDED = ("succeeded", "skipped", "cancelled", "refused", "failed")


class MorningPage:
    def __init__(self, pages: Pages, installation: str) -> None:
        self._pages = pages
        self._installation = installation
        self._hours = EndedByHour()
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
                "path": step_path,
                "whose": WHOSE,
                "running": morning.running(connection, ALL_ORGS),
                "ended": _ended_chart(ended),
                "due": _due_chart(due, now),
                "due_of": MAX_DEFINITIONS if due.is_part else None,
                "totals": _totals(ended),
            }

        return await self._pages.show(request, "morning.html", work)


class EndedByHour:
    """Runs that ended by hour and state. Hours that are long over are read once and kept."""

    def __init__(self) -> None:
        self._kept: dict[datetime, Mapping[str, int]] = {}

    def read(self, connection: Connection, now: datetime) -> Mapping[datetime, Mapping[str, int]]:
        """The last 24 hours, the current one included."""
        last = hour_of(now)
        hours = [last - HOUR * back for back in reversed(range(24))]
        kept = self._kept
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


def _totals(ended: Mapping[datetime, Mapping[str, int]]) -> dict[str, int]:
    """Runs of the last day by final state."""
    return {state: sum(by_state.get(state, 0) for by_state in ended.values()) for state in _ENDED}
