"""Change one definition: edit keys, pause by hand or after too many failures, resume."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import Connection

from worker.definitions.definition import parse_definition, to_spec
from worker.definitions.origins import check_encrypted
from worker.errors import Conflict, Unavailable, WorkerError
from worker.ids import DefinitionId, OrgId
from worker.operations import settle
from worker.operations.changes import differing
from worker.operations.handlers import Handlers
from worker.operations.plan import DefinitionChange
from worker.operations.write_definitions import audit_entry, settle_touched, write_definitions
from worker.store import audit, definitions, orgs
from worker.store.database import Database
from worker.store.lists import definitions as definition_lists
from worker.telemetry.events import emit

Row = dict[str, Any]


def edit_definition(
    database: Database,
    org: str,
    name: str,
    changes: Mapping[str, Any],
    *,
    actor: str,
    revision: int | None = None,
    allow_unknown_handlers: bool = False,
    inline: Collection[str] = (),
    insecure_origins: Collection[str] = (),
) -> Row:
    """Change keys of a definition as a file would write them, None for the default; returns it.

    What was due before is settled by the old revision, and what runs goes on with it.
    With `revision` the definition must still be at that one.

    Raises:
        NotFound: there is no such org or definition.
        Conflict: it is at another revision, closed, or made by a template.
        DefinitionError: names the key that cannot be accepted.
    """
    with database.transaction() as connection:
        org_id = orgs.require(connection, org, lock=True)["id"]
        row = definitions.require(connection, org_id, org, name, lock=True)
        _check(row, revision)
        values = {**row["spec"], "enabled": row["enabled"], **changes, "org": org, "name": name}
        entry = f"definition {org}/{name}"
        wanted = parse_definition(values, entry=entry)
        spec = to_spec(wanted)
        if differing(row["spec"], spec) or row["enabled"] != wanted.enabled:
            Handlers(connection).check(wanted, entry, inline=inline, allow_unknown=allow_unknown_handlers)
            check_encrypted(wanted.api_origins, insecure_origins, entry=entry)
            now = database.now(connection)
            change = DefinitionChange("change", org_id, org, name, row, spec, wanted.enabled)
            settled = settle_touched(connection, [change], at=now)
            write_definitions(connection, [change], settled=settled, actor=actor, at=now)
            audit.record(connection, [audit_entry(change)], at=now, actor=actor)
        return definition_lists.definition(connection, org, name)


def _check(row: Row, revision: int | None) -> None:
    named = f"definition {row['org']}/{row['name']}"
    if row["closed_at"] is not None:
        raise Conflict(f"{named} is closed", fix="`apply` a file that has it")
    if row["template_id"] is not None:
        raise Conflict(
            f"{named} is made by a template", fix="change the template, for every org that it means"
        )
    if revision is not None and revision != row["revision"]:
        raise Conflict(
            f"{named} is at revision {row['revision']} by now, not at {revision}: somebody has changed it",
            fix=f"look at it with `definitions show {row['org']} {row['name']}` and try again",
        )


def pause_definition(database: Database, org: str, name: str, *, actor: str, note: str | None = None) -> Row:
    """Pause one definition and return it; what was due before is settled, what runs goes on.

    Pausing it again only changes who, when and why.

    Raises:
        NotFound: there is no such org or definition.
        Conflict: it is closed.
    """
    return _set(database, org, name, actor=actor, pause=True, note=note)


def resume_definition(database: Database, org: str, name: str, *, actor: str) -> Row:
    """Let a paused definition be due again, from now on, and return it.

    Raises:
        NotFound: there is no such org or definition.
        Conflict: it is closed, or not paused.
    """
    return _set(database, org, name, actor=actor, pause=False, note=None)


def _set(database: Database, org: str, name: str, *, actor: str, pause: bool, note: str | None) -> Row:
    with database.transaction() as connection:
        org_id = orgs.require(connection, org, lock=True)["id"]
        row = definitions.require(connection, org_id, org, name, lock=True)
        if row["closed_at"] is not None:
            raise Conflict(f"definition {org}/{name} is closed", fix="`apply` a file that has it")
        if not pause and row["paused_at"] is None:
            raise Conflict(
                f"definition {org}/{name} is not paused",
                fix=f"`definitions next {org} {name}` says when it is due",
            )
        now = database.now(connection)
        values: Row = {
            "paused_at": now if pause else None,
            "paused_by": actor if pause else None,
            "pause_note": note,
        }
        if not pause:
            values["consecutive_failures"] = 0
        with settle.settled(connection, row, at=now):
            definitions.change(connection, org_id, row["id"], values, at=now, revision=row["revision"])
        action = "definition.pause" if pause else "definition.resume"
        entry = audit.Entry(org_id, action, f"{org} {name}", {"note": note} if note else None)
        audit.record(connection, [entry], at=now, actor=actor)
        return definition_lists.definition(connection, org, name)


ACTOR = "worker"


def count_failures(database: Database, org_id: OrgId, definition_id: DefinitionId) -> int | None:
    """How many of the definition's newest runs failed or were refused, one after the other.

    Backfills, cancelled and skipped runs do not count; a success, an edit, a pause and a
    resume begin the count anew. At `pause_after_failures` the definition is paused,
    with a note that names the last run, an audit row and an event. None where it must
    be and cannot, for example since its schedule does not compute; an event tells of that, too.
    """
    with database.autocommit() as connection:
        row = definitions.find_by_id(connection, org_id, definition_id)
        if row is None:
            return 0
        failed = _failed(connection, row)
        if failed == row["consecutive_failures"] and not _must_pause(row, failed):
            return failed
    try:
        with database.transaction() as connection:
            row = definitions.require_by_id(connection, org_id, definition_id)
            failed = _failed(connection, row)
            definitions.set_failures(connection, org_id, definition_id, failed)
            pauses = _must_pause(row, failed)
            if pauses:
                _pause(connection, row, failed, database)
    except Unavailable:
        raise
    except WorkerError as error:
        emit("definition.failed", org=row["org"], definition=row["name"], error=error.message)
        return None
    if pauses:
        emit("definition.paused", org=row["org"], definition=row["name"], failures=failed)
    return failed


def _failed(connection: Connection, row: Mapping[str, Any]) -> int:
    most = row["spec"].get("pause_after_failures")
    if most is None or row["closed_at"] is not None:
        return 0
    return definitions.failed_in_a_row(
        connection, row["org_id"], row["id"], since=row["updated_at"], most=int(most)
    )


def _must_pause(row: Mapping[str, Any], failed: int) -> bool:
    most = row["spec"].get("pause_after_failures")
    return most is not None and failed >= most and row["paused_at"] is None and row["closed_at"] is None


def _pause(connection: Connection, row: Mapping[str, Any], failed: int, database: Database) -> None:
    org_id, now = row["org_id"], database.now(connection)
    last = definitions.last_failed(connection, org_id, row["id"])
    note = f"{failed} failures one after the other, the last of them run {last}"
    with settle.settled(connection, row, at=now):
        values = {"paused_at": now, "paused_by": ACTOR, "pause_note": note}
        definitions.change(connection, org_id, row["id"], values, at=now, revision=row["revision"])
    entry = audit.Entry(org_id, "definition.pause", f"{row['org']} {row['name']}", {"note": note})
    audit.record(connection, [entry], at=now, actor=ACTOR)
