"""The schedules in force over all orgs, in pages: from them follows what comes due by hour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, func, select

from worker.ids import Scope
from worker.store import tables
from worker.store.dialect import above, all_rows, in_scope

_schedule, _orgs = tables.schedule, tables.orgs
_definitions, _revisions = tables.definitions, tables.definition_revisions
# Between the keys of a timing, in one text: no key of a definition has it.
_BETWEEN = "\x1f"


class Timing(NamedTuple):
    """What decides when a definition is due, as its keys have it."""

    schedule: str
    timezone: str
    starts_at: str | None
    ends_at: str | None
    calendar_dates: str | None = None
    """As JSON."""


class Timings(NamedTuple):
    """Some definitions by their timing, and the last one of them; None if there are no more."""

    counted: Mapping[Timing, int]
    last: str | None


def timings(connection: Connection, scope: Scope, until: datetime, after: str | None, limit: int) -> Timings:
    """Definitions whose next run is before `until`, of the `limit` definitions after this one by id."""
    # By their keys: as joins, PostgreSQL would read all definitions for each page.
    current = select(_definitions.c.revision).where(_definitions.c.id == _schedule.c.definition_id)
    keys = [func.coalesce(_revisions.c.spec[key].as_string(), "") for key in Timing._fields]
    written: ColumnElement[str] = keys[0]
    for key in keys[1:]:
        written = written + _BETWEEN + key
    timing_of = (
        select(written)
        .where(
            _revisions.c.definition_id == _schedule.c.definition_id,
            _revisions.c.revision == current.correlate(_schedule).scalar_subquery(),
        )
        .correlate(_schedule)
        .scalar_subquery()
    )
    zone = select(_orgs.c.timezone).where(_orgs.c.id == _schedule.c.org_id).scalar_subquery()
    query = select(
        _schedule.c.definition_id, _schedule.c.next_fire_at, timing_of.label("timing"), zone.label("zone")
    ).where(*in_scope(_schedule.c.org_id, scope), *above(_schedule.c.definition_id, after))
    rows = all_rows(connection, query.order_by(_schedule.c.definition_id).limit(limit))
    counted: Counter[Timing] = Counter()
    for row in rows:
        if row["timing"] and row["next_fire_at"] is not None and row["next_fire_at"] < until:
            schedule, timezone, *rest = row["timing"].split(_BETWEEN)
            timing = Timing(schedule, timezone or row["zone"] or "UTC", *(text or None for text in rest))
            counted[timing] += bool(schedule)
    return Timings(+counted, str(rows[-1]["definition_id"]) if len(rows) == limit else None)
