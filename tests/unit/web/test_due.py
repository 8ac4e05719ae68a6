"""How often a schedule is due in each hour, and where the hours lead."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import unquote_plus

from worker.store.lists.due import Timing
from worker.web.pages.due import HOUR, by_hour
from worker.web.pages.morning import hour_path

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


def test_a_schedule_of_another_release_counts_as_nothing():
    assert counted("fortnightly") == {}
    assert counted("0 * * * *", "Mars/Olympus") == {}


def test_an_hour_leads_to_the_harmed_runs_made_in_it_in_utc():
    assert unquote_plus(hour_path(at(30, 13), {"succeeded": 3})) == (
        "/search?q=since:2030-03-30T13:00Z until:2030-03-30T14:00Z"
    )
    assert "q=state:failed,refused since:" in unquote_plus(hour_path(at(30, 13), {"refused": 1, "failed": 2}))
