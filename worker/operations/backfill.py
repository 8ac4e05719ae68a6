"""Backfill: runs every scheduled time of a past range again, a few at a time; and stops that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

from sqlalchemy import Connection

from worker.definitions.definition import from_spec
from worker.errors import Conflict, NotFound, UsageError, WorkerError
from worker.ids import RunId, new_id
from worker.operations.handlers import Handlers
from worker.operations.manual_run import refuse_what_is_not_active
from worker.runs.run import NewRun
from worker.store import audit, backfills, definitions, firing, orgs
from worker.store.database import Database
from worker.telemetry.events import emit

Row = dict[str, Any]

# Backfills, and runs of each, that one transaction takes up.
BACKFILLS = 50
RUNS = 200


@dataclass(frozen=True, slots=True)
class Filled:
    """What one step did: how many runs it made, and which backfills have ended."""

    runs: int = 0
    ended: Sequence[Row] = ()


def fill_backfills(database: Database) -> Filled:
    """Make the next runs of the backfills that have room, in one transaction."""
    with database.autocommit() as connection:
        if not backfills.is_any_unfinished(connection):
            return Filled()
    with database.transaction() as connection:
        return fill(connection, at=database.now(connection))


def fill(connection: Connection, *, at: datetime) -> Filled:
    """As `fill_backfills`, inside the caller's transaction."""
    handlers = Handlers(connection)
    runs: list[NewRun] = []
    ended: list[Row] = []
    for row in backfills.lock_with_room_for_all_orgs(connection, BACKFILLS):
        try:
            new, following = _next(row, handlers, at)
        except WorkerError as error:
            # Another version's spec, or a zone that this machine does not have: another worker may.
            emit("definition.failed", org=row["org"], definition=row["definition"], error=error.message)
            continue
        runs += new
        values: Row = {"next_scheduled_for": following, "made": row["made"] + len(new)}
        if not new and not row["unfinished"]:
            values["finished_at"] = at
            ended.append(row)
        backfills.change(connection, row["org_id"], row["id"], values)
    if runs:
        firing.write(connection, runs)
    return Filled(len(runs), ended)


def _next(row: Row, handlers: Handlers, at: datetime) -> tuple[list[NewRun], datetime | None]:
    """The runs that a backfill has room for, and the first instant that is left."""
    if row["next_scheduled_for"] is None:
        return [], None
    definition = replace(from_spec(row["org"], row["definition"], row["spec"]), starts_at=None)
    trigger = definition.trigger(row["org_timezone"])
    room = min(RUNS, row["max_concurrent"] - row["unfinished"])
    instants = list(islice(trigger.instants(row["next_scheduled_for"]), room + 1))
    wanted = [instant for instant in instants if instant < row["range_until"]]
    runs: list[NewRun] = []
    for instant in wanted[:room]:
        run_id = RunId(new_id())
        runs.append(
            NewRun(
                id=run_id,
                org_id=row["org_id"],
                definition_id=row["definition_id"],
                revision=row["revision"],
                handler=definition.handler,
                origin="backfill",
                scheduled_for=instant,
                available_at=at,
                idempotency_key=run_id,
                isolation=definition.isolation or handlers.isolation_of(definition.handler),
                serial=False,
                overlap="allow",
                priority=definition.priority,
                variant_handlers=definition.handlers if definition.variants else (),
                max_concurrent=definition.max_concurrent,
                backfill_id=row["id"],
                created_by=row["created_by"],
            )
        )
    return runs, wanted[room] if len(wanted) > room else None


MOST_AT_ONCE = 1000
_INSTANT = timedelta(microseconds=1)


