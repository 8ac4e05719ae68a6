"""The states of an org: pause, suspend, resume, remove; each settles every definition of the org."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.errors import Conflict
from worker.ids import OrgId
from worker.operations import settle
from worker.orgs.org import STOPS, OrgState, may_move
from worker.store import audit, credentials, definitions, edit_runs, listing, orgs
from worker.store.database import Database

Row = dict[str, Any]


def pause_org(database: Database, org: str, *, actor: str, note: str | None = None) -> Row:
    """Nothing new of the org fires or starts; running runs go on. Returns the org.

    Raises:
        NotFound: there is no such org.
        Conflict: the org was removed.
    """
    return _set(database, org, "paused", "org.pause", actor, note)


def suspend_org(database: Database, org: str, *, actor: str, note: str | None = None) -> Row:
    """As `pause_org`, and what waits is cancelled at once, what runs within one renewal."""
    return _set(database, org, "suspended", "org.suspend", actor, note)


def resume_org(database: Database, org: str, *, actor: str, note: str | None = None) -> Row:
    """The org is active again from now on; nothing that was due meanwhile is replayed."""
    return _set(database, org, "active", "org.resume", actor, note)


def remove_org(database: Database, org: str, *, actor: str, note: str | None = None) -> Row:
    """As `suspend_org`; its definitions are closed and its secrets destroyed, its history stays."""
    return _set(database, org, "removed", "org.remove", actor, note)


def _set(database: Database, code: str, state: OrgState, action: str, actor: str, note: str | None) -> Row:
    with database.transaction() as connection:
        org = orgs.require(connection, code, lock=True)
        if not may_move(org["state"], state):
            raise Conflict(f"org {code} was removed", fix=f"`orgs add {code}` brings it back")
        if org["state"] != state:
            now = database.now(connection)
            with settle.settled_org(connection, org["id"], at=now) as rows:
                orgs.set_state(connection, org["id"], state, by=actor, at=now, note=note)
                stopped = _stop(connection, org["id"], state, rows, now)
            entry = audit.Entry(org["id"], action, code, {"from": org["state"], "note": note} | stopped)
            audit.record(connection, [entry], at=now, actor=actor)
        return listing.org(connection, code)


def _stop(connection: Connection, org_id: OrgId, state: OrgState, rows: list[Row], at: datetime) -> Row:
    """Stop what this state stops; returns how much that was, for the audit."""
    stops = STOPS[state]
    stopped: Row = {}
    if stops.waiting:
        stopped["cancelled"] = len(edit_runs.end_waiting(connection, org_id, reason="suspended"))
    if stops.running:
        stopped["asked_to_stop"] = edit_runs.ask_to_stop(connection, org_id, reason="suspended", at=at)
    if stops.secrets:
        stopped["credentials_destroyed"] = credentials.destroy(connection, org_id, at=at)
        for row in rows:
            definitions.change(
                connection, org_id, row["id"], {"closed_at": at}, at=at, revision=row["revision"]
            )
    return stopped
