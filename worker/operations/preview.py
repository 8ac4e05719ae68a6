"""The next instants of a schedule, from the very code that fires, and what is particular about each."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from worker.definitions.definition import from_spec
from worker.definitions.spread import spread_of
from worker.definitions.triggers import Trigger, parse_schedule
from worker.definitions.units import format_duration
from worker.definitions.zones import parse_zone
from worker.errors import UsageError
from worker.store import definitions, orgs
from worker.store.database import Database

Row = dict[str, Any]

MOST = 10_000


def preview(
    database: Database, org: str, name: str, *, start: datetime | None = None, count: int = 10
) -> list[Row]:
    """The next instants of a stored definition: `scheduled_for`, `local` (in its zone) and a `note`.

    From `start` (now, if not given); what is stored as next comes first. A definition
    that is stopped shows what would be due, and says why it is not.

    Raises:
        NotFound: there is no such org or definition.
        UsageError: a count that is none.
    """
    with database.autocommit() as connection:
        org_id = orgs.require(connection, org)["id"]
        row = definitions.require(connection, org_id, org, name)
        now = database.now(connection)
    definition = from_spec(org, name, row["spec"])
    trigger = definition.trigger(row["org_timezone"])
    spread = spread_of(org, name, definition.schedule, trigger, definition.spread)
    since = start or row["next_scheduled_for"] or now
    zone = parse_zone(definition.timezone or row["org_timezone"] or "UTC")
    return _rows(trigger, zone, since, count, spread, _stopped(row))


def preview_schedule(schedule: str, timezone: str, *, start: datetime, count: int = 10) -> list[Row]:
    """As `preview`, of a schedule's text that is stored nowhere.

    Raises:
        InvalidTrigger: a schedule or zone that cannot be read.
        UsageError: a count that is none.
    """
    zone = parse_zone(timezone)
    return _rows(parse_schedule(schedule, zone), zone, start, count, timedelta(0), "")


def _rows(
    trigger: Trigger, zone: ZoneInfo, since: datetime, count: int, spread: timedelta, stopped: str
) -> list[Row]:
    if not 1 <= count <= MOST:
        raise UsageError(f"{count} is not between 1 and {MOST}")
    rows: list[Row] = []
    for instant in trigger.instants(since.astimezone(UTC)):
        local = instant.astimezone(zone)
        notes = [stopped, f"starts {format_duration(spread)} later" if spread else "", _change(local, zone)]
        rows.append(
            {
                "scheduled_for": instant,
                "local": local.isoformat(),
                "note": "; ".join(note for note in notes if note),
            }
        )
        if len(rows) == count:
            break
    return rows


def _stopped(row: Row) -> str:
    if row["org_state"] != "active":
        return f"not due: its org is {row['org_state']}"
    if row["closed_at"] is not None:
        return "not due: closed"
    if row["paused_at"] is not None:
        return f"not due: paused by {row['paused_by']}"
    return "" if row["enabled"] else "not due: not enabled"


def _change(local: datetime, zone: ZoneInfo) -> str:
    """Whether clocks change at this instant or make its wall time ambiguous."""
    before = (local.astimezone(UTC) - timedelta(seconds=1)).astimezone(zone)
    if before.utcoffset() != local.utcoffset():
        if (local.utcoffset() or timedelta(0)) > (before.utcoffset() or timedelta(0)):
            return "clocks go forward here"
        return "clocks go back here"
    other = local.replace(fold=1 - local.fold)
    if other.utcoffset() != local.utcoffset():
        return "second pass of this wall time" if local.fold else "first pass of this wall time"
    return ""
