"""The schedules in force over all orgs, in pages: from them follows what comes due by hour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, func, select

from worker.store import tables
from worker.store.dialect import all_rows

_schedule, _orgs = tables.schedule, tables.orgs
_definitions, _revisions = tables.definitions, tables.definition_revisions


class Timing(NamedTuple):
    """What decides when a definition is due, as its keys have it."""

    schedule: str
    timezone: str
    starts_at: str | None
    ends_at: str | None


class Timings(NamedTuple):
    """Some definitions by their timing, and the last one of them; None if there are no more."""

    counted: Mapping[Timing, int]
    last: str | None


def timings_for_all_orgs(connection: Connection, until: datetime, after: str | None, limit: int) -> Timings:
    """Definitions whose next run is before `until`, of the `limit` definitions after this one by id."""
    some = select(_schedule.c.definition_id, _schedule.c.next_fire_at)
    if after is not None:
        some = some.where(_schedule.c.definition_id > after)
    page = some.order_by(_schedule.c.definition_id).limit(limit).subquery()
    spec = _revisions.c.spec
    query = (
        select(
            page.c.definition_id,
            page.c.next_fire_at,
            spec["schedule"].as_string().label("schedule"),
            func.coalesce(func.nullif(spec["timezone"].as_string(), ""), _orgs.c.timezone, "UTC").label(
                "timezone"
            ),
            spec["starts_at"].as_string().label("starts_at"),
            spec["ends_at"].as_string().label("ends_at"),
        )
        .join(_definitions, _definitions.c.id == page.c.definition_id)
        .join(_orgs, _orgs.c.id == _definitions.c.org_id)
        .join(
            _revisions,
            (_revisions.c.definition_id == _definitions.c.id)
            & (_revisions.c.revision == _definitions.c.revision),
        )
        .order_by(page.c.definition_id)
        .limit(limit)
    )
    rows = all_rows(connection, query)
    counted = Counter(
        Timing(row["schedule"], row["timezone"], row["starts_at"] or None, row["ends_at"] or None)
        for row in rows
        if row["schedule"] and row["next_fire_at"] is not None and row["next_fire_at"] < until
    )
    return Timings(counted, str(rows[-1]["definition_id"]) if len(rows) == limit else None)
