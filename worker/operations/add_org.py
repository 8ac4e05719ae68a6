"""Make an org known; one that was removed comes back with its history and without its secrets."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from worker.errors import Conflict
from worker.ids import OrgId, new_id
from worker.operations import org_entry
from worker.operations.materialise import materialise_first
from worker.orgs.org import OrgEntry
from worker.store import audit, listing, orgs
from worker.store.database import Database

Row = dict[str, Any]


def add_org(
    database: Database, entry: OrgEntry, *, actor: str, issuers: Collection[str] | None = None
) -> Row:
    """Add one org, with what templates make for it, and return its row.

    `issuers` are those that `worker.toml` has, None if unknown.

    Raises:
        Conflict: there is such an org already.
        UsageError: no issuer is called that, or a value is out of range.
    """
    org_entry.check(entry, issuers)
    with database.transaction() as connection:
        now = database.now(connection)
        there = orgs.find(connection, entry.code, lock=True)
        if there is not None and there["state"] != "removed":
            raise Conflict(
                f"there is an org {entry.code} already", fix="to change it, name it in a file for `apply`"
            )
        columns = org_entry.columns(entry)
        if there is None:
            org_id = OrgId(new_id())
            fresh = {"id": org_id, "code": entry.code, "created_at": now, "updated_at": now}
            orgs.insert_for_all_orgs(connection, [fresh | columns])
        else:
            org_id = there["id"]
            orgs.change(connection, org_id, columns, at=now)
            orgs.set_state(connection, org_id, "active", by=actor, at=now, note=None)
        materialise_first(connection, actor=actor, at=now)
        audit.record(connection, [audit.Entry(org_id, "org.add", entry.code, columns)], at=now, actor=actor)
        return listing.org(connection, entry.code)
