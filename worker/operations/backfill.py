"""Backfill: run every scheduled time of a past range again, a few at a time; or cancel a backfill."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

from sqlalchemy import Connection

from worker.errors import Conflict, DefinitionError, NotFound, UsageError, WorkerError
from worker.ids import ALL_ORGS, OrgId, TemplateId, new_id
from worker.model.definitions.definition import from_spec
from worker.model.definitions.triggers import Trigger
from worker.model.runs.run import NewRun
from worker.operations.changes import because
from worker.operations.handlers import Handlers
from worker.operations.runs import new_run, require_active
from worker.operations.templates import definitions_of
from worker.store import audit, backfills, definitions, firing, orgs
from worker.store.database import Database
from worker.store.dialect import Row, database_now
from worker.store.lists import read as lists
from worker.store.lists.rows import Backfill, ChangeOutcome, PlannedBackfill
from worker.telemetry.events import emit

# Backfills that one transaction continues, and the new runs of each.
BACKFILLS = 50
RUNS = 200
MAX_LIMIT = 1000
_TICK = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Filled:
    """The number of runs that one step made, and the backfills that ended."""

    runs: int = 0
    ended: Sequence[Row] = ()


def fill_backfills(database: Database) -> Filled:
    """Make the next runs of backfills that have room, in one transaction."""
    with database.autocommit() as connection:
        if not backfills.is_any_unfinished(connection):
            return Filled()
    with database.transaction() as connection:
        return _fill(connection, at=database.now(connection))


def _fill(connection: Connection, *, at: datetime) -> Filled:
    handlers = Handlers(connection)
    runs: list[NewRun] = []
    ended: list[Row] = []
    for row in backfills.lock_with_room(connection, ALL_ORGS, BACKFILLS):
        try:
            new, following = _next(row, handlers, at)
        except WorkerError as error:
            # The spec of another release, or a zone that this machine lacks: another worker may know it.
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
    """The runs that a backfill has room for, and the first scheduled time that remains."""
    if row["next_scheduled_for"] is None:
        return [], None
    definition = replace(from_spec(row["org"], row["definition"], row["spec"]), starts_at=None)
    trigger = definition.trigger(row["org_timezone"])
    room = min(RUNS, row["max_concurrent"] - row["unfinished"])
    times = list(islice(trigger.occurrences(row["next_scheduled_for"]), room + 1))
    wanted = [time for time in times if time < row["range_until"]]
    stored = {"org_id": row["org_id"], "id": row["definition_id"], "revision": row["revision"]}
    stored["org_pool"] = row["org_pool"]
    runs = [
        replace(
            new_run(stored, definition, handlers, origin="backfill", scheduled_for=time, at=at),
            serial=False,
            overlap="allow",
            backfill_id=row["id"],
            created_by=row["created_by"],
        )
        for time in wanted[:room]
    ]
    return runs, wanted[room] if len(wanted) > room else None


@dataclass(frozen=True, slots=True)
class _Range:
    """A valid range of an active definition, locked, and the backfill of exactly this range."""

    row: Row
    trigger: Trigger
    stored: Row | None
    start: datetime
    until: datetime

    @property
    def last(self) -> datetime:
        """The latest time that is in the range."""
        return self.until - _TICK


def _read_range(
    connection: Connection, org: str, name: str, start: datetime, until: datetime, *, lock: bool = True
) -> _Range:
    org_id = orgs.require(connection, org, lock=lock)["id"]
    row = definitions.require(connection, org_id, org, name, lock=lock)
    require_active(row)
    start, until = start.astimezone(UTC), until.astimezone(UTC)
    _check_range(connection, start, until)
    trigger = replace(from_spec(org, name, row["spec"]), starts_at=None).trigger(row["org_timezone"])
    stored = backfills.find(connection, org_id, row["id"], start, until, lock=lock)
    return _Range(row, trigger, stored, start, until)


def _check_range(connection: Connection, start: datetime, until: datetime) -> None:
    if start >= until:
        raise UsageError(
            "the range is empty: its end is not after its start",
            fix="the end is the first scheduled time that is left out",
        )
    if until > database_now(connection):
        raise UsageError(
            "the range ends in the future, where the schedule still makes runs",
            fix="end it now, or earlier",
        )


def _check_limit(limit: int) -> None:
    if not 1 <= limit <= MAX_LIMIT:
        raise UsageError(
            f"limit {limit} is not between 1 and {MAX_LIMIT}",
            fix="it is the number of runs that can be unfinished at once",
        )


def _count(range_: _Range) -> int:
    """The number of scheduled times of the range; raises UsageError if the range has none."""
    count = range_.trigger.count(range_.start, range_.last)
    if not count:
        org, name = range_.row["org"], range_.row["name"]
        raise UsageError(
            f"{org}/{name} has no scheduled time in that range",
            fix=f"`definitions next {org} {name} --from T` shows them",
        )
    return count


def planned_backfill(
    database: Database, org: str, name: str, *, start: datetime, until: datetime, limit: int = 1
) -> PlannedBackfill:
    """What `backfill` of this range would do; changes nothing, and raises as it does."""
    _check_limit(limit)
    with database.autocommit() as connection:
        range_ = _read_range(connection, org, name, start, until, lock=False)
        return {
            "id": range_.stored["id"] if range_.stored else None,
            "org": org,
            "definition": name,
            "range_from": range_.start,
            "range_until": range_.until,
            "instants": _count(range_),
            "made": range_.stored["made"] if range_.stored else 0,
            "first": range_.trigger.after(range_.start, inclusive=True),
            "last": range_.trigger.last(range_.start, range_.last),
            "limit": limit,
            "revision": range_.stored["revision"] if range_.stored else range_.row["revision"],
        }


def backfill(
    database: Database,
    org: str,
    name: str,
    *,
    start: datetime,
    until: datetime,
    limit: int = 1,
    actor: str,
    reason: str | None = None,
) -> Backfill:
    """Run each scheduled time from `start` until before `until` again; returns the backfill.

    At most `limit` of its runs are unfinished at once, whatever the definition's overlap;
    `starts_at` and misfire rules do not apply. The same range again adds nothing; a
    cancelled backfill continues where it stopped. `reason` is kept in the audit row.

    Raises:
        NotFound: no such org or definition.
        Conflict: the definition is closed, or its org is not active.
        UsageError: an empty or unfinished range, or a limit out of range.
    """
    _check_limit(limit)
    with database.transaction() as connection:
        range_ = _read_range(connection, org, name, start, until)
        row, stored, now = range_.row, range_.stored, database.now(connection)
        org_id: OrgId = row["org_id"]
        detail: Row = {"from": range_.start.isoformat(), "until": range_.until.isoformat()}
        if stored is None:
            count = _count(range_)
            backfill_id = new_id()
            values = {
                "id": backfill_id,
                "org_id": org_id,
                "definition_id": row["id"],
                "revision": row["revision"],
                "range_from": range_.start,
                "range_until": range_.until,
                "next_scheduled_for": range_.trigger.after(range_.start, inclusive=True),
                "max_concurrent": limit,
                "instants": count,
                "created_at": now,
                "created_by": actor,
            }
            backfills.add(connection, values)
            detail["instants"] = count
        elif stored["cancelled_at"] is not None or stored["max_concurrent"] != limit:
            backfill_id = stored["id"]
            values = {"max_concurrent": limit}
            if stored["cancelled_at"] is not None:
                values |= {"cancelled_at": None, "finished_at": None}
            backfills.change(connection, org_id, backfill_id, values)
            detail["limit"] = limit
        else:
            return lists.backfill(connection, org_id, stored["id"])
        detail |= because(reason)
        audit.note(connection, org_id, "definition.backfill", f"{org} {name}", detail, at=now, actor=actor)
        _fill(connection, at=now)
        return lists.backfill(connection, org_id, backfill_id)


def cancel_backfill(
    database: Database, org: str, name: str, *, start: datetime, until: datetime, actor: str
) -> Backfill:
    """Cancel a backfill and its waiting runs, not the running ones; returns the backfill.

    Raises:
        NotFound: no such org, definition or backfill.
        Conflict: it has ended.
    """
    with database.transaction() as connection:
        org_id = orgs.require(connection, org, lock=True)["id"]
        row = definitions.require(connection, org_id, org, name, lock=True)
        stored = backfills.find(connection, org_id, row["id"], start.astimezone(UTC), until.astimezone(UTC))
        if stored is None:
            raise NotFound(
                f"{org}/{name} has no backfill of exactly that range",
                fix=f"`definitions backfills --org {org} --definition {name}` lists them",
            )
        if stored["finished_at"] is not None:
            raise Conflict(
                f"that backfill of {org}/{name} has ended",
                fix=f"`runs list --org {org} --definition {name}` lists its runs",
            )
        now = database.now(connection)
        backfills.change(connection, org_id, stored["id"], {"cancelled_at": now, "finished_at": now})
        ended = backfills.end_waiting(connection, org_id, stored["id"])
        subject, detail = f"{org} {name}", {"cancelled": ended}
        audit.note(connection, org_id, "definition.cancel_backfill", subject, detail, at=now, actor=actor)
        return lists.backfill(connection, org_id, stored["id"])


def backfill_template(
    database: Database,
    name: str,
    *,
    start: datetime,
    until: datetime,
    limit: int = 1,
    actor: str,
    dry_run: bool = False,
    cancel: bool = False,
) -> Iterator[ChangeOutcome]:
    """Backfill the range of each open definition that a template made, as it is taken; yields the outcomes.

    A row has the columns of `definitions backfills`, and `left`: why an org was left out, else None. Orgs are
    changed one by one, and the same range again adds nothing, so an interrupted call can be repeated.
    `limit` is that of each org. With `dry_run` nothing is changed; with `cancel` the backfills of exactly
    this range are cancelled that have not ended.

    Raises:
        NotFound: no such template.
        UsageError: an empty or unfinished range, or a limit out of range.
    """
    _check_limit(limit)
    start, until = start.astimezone(UTC), until.astimezone(UTC)
    with database.autocommit() as connection:
        template_id = TemplateId(lists.template(connection, ALL_ORGS, name)["id"])
        _check_range(connection, start, until)

    def change(org: str, definition: str) -> Mapping[str, Any]:
        if dry_run:
            return planned_backfill(database, org, definition, start=start, until=until, limit=limit)
        if cancel:
            return cancel_backfill(database, org, definition, start=start, until=until, actor=actor)
        return backfill(database, org, definition, start=start, until=until, limit=limit, actor=actor)

    for row in definitions_of(database, template_id):
        of, named = row["org"], row["name"]
        outcome = ChangeOutcome(org=of, definition=named, id=None, instants=0, made=0, left=None)
        try:
            changed = change(row["org"], row["name"])
            yield outcome | {"id": changed["id"], "instants": changed["instants"], "made": changed["made"]}
        except UsageError:
            # The range is right: this schedule has no time in it.
            yield outcome
        except (Conflict, NotFound, DefinitionError) as error:
            if not cancel:
                yield outcome | {"left": error.message}
