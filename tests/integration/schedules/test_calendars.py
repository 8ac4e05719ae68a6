"""Calendars on a timeline: what falls on their dates is a skip, and a change settles like an edit."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.fakes.clock import utc
from tests.fakes.timeline import NAME, ORG, Timeline
from worker.diagnosis.why import why_time
from worker.model.definitions.file import parse_file
from worker.model.runs.clauses import clauses
from worker.model.runs.preview import preview_definition
from worker.operations.apply import apply
from worker.operations.definitions import edit_definition
from worker.store.lists.read import definition

pytestmark = pytest.mark.feature("calendars")

HOUR = timedelta(hours=1)


def calendar(timeline: Timeline, *dates: str, name: str = "holidays") -> list[Any]:
    text = f'[[calendar]]\nname = "{name}"\ndates = {list(dates)}\n'
    return apply(timeline.database, parse_file(text), actor="tester")


def reasons(timeline: Timeline) -> dict[str, tuple[str, int]]:
    return {f"{row['skipped_from']:%m-%dT%H}": (row["reason"], row["count"]) for row in timeline.skips()}


def test_nothing_runs_on_the_dates_of_the_definitions_zone(timeline: Timeline) -> None:
    timeline.clock.set(utc("2026-12-24T20:30"))
    calendar(timeline, "2026-12-25")
    timeline.define(schedule="0 * * * *", overlap="allow", calendar="holidays", timezone="Europe/Berlin")

    timeline.fire_until(utc("2026-12-26T00:30"))

    assert timeline.instants() == [
        *(utc("2026-12-24T21:00") + HOUR * n for n in range(2)),
        *(utc("2026-12-25T23:00") + HOUR * n for n in range(2)),
    ]
    # Each time is decided when it comes; they grow into one row a day.
    assert reasons(timeline) == {"12-24T23": ("calendar", 1), "12-25T00": ("calendar", 23)}


def test_a_changed_calendar_settles_what_was_due_by_the_old_one(timeline: Timeline) -> None:
    """No worker was up: the times until the change are decided by the dates that were in force."""
    timeline.clock.set(utc("2026-12-25T00:30"))
    calendar(timeline, "2026-12-25")
    timeline.define(schedule="0 * * * *", overlap="allow", calendar="holidays", misfire="all")
    timeline.clock.set(utc("2026-12-25T03:30"))

    [of_calendar, of_definition] = calendar(timeline, "2026-12-26")
    timeline.fire_until(utc("2026-12-26T01:30"))

    assert (of_calendar.kind, of_calendar.action) == ("calendar", "change")
    assert of_calendar.fields == {"dates": (["2026-12-25"], ["2026-12-26"])}
    assert (of_definition.kind, of_definition.org, of_definition.name) == ("definition", ORG, NAME)
    assert of_definition.fields == {"calendar_dates": (["2026-12-25"], ["2026-12-26"])}
    assert timeline.instants() == [utc("2026-12-25T04:00") + HOUR * n for n in range(20)]
    assert reasons(timeline) == {"12-25T01": ("calendar", 3), "12-26T00": ("calendar", 2)}
    assert timeline.accounted() == {utc("2026-12-25").date(): 23, utc("2026-12-26").date(): 2}


def test_an_edit_takes_a_calendar_and_drops_it(timeline: Timeline) -> None:
    timeline.clock.set(utc("2026-12-25T00:30"))
    calendar(timeline, "2026-12-25")
    timeline.define(schedule="0 * * * *", overlap="allow")
    edit_definition(timeline.database, ORG, NAME, {"calendar": "holidays"}, actor="tester")
    timeline.fire_until(utc("2026-12-25T01:30"))
    edit_definition(timeline.database, ORG, NAME, {"priority": 1}, actor="tester")
    timeline.fire_until(utc("2026-12-25T02:30"))
    edit_definition(timeline.database, ORG, NAME, {"calendar": None}, actor="tester")
    timeline.fire_until(utc("2026-12-25T03:30"))

    assert reasons(timeline) == {"12-25T01": ("calendar", 1), "12-25T02": ("calendar", 1)}
    assert timeline.instants() == [utc("2026-12-25T03:00")]


def test_the_preview_says_what_the_calendar_will_skip(timeline: Timeline) -> None:
    timeline.clock.set(utc("2026-12-23T12:00"))
    calendar(timeline, "2026-12-25", "2026-12-26")
    timeline.define(schedule="0 3 * * *", calendar="holidays")
    with timeline.database.autocommit() as connection:
        shown = preview_definition(definition(connection, ORG, NAME), [], None, 4, now=timeline.clock.now())

    assert [(row["scheduled_for"].day, row["note"]) for row in shown] == [
        (24, None),
        (25, "would be skipped: calendar holidays"),
        (26, "would be skipped: calendar holidays"),
        (27, None),
    ]


def test_why_names_the_calendar_before_and_after(timeline: Timeline) -> None:
    timeline.clock.set(utc("2026-12-24T12:00"))
    calendar(timeline, "2026-12-25")
    timeline.define(schedule="0 3 * * *", calendar="holidays", timezone="Asia/Tokyo")
    at = utc("2026-12-24T18:00")

    def why() -> Any:
        with timeline.database.autocommit() as connection:
            return why_time(connection, ORG, NAME, at, now=timeline.clock.now())

    assert "it will be skipped, since its date is in the calendar holidays" in clauses(why()).cause
    timeline.fire_until(utc("2026-12-24T19:00"))
    # The reason stays right when the calendar has changed.
    calendar(timeline, "2027-12-25")

    assert clauses(why()).cause == "2026-12-25, its date in Asia/Tokyo, is in the calendar holidays"
    assert why().run["reason"] == "calendar"
