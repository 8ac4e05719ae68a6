"""Recompute: after a new release of the time zone database, definitions are due when it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from worker.errors import WorkerError
from worker.ids import DefinitionId
from worker.operations import settle
from worker.store import audit, definitions, facts
from worker.store.database import Database
from worker.telemetry.events import emit

Row = Mapping[str, Any]

ACTOR = "worker"
# Definitions looked at by one step.
PAGE = 500


@dataclass(frozen=True, slots=True)
class Page:
    """One step: where the next goes on, None at the end; and how many definitions it moved."""

    after: DefinitionId | None
    moved: int


def outdated(database: Database, version: str) -> bool:
    """Whether the schedules were computed with another release than `version`.

    A database that nobody has computed with yet takes this one.
    """
    with database.autocommit() as connection:
        known = facts.read(connection, facts.ZONE_DATA)
        if known is None:
            facts.write(connection, facts.ZONE_DATA, version)
    return known is not None and known != version


def recompute(database: Database, *, after: DefinitionId | None = None) -> Page:
    """Move the next instants of some definitions to where the zone data of this machine has them.

    Those that move are settled first. What has fired does not fire again; what is
    due already is left to fire.
    """
    with database.autocommit() as connection:
        now = database.now(connection)
        rows = definitions.page_scheduled_for_all_orgs(connection, after=after, since=now, limit=PAGE)
    differing = [row["id"] for row in rows if _follows_a_zone(row) and _differs(row, now)]
    if differing:
        with database.transaction() as connection:
            now = database.now(connection)
            locked = definitions.lock_by_id_for_all_orgs(connection, differing)
            settle.settle(connection, locked, at=now)
            settle.start(connection, locked, at=now)
    return Page(rows[-1]["id"] if len(rows) == PAGE else None, len(differing))


def recomputed(database: Database, version: str, *, moved: int) -> None:
    """Remember that all schedules are computed with this release."""
    with database.transaction() as connection:
        known = facts.read(connection, facts.ZONE_DATA)
        facts.write(connection, facts.ZONE_DATA, version)
        entry = audit.Entry(None, "tzdata.change", version, {"before": known, "definitions": moved})
        audit.record(connection, [entry], at=database.now(connection), actor=ACTOR)
    emit("tzdata.changed", version=version, definitions=moved)


def _follows_a_zone(row: Row) -> bool:
    spec = row["spec"]
    zone = spec.get("timezone") or row["org_timezone"] or "UTC"
    return zone != "UTC" and not spec["schedule"].lstrip().startswith(("every ", "at "))


def _differs(row: Row, now: datetime) -> bool:
    try:
        _, nominal, _ = settle.next_of(row, now)
    except WorkerError as error:
        emit("definition.failed", org=row["org"], definition=row["name"], error=error.message)
        return False
    return bool(nominal != row["next_scheduled_for"])
