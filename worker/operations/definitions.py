"""Definitions: edit keys, pause (by hand or after too many failures), resume; set or clear the state."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection

from worker.errors import Conflict, PreconditionFailed, Unavailable, UsageError, WorkerError
from worker.handlers.given import to_state_text
from worker.handlers.json_text import NotStorable
from worker.ids import DefinitionId, OrgId
from worker.model.definitions import CALENDAR_DATES
from worker.model.definitions.calendars import read_dates
from worker.model.definitions.definition import keys_of, parse_definition
from worker.model.definitions.origins import NO_ISSUERS, IssuerOrigins, check_origins
from worker.operations import settle
from worker.operations.changes import CALENDARS, DefinitionChange, change_definitions
from worker.operations.handlers import Handlers
from worker.store import audit, definitions, orgs, states
from worker.store import calendars as calendar_rows
from worker.store.database import Database
from worker.store.dialect import Row, database_now
from worker.store.lists import read as lists
from worker.store.lists.read import DefinitionState
from worker.store.lists.rows import DefinitionDetail
from worker.telemetry.events import emit

ACTOR = "worker"
# Keys of a state that an audit row names.
KEYS = 50


@contextmanager
def _locked(
    database: Database, org: str, name: str, *, calendars: bool = False
) -> Iterator[tuple[Connection, Row]]:
    """A transaction with one locked definition that is not closed; with `calendars`, those stay, too.

    Raises:
        NotFound: no such org or definition.
        Conflict: it is closed.
    """
    with database.transaction() as connection:
        if calendars:
            calendar_rows.lock(connection)
        org_id = orgs.require(connection, org, lock=True)["id"]
        row = definitions.require(connection, org_id, org, name, lock=True)
        if row["closed_at"] is not None:
            raise Conflict(
                f"definition {org}/{name} is closed", fix="`apply` a file that has it opens it again"
            )
        yield connection, row


def edit_definition(
    database: Database,
    org: str,
    name: str,
    changes: Mapping[str, Any],
    *,
    actor: str,
    revision: int | None = None,
    inline: Collection[str] = (),
    insecure_origins: Collection[str] = (),
    api_origins: IssuerOrigins = NO_ISSUERS,
    reason: str | None = None,
) -> DefinitionDetail:
    """Change keys of a definition, named as in a file, None for the default; returns the definition.

    The old revision decides what was due before, and running runs keep it. With
    `revision`, the definition must still be at that one. `reason` is kept in the audit row.

    Raises:
        NotFound: no such org or definition.
        Conflict: it is at another revision, closed, or made by a template.
        DefinitionError: names the key that is refused.
    """
    entry = f"definition {org}/{name}"
    with _locked(database, org, name, calendars=changes.get("calendar") is not None) as (connection, row):
        if row["template_id"] is not None:
            raise Conflict(
                f"{entry} is made by a template", fix="change the template, for every org that it selects"
            )
        if revision is not None and revision != row["revision"]:
            raise PreconditionFailed(
                f"{entry} is now at revision {row['revision']}, not {revision}: somebody has changed it",
                fix=f"look at it with `definitions show {org} {name}` and try again",
            )
        values = {**keys_of(row["spec"]), "enabled": row["enabled"], **changes, "org": org, "name": name}
        wanted = parse_definition(values, entry=entry)
        if changes.get("calendar") is not None:
            wanted = CALENDARS.require().with_calendar(connection, wanted, entry)
        elif wanted.calendar is not None:
            wanted = replace(wanted, calendar_dates=read_dates(row["spec"].get(CALENDAR_DATES, [])))
        change = DefinitionChange.to(row["org_id"], wanted, row)
        if change is not None:
            Handlers(connection).check(
                wanted, entry, org_pools=lambda: (row["org_pool"],), inline=inline, allow_unknown=False
            )
            own, base_url = wanted.api_origins, wanted.api_base_url
            issuers = [orgs.require(connection, org)["issuer"]]
            check_origins(own, base_url, issuers, api_origins, insecure_origins, entry=entry)
            change_definitions(connection, [change], actor=actor, at=database.now(connection), reason=reason)
        return lists.definition(connection, org, name)


def pause_definition(
    database: Database, org: str, name: str, *, actor: str, note: str | None = None
) -> DefinitionDetail:
    """Pause a definition and return it; running runs continue. A second pause replaces actor, time and note.

    Raises:
        NotFound: no such org or definition.
        Conflict: it is closed.
    """
    with _locked(database, org, name) as (connection, row):
        _set_pause(connection, row, actor=actor, note=note)
        return lists.definition(connection, org, name)


def resume_definition(database: Database, org: str, name: str, *, actor: str) -> DefinitionDetail:
    """Make a paused definition due again from now on, and return it.

    Raises:
        NotFound: no such org or definition.
        Conflict: it is closed, or not paused.
    """
    with _locked(database, org, name) as (connection, row):
        if row["paused_at"] is None:
            raise Conflict(
                f"definition {org}/{name} is not paused",
                fix=f"`definitions next {org} {name}` shows when it is due",
            )
        _set_pause(connection, row, actor=actor, pause=False)
        return lists.definition(connection, org, name)


def _set_pause(
    connection: Connection, row: Row, *, actor: str, pause: bool = True, note: str | None = None
) -> None:
    now = database_now(connection)
    values: Row = {"paused_at": now, "paused_by": actor, "pause_note": note}
    if not pause:
        values = {"paused_at": None, "paused_by": None, "pause_note": None, "consecutive_failures": 0}
    with settle.rescheduling(connection, [row], at=now, scope=row["org_id"]):
        change = definitions.DefinitionUpdate(row["org_id"], row["id"], row["revision"], values)
        definitions.change(connection, [change], at=now)
    action = "definition.pause" if pause else "definition.resume"
    detail = {"note": note} if note else None
    audit.note(connection, row["org_id"], action, f"{row['org']} {row['name']}", detail, at=now, actor=actor)


def count_failures(database: Database, org_id: OrgId, definition_id: DefinitionId) -> int | None:
    """The number of newest runs of a definition that failed or were refused in a row.

    Backfills, cancelled and skipped runs do not count; a success, an edit, a pause and a
    resume reset the count. At `pause_after_failures` the definition is paused, with a note
    that names the last run. None if that fails, for example because its schedule cannot be
    computed; an event reports it.
    """
    with database.autocommit() as connection:
        row = definitions.find_by_id(connection, org_id, definition_id)
        if row is None:
            return 0
        failed = _failed_in_a_row(connection, row)
        if failed == row["consecutive_failures"] and not _must_pause(row, failed):
            return failed
    try:
        with database.transaction() as connection:
            row = definitions.require_by_id(connection, org_id, definition_id)
            failed = _failed_in_a_row(connection, row)
            definitions.set_failures(connection, org_id, definition_id, failed)
            pauses = _must_pause(row, failed)
            if pauses:
                last = definitions.last_failed(connection, org_id, definition_id)
                note = f"{failed} failures in a row, the last of them run {last}"
                _set_pause(connection, row, actor=ACTOR, note=note)
    except Unavailable:
        raise
    except WorkerError as error:
        emit("definition.failed", org=row["org"], definition=row["name"], error=error.message)
        return None
    if pauses:
        emit("definition.paused", org=row["org"], definition=row["name"], failures=failed)
    return failed


def _failed_in_a_row(connection: Connection, row: Row) -> int:
    most = row["spec"].get("pause_after_failures")
    if most is None or row["closed_at"] is not None:
        return 0
    return definitions.failed_in_a_row(
        connection, row["org_id"], row["id"], since=row["updated_at"], most=int(most)
    )


def _must_pause(row: Row, failed: int) -> bool:
    most = row["spec"].get("pause_after_failures")
    return most is not None and failed >= most and row["paused_at"] is None and row["closed_at"] is None


def set_state(
    database: Database, org: str, name: str, data: Mapping[str, Any], *, actor: str
) -> DefinitionState:
    """Replace the state of a definition, and return it; the next attempt of its runs loads it.

    Raises:
        NotFound: no such org or definition.
        Conflict: a run of it is running.
        UsageError: it is not a JSON object of at most 64 KiB.
    """
    try:
        size = len(to_state_text(data).encode())
    except NotStorable as error:
        raise UsageError(str(error), fix='a state is a JSON object, such as {"cursor": 5}') from None

    with _without_a_run(database, org, name) as (connection, row):
        now = database.now(connection)
        states.put(connection, row["org_id"], row["id"], dict(data), at=now, by=actor)
        detail = {"keys": sorted(data)[:KEYS], "bytes": size}
        subject = f"{org} {name}"
        audit.note(connection, row["org_id"], "definition.set_state", subject, detail, at=now, actor=actor)
        return lists.state(connection, org, name)


def clear_state(database: Database, org: str, name: str, *, actor: str) -> DefinitionState:
    """Clear the state of a definition, and return it; the next attempt of its runs loads an empty one.

    Raises:
        NotFound: no such org or definition.
        Conflict: a run of it is running.
    """
    with _without_a_run(database, org, name) as (connection, row):
        before = states.find(connection, row["org_id"], row["id"])
        if before is not None:
            states.clear(connection, row["org_id"], row["id"])
            detail, now = {"keys": sorted(before["data"])[:KEYS]}, database.now(connection)
            action, subject = "definition.clear_state", f"{org} {name}"
            audit.note(connection, row["org_id"], action, subject, detail, at=now, actor=actor)
        return lists.state(connection, org, name)


@contextmanager
def _without_a_run(database: Database, org: str, name: str) -> Iterator[tuple[Connection, Row]]:
    """A transaction with one locked definition, closed or not, of which no run is running.

    Raises:
        NotFound: no such org or definition.
        Conflict: a run of it is running, and may change the state itself.
    """
    with database.transaction() as connection:
        org_id = orgs.require(connection, org)["id"]
        row = definitions.require(connection, org_id, org, name, lock=True)
        running = states.running(connection, org_id, row["id"])
        if running is not None:
            raise Conflict(
                f"run {running} of definition {org}/{name} is running, and may change the state itself",
                fix=f"wait for its end, or `runs cancel {running}`",
            )
        yield connection, row
