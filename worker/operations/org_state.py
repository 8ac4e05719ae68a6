"""The states of an org: pause, suspend, resume, remove; each settles every definition of the org."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.errors import Conflict
from worker.ids import OrgId
from worker.operations import settle
from worker.orgs.org import STOPS, OrgState, may_move
from worker.store import audit, backfills, credentials, definitions, edit_runs, listing, orgs
from worker.store.database import Database

Row = dict[str, Any]

_ACTIONS: dict[OrgState, str] = {
    "active": "org.resume",
    "paused": "org.pause",
    "suspended": "org.suspend",
    "removed": "org.remove",
}


def set_org_state(
    database: Database, org: str, state: OrgState, *, actor: str, note: str | None = None
) -> Row:
    """Move an org to a state and return it; one that is in it already stays as it is.

    `paused`: nothing new fires or starts. `suspended`: what waits is cancelled too, at
    once, and what runs within one renewal. `removed`: its definitions are closed and
    its secrets destroyed as well. `active`: it goes on from now; nothing that was due
    meanwhile is replayed.

    Raises:
        NotFound: there is no such org.
        Conflict: it was removed.
    """
    with database.transaction() as connection:
        row = orgs.require(connection, org, lock=True)
        if not may_move(row["state"], state):
            raise Conflict(f"org {org} was removed", fix=f"`orgs add {org}` brings it back")
        if row["state"] != state:
            now = database.now(connection)
            with settle.settled_org(connection, row["id"], at=now) as rows:
                orgs.set_state(connection, row["id"], state, by=actor, at=now, note=note)
                stopped = _stop(connection, row["id"], state, rows, now)
            entry = audit.Entry(
                row["id"], _ACTIONS[state], org, {"from": row["state"], "note": note} | stopped
            )
            audit.record(connection, [entry], at=now, actor=actor)
        return listing.org(connection, org)


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
        backfills.cancel(connection, org_id, at=at)
        for row in rows:
            definitions.change(
                connection, org_id, row["id"], {"closed_at": at}, at=at, revision=row["revision"]
            )
    return stopped
