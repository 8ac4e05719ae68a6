"""Fill backfills: as runs of a backfill end, the next of its instants become runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Any

from sqlalchemy import Connection

from worker.definitions.definition import from_spec
from worker.errors import WorkerError
from worker.ids import RunId, new_id
from worker.operations.handlers import Handlers
from worker.runs.run import NewRun
from worker.store import backfills, firing
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
