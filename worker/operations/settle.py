"""Settle: before a change of what is due, close the past under the old rules; then start from now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.definitions.definition import from_spec
from worker.errors import WorkerError
from worker.ids import DefinitionId, OrgId
from worker.operations.handlers import Handlers
from worker.runs.fire import decide, spread_of
from worker.runs.run import DueDefinition, NewRun, NewSkip, NextFire
from worker.store import audit, definitions, firing, schema
from worker.store.connection import chunks
from worker.store.database import Database
from worker.telemetry.events import emit

Row = Mapping[str, Any]


@contextmanager
def settled_org(connection: Connection, org_id: OrgId, *, at: datetime) -> Iterator[list[dict[str, Any]]]:
    """Settle all definitions of an org, let the caller change the org, and start them from now.

    Yields their rows as they were. Within one transaction, the org's row locked first.
    """
    rows = definitions.lock_org(connection, org_id)
    settle(connection, rows, at=at)
    yield rows
    # Those that were closed in between as well: nothing of them is due any more.
    ours = {row["id"] for row in rows}
    now_are = definitions.lock_for_all_orgs(connection, [org_id])
    start(connection, [row for row in now_are if row["id"] in ours], at=at)


@contextmanager
def settled(connection: Connection, row: Row, *, at: datetime) -> Iterator[None]:
    """Settle one definition, locked already, let the caller change it, and start it from now."""
    settle(connection, [row], at=at)
    yield
    now_is = definitions.find(connection, row["org_id"], row["name"])
    start(connection, [now_is] if now_is else [], at=at)


def settle(connection: Connection, rows: Sequence[Row], *, at: datetime) -> None:
    """Decide every instant that these definitions, locked already, have named up to now.

    By the misfire rule of the revision in force. An instant that has come, but
    whose spread has not passed yet, becomes a run that is available when it has.
    """
    due = [row for row in rows if row["next_scheduled_for"] is not None and row["next_scheduled_for"] <= at]
    handlers = Handlers(connection)
    for part in chunks(due, 100):
        runs: list[NewRun] = []
        skips: list[NewSkip] = []
        nexts: list[NextFire] = []
        for row in part:
            nexts.append(_settle(row, at, handlers, runs, skips))
        firing.write(connection, runs, skips, nexts)


def _settle(row: Row, at: datetime, handlers: Handlers, runs: list[NewRun], skips: list[NewSkip]) -> NextFire:
    next_fire = NextFire(row["id"], row["next_scheduled_for"], row["next_fire_at"])
    while next_fire.next_scheduled_for is not None and next_fire.next_scheduled_for <= at:
        due = DueDefinition(
            definition_id=row["id"],
            org_id=row["org_id"],
            org_code=row["org"],
            org_timezone=row["org_timezone"],
            name=row["name"],
            revision=row["revision"],
            next_scheduled_for=next_fire.next_scheduled_for,
            spec=row["spec"],
        )
        decision = decide(due, max(at, next_fire.next_fire_at or at), handlers.isolation_of)
        runs.extend(decision.runs)
        skips.extend(decision.skips)
        next_fire = decision.next
    return next_fire


def start(connection: Connection, rows: Sequence[Row], *, at: datetime, inclusive: bool = False) -> None:
    """Set when these definitions are due next, counted from now; never, where they are not active.

    `inclusive` for new ones: an instant that is this very moment counts. What was
    decided already stays so, also where the clock has gone back since.
    """
    decided = (
        {}
        if inclusive
        else definitions.last_decided_for_all_orgs(connection, [row["id"] for row in rows if is_active(row)])
    )
    definitions.set_next_for_all_orgs(
        connection,
        [
            (row["org_id"], *next_of(row, max(at, decided.get(row["id"], at)), inclusive=inclusive))
            for row in rows
        ],
    )


def next_of(
    row: Row, at: datetime, *, inclusive: bool = False
) -> tuple[DefinitionId, datetime | None, datetime | None]:
    """A definition, its first instant after `at`, and that plus its spread."""
    if not is_active(row):
        return row["id"], None, None
    definition = from_spec(row["org"], row["name"], row["spec"])
    trigger = definition.trigger(row["org_timezone"])
    nominal = trigger.after(at, inclusive=inclusive)
    if nominal is None:
        return row["id"], None, None
    spread = spread_of(row["org"], row["name"], definition.schedule, trigger, definition.spread)
    return row["id"], nominal, nominal + spread


def is_active(row: Row) -> bool:
    """Whether instants of this definition are due at all: neither it nor its org is stopped."""
    return (
        row["org_state"] == "active"
        and row["enabled"]
        and row["paused_at"] is None
        and row["closed_at"] is None
    )


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
        known = schema.read(connection, schema.ZONE_DATA)
        if known is None:
            schema.write(connection, schema.ZONE_DATA, version)
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
            settle(connection, locked, at=now)
            start(connection, locked, at=now)
    return Page(rows[-1]["id"] if len(rows) == PAGE else None, len(differing))


def recomputed(database: Database, version: str, *, moved: int) -> None:
    """Remember that all schedules are computed with this release."""
    with database.transaction() as connection:
        known = schema.read(connection, schema.ZONE_DATA)
        schema.write(connection, schema.ZONE_DATA, version)
        entry = audit.Entry(None, "tzdata.change", version, {"before": known, "definitions": moved})
        audit.record(connection, [entry], at=database.now(connection), actor=ACTOR)
    emit("tzdata.changed", version=version, definitions=moved)


def _follows_a_zone(row: Row) -> bool:
    spec = row["spec"]
    zone = spec.get("timezone") or row["org_timezone"] or "UTC"
    return zone != "UTC" and not spec["schedule"].lstrip().startswith(("every ", "at "))


def _differs(row: Row, now: datetime) -> bool:
    try:
        _, nominal, _ = next_of(row, now)
    except WorkerError as error:
        emit("definition.failed", org=row["org"], definition=row["name"], error=error.message)
        return False
    return bool(nominal != row["next_scheduled_for"])
