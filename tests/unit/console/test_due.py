"""How often a schedule is due in each hour, and where the hours lead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import unquote_plus

import pytest

from tests.fakes.clock import ManualClock, settle
from worker.errors import StoreUnavailable
from worker.features.console.callers import Caller
from worker.features.console.pages import morning
from worker.features.console.pages.links import hour_path
from worker.features.console.pages.morning import HOUR, by_hour
from worker.store.lists.morning import Timing, Timings

START = datetime(2030, 3, 30, 12, 30, tzinfo=UTC)
END = datetime(2030, 3, 31, 13, tzinfo=UTC)


def at(day: int, hour: int) -> datetime:
    return datetime(2030, 3, day, hour, tzinfo=UTC)


def counted(
    schedule: str, zone: str = "UTC", starts: str | None = None, ends: str | None = None
) -> Mapping[datetime, int]:
    return by_hour(Timing(schedule, zone, starts, ends), START, END)


def test_a_frequent_schedule_counts_all_its_times_in_each_hour():
    found = counted("every 5s")

    assert set(found) == {at(30, 12) + HOUR * ahead for ahead in range(25)}
    # Half of the first hour is over.
    assert (found[at(30, 12)], found[at(30, 13)], found[at(31, 12)]) == (360, 720, 720)


def test_a_rare_schedule_counts_in_its_zone_and_within_its_bounds():
    # 02:30 does not exist that night in Berlin and fires after the gap, at 01:00 UTC.
    assert counted("30 2 * * *", "Europe/Berlin") == {at(31, 1): 1}
    assert counted("0 * * * *", "UTC", "2030-03-31T00:00:00Z", "2030-03-31T02:00:00Z") == {
        at(31, 0): 1,
        at(31, 1): 1,
    }


def test_the_dates_of_a_calendar_do_not_count():
    timing = Timing("0 * * * *", "Europe/Berlin", None, None, '["2030-03-31"]')

    # Berlin's 31 March begins at 23:00 UTC.
    assert by_hour(timing, START, END) == {at(30, hour): 1 for hour in range(13, 23)}


def test_a_schedule_of_another_release_counts_as_nothing():
    assert counted("fortnightly") == {}
    assert counted("0 * * * *", "Mars/Olympus") == {}


def test_an_hour_leads_to_the_harmed_runs_made_in_it_in_utc():
    assert unquote_plus(hour_path(at(30, 13), {"succeeded": 3})) == (
        "/search?q=since:2030-03-30T13:00Z until:2030-03-30T14:00Z"
    )
    assert "q=state:failed,refused since:" in unquote_plus(hour_path(at(30, 13), {"refused": 1, "failed": 2}))


class FakeDatabase:
    """Two pages of definitions; each read fails while `is_down`."""

    def __init__(self) -> None:
        self.reads = 0
        self.is_down = False

    async def read(self, caller: Any, work: Callable[[Any], Any]) -> Any:
        self.reads += 1
        await asyncio.sleep(0)
        if self.is_down:
            raise StoreUnavailable("it is down")
        return work(None)


async def test_a_count_is_kept_and_shown_while_the_next_one_is_made(monkeypatch: pytest.MonkeyPatch):
    def page(connection: Any, scope: Any, until: datetime, after: str | None, limit: int) -> Timings:
        return Timings({Timing("0 * * * *", "UTC", None, None): 2}, "1" if after is None else None)

    monkeypatch.setattr(morning, "timings", page)
    database, clock, caller = FakeDatabase(), ManualClock(START), Caller("ada", "viewer")
    hours = morning.DueByHour(database, clock)  # type: ignore[arg-type]

    database.is_down = True
    with pytest.raises(StoreUnavailable):
        await hours.read(caller)
    database.is_down = False
    first, same = await asyncio.gather(hours.read(caller), hours.read(caller))
    assert first is same
    assert (first.by_hour[at(30, 13)], first.is_part, database.reads) == (4, False, 3)

    clock.advance(timedelta(seconds=morning.KEPT))
    database.is_down = True
    assert await hours.read(caller) is first
    await settle()
    database.is_down = False
    assert await hours.read(caller) is first
    await settle()
    assert await hours.read(caller) is not first


async def test_the_first_viewer_of_a_morning_does_not_see_the_count_of_the_evening_before(
    monkeypatch: pytest.MonkeyPatch,
):
    hourly = Timings({Timing("0 * * * *", "UTC", None, None): 1}, None)
    monkeypatch.setattr(morning, "timings", lambda *_: hourly)
    clock, caller = ManualClock(START), Caller("ada", "viewer")
    hours = morning.DueByHour(FakeDatabase(), clock)  # type: ignore[arg-type]
    await hours.read(caller)

    clock.advance(HOUR * 20)

    due = await hours.read(caller)
    assert due.by_hour[at(31, 9)] == due.by_hour[at(31, 23)] == 1
