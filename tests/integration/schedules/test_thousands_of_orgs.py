"""Thousands of orgs with one hourly template: carried in batches, spread over the hour, always the same."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta

from sqlalchemy import select

from tests.fakes.clock import ManualClock
from tests.fakes.timeline import Timeline
from worker.ids import ALL_ORGS
from worker.model.definitions.file import parse_file
from worker.operations.apply import apply
from worker.operations.templates import materialise
from worker.store import tables
from worker.store.database import Database
from worker.store.lists.read import template

ORGS = 3_000
TEMPLATE = '[[template]]\nname = "export"\norgs = "all"\nhandler = "acme.note"\nschedule = "@hourly"\n'


def slots(database: Database) -> dict[str, timedelta]:
    """How long after its instant each definition fires."""
    schedule = tables.schedule
    query = select(schedule.c.definition_id, schedule.c.next_scheduled_for, schedule.c.next_fire_at)
    with database.autocommit() as connection:
        return {id_: fires_at - at for id_, at, fires_at in connection.execute(query)}


def change(timeline: Timeline, text: str) -> int:
    """Apply a template and carry every org to it; how many batches that took."""
    apply(timeline.database, parse_file(text), actor="tester")
    batches = 1
    while materialise(timeline.database).orgs:
        batches += 1
    with timeline.database.autocommit() as connection:
        shown = template(connection, ALL_ORGS, "export")
    assert shown["orgs_done"] == shown["orgs_total"] == ORGS
    return batches


def test_no_second_is_busy_and_no_slot_ever_moves(timeline: Timeline, clock: ManualClock) -> None:
    orgs = "".join(f'[[org]]\ncode = "org_{n}"\nissuer = "main"\n' for n in range(ORGS))
    apply(timeline.database, parse_file(orgs), actor="tester")

    assert change(timeline, TEMPLATE) == ORGS // 200
    first = slots(timeline.database)
    seconds = Counter(spread // timedelta(seconds=1) for spread in first.values())
    assert len(first) == ORGS
    assert max(seconds.values()) < 8

    change(timeline, TEMPLATE + "priority = 1\n")
    url = timeline.database.url_shown
    timeline.close()
    again = Database.open(url, clock=clock)
    try:
        assert slots(again) == first
    finally:
        again.close()
