"""Preview: what `definitions next` shows is what the scheduler inserts, and why an instant would not run."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.fakes.clock import utc
from tests.fakes.timeline import NAME, ORG, Timeline
from worker.model.runs.preview import preview_definition
from worker.operations.definitions import pause_definition
from worker.store.lists import runs as run_lists
from worker.store.lists.read import definition

HOUR = timedelta(hours=1)


def preview(timeline: Timeline, count: int, start: datetime | None = None) -> list[dict[str, Any]]:
    with timeline.database.autocommit() as connection:
        row = definition(connection, ORG, NAME)
        unfinished = run_lists.unfinished(connection, ORG, row["id"])
    return preview_definition(row, unfinished, start, count, now=timeline.clock.now())


@pytest.mark.parametrize(
    ("schedule", "zone", "start"),
    [
        ("30 2 * * *", "Europe/Berlin", "2026-03-01"),
        ("*/20 * * * *", "Europe/Berlin", "2026-03-28"),
        ("*/20 * * * *", "Europe/Berlin", "2026-10-24"),
        ("15 0,1,2,3 * * *", "America/New_York", "2026-03-01"),
        ("0 */6 * * *", "Australia/Lord_Howe", "2026-03-20"),
        ("@hourly", "Africa/Cairo", "2026-04-20"),
    ],
)
def test_hundreds_of_instants_are_those_that_are_inserted(
    timeline: Timeline, schedule: str, zone: str, start: str
) -> None:
    """Across the nights in which clocks change, with a worker that wakes for each instant."""
    timeline.clock.set(utc(start) + timedelta(milliseconds=500))
    timeline.define(timezone=zone, schedule=schedule, overlap="allow", spread="7m")
    shown = preview(timeline, 200)
    changes = {row["local"][-6:] for row in shown}

    timeline.fire_until(shown[-1]["scheduled_for"] + timedelta(minutes=10))

    inserted = timeline.runs()[:200]
    assert [run["scheduled_for"] for run in inserted] == [row["scheduled_for"] for row in shown]
    assert len({run["created_at"] - run["scheduled_for"] for run in inserted}) == 1, "not at its spread"
    assert timeline.skips() == []
    assert len(changes) == 2, "no clock changed"


def test_what_is_due_while_no_worker_is_up_says_what_would_become_of_it(timeline: Timeline) -> None:
    timeline.clock.set(utc("2030-01-01T09:30"))
    timeline.define(schedule="0 * * * *")
    timeline.clock.set(utc("2030-01-01T13:30"))

    shown = preview(timeline, 6)

    assert [(row["scheduled_for"].hour, row["note"]) for row in shown] == [
        (10, "would be skipped: missed"),
        (11, "would be skipped: missed"),
        (12, "would be skipped: missed"),
        (13, "late: as soon as a worker fires it"),
        (14, None),
        (15, None),
    ]
    timeline.fire()
    assert timeline.instants() == [utc("2030-01-01T13:00")]
    assert timeline.skipped() == {"missed": 3}


@pytest.mark.parametrize(
    ("overlap", "note"),
    [
        ("skip", "would be skipped: overlap, if run {run} is still unfinished"),
        ("queue_one", "held behind run {run} if that is still unfinished"),
        ("replace", "replaces run {run} if that is still unfinished"),
        ("allow", None),
    ],
)
def test_the_next_instant_says_what_it_would_meet(timeline: Timeline, overlap: str, note: str | None) -> None:
    timeline.clock.set(utc("2030-01-01T09:30"))
    timeline.define(schedule="0 * * * *", overlap=overlap)
    timeline.fire_until(utc("2030-01-01T10:30"))
    (run,) = timeline.start()

    first, second = preview(timeline, 2)

    assert first["note"] == (note and note.format(run=run.id))
    assert second["note"] is None


def test_with_one_held_the_next_is_skipped(timeline: Timeline) -> None:
    timeline.clock.set(utc("2030-01-01T09:30"))
    timeline.define(schedule="0 * * * *", overlap="queue_one")
    timeline.fire_until(utc("2030-01-01T11:30"))

    (first,) = preview(timeline, 1)

    assert first["note"].startswith("would be skipped: overlap")


def test_spread_is_shown_and_a_pause_and_the_past(timeline: Timeline) -> None:
    timeline.clock.set(utc("2030-01-01T09:30"))
    timeline.define(schedule="@hourly", spread="10m")
    timeline.fire_until(utc("2030-01-01T10:30"))

    decided, following = preview(timeline, 2, start=utc("2030-01-01T10:00"))
    assert decided["note"] == "decided already"
    assert following["note"].startswith("fires ") and following["note"].endswith(
        f" later; would be skipped: overlap, if run {timeline.runs()[0]['id']} is still unfinished"
    )

    pause_definition(timeline.database, ORG, NAME, actor="tester")
    (paused,) = preview(timeline, 1)
    assert paused["note"] == "not due: the definition is paused"
    assert paused["scheduled_for"] == utc("2030-01-01T11:00")


def test_ends_at_ends_it(timeline: Timeline) -> None:
    timeline.clock.set(utc("2030-01-01T09:30"))
    timeline.define(schedule="0 * * * *", ends_at=utc("2030-01-01T12:00"))

    assert [row["scheduled_for"].hour for row in preview(timeline, 10)] == [10, 11]