def backfill(
    database: Database,
    org: str,
    name: str,
    *,
    start: datetime,
    until: datetime,
    limit: int = 1,
    actor: str,
) -> Row:
    """Make a run for each instant from `start` until before `until`, and return the backfill.

    At most `limit` of them are unfinished at once, whatever the definition's overlap;
    its `starts_at` and misfire rules do not count. The same range again adds
    nothing; one that was cancelled goes on where it was.

    Raises:
        NotFound: there is no such org or definition.
        Conflict: the definition is closed, or its org is not active.
        UsageError: a range that is empty or has not passed, or a limit out of range.
    """
    start, until = start.astimezone(UTC), until.astimezone(UTC)
    if not 1 <= limit <= MOST_AT_ONCE:
        raise UsageError(
            f"limit {limit} is not between 1 and {MOST_AT_ONCE}",
            fix="it is how many may be unfinished at once",
        )
    with database.transaction() as connection:
        org_id = orgs.require(connection, org, lock=True)["id"]
        row = definitions.require(connection, org_id, org, name, lock=True)
        now = database.now(connection)
        _check(row, start, until, now)
        there = backfills.find(connection, org_id, row["id"], start, until)
        if there is None:
            definition = replace(from_spec(org, name, row["spec"]), starts_at=None)
            trigger = definition.trigger(row["org_timezone"])
            instants = trigger.count(start, until - _INSTANT)
            if not instants:
                raise UsageError(
                    f"no instant of {org}/{name} lies in that range",
                    fix=f"`definitions next {org} {name} --from T` shows where they are",
                )
            backfill_id = new_id()
            values = {
                "id": backfill_id,
                "org_id": org_id,
                "definition_id": row["id"],
                "revision": row["revision"],
                "range_from": start,
                "range_until": until,
                "next_scheduled_for": trigger.after(start, inclusive=True),
                "max_concurrent": limit,
                "instants": instants,
                "created_at": now,
                "created_by": actor,
            }
            backfills.add(connection, values)
            detail: Row = {"from": start.isoformat(), "until": until.isoformat(), "instants": instants}
        elif there["cancelled_at"] is not None or there["max_concurrent"] != limit:
            backfill_id = there["id"]
            detail = {"from": start.isoformat(), "until": until.isoformat(), "limit": limit}
            values = {"max_concurrent": limit}
            if there["cancelled_at"] is not None:
                values |= {"cancelled_at": None, "finished_at": None}
            backfills.change(connection, org_id, backfill_id, values)
        else:
            return backfills.backfill(connection, org_id, there["id"])
        audit.record(
            connection,
            [audit.Entry(org_id, "definition.backfill", f"{org} {name}", detail)],
            at=now,
            actor=actor,
        )
        fill(connection, at=now)
        return backfills.backfill(connection, org_id, backfill_id)


def cancel_backfill(
    database: Database, org: str, name: str, *, start: datetime, until: datetime, actor: str
) -> Row:
    """Stop a backfill and return it: what waits of it is cancelled, what runs goes on.

    Raises:
        NotFound: there is no such org, definition or backfill.
        Conflict: it has ended.
    """
    with database.transaction() as connection:
        org_id = orgs.require(connection, org, lock=True)["id"]
        row = definitions.require(connection, org_id, org, name, lock=True)
        there = backfills.find(connection, org_id, row["id"], start.astimezone(UTC), until.astimezone(UTC))
        if there is None:
            raise NotFound(
                f"{org}/{name} has no backfill of exactly that range",
                fix=f"`definitions backfills --org {org} --definition {name}` names those it has",
            )
        if there["finished_at"] is not None:
            raise Conflict(
                f"that backfill of {org}/{name} has ended",
                fix=f"nothing is left to stop; `runs list --org {org} --definition {name}` lists its runs",
            )
        now = database.now(connection)
        backfills.change(connection, org_id, there["id"], {"cancelled_at": now, "finished_at": now})
        ended = backfills.end_waiting(connection, org_id, there["id"])
        entry = audit.Entry(org_id, "definition.cancel_backfill", f"{org} {name}", {"cancelled": ended})
        audit.record(connection, [entry], at=now, actor=actor)
        return backfills.backfill(connection, org_id, there["id"])


def _check(row: Row, start: datetime, until: datetime, now: datetime) -> None:
    refuse_what_is_not_active(row)
    if start >= until:
        raise UsageError(
            "the range is empty: --until is not after --from", fix="--until is the first instant left out"
        )
    if until > now:
        raise UsageError(
            "the range has not passed yet: what is still to come runs by its schedule",
            fix="--until now, or earlier",
        )
