"""Audit: who changed what, one row per change, in the same transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select

from worker.ids import OrgId, Scope, new_id
from worker.store import tables
from worker.store.bulk import insert_many
from worker.store.dialect import in_scope

PROPERTY_CHANGES = ("property.set", "property.unset")
# Changes that are read at once: as many as a program makes in a minute.
MAX_CHANGES = 10_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One change: `action` is noun.verb, `subject` a name as typed in commands; `detail` has no secret."""

    org_id: OrgId | None
    action: str
    subject: str
    detail: Mapping[str, Any] | None = None


def record(connection: Connection, entries: Sequence[Entry], *, at: datetime, actor: str) -> None:
    """Write one row per entry."""
    insert_many(
        connection,
        tables.audit,
        [
            {
                "id": new_id(),
                "at": at,
                "actor": actor,
                "action": entry.action,
                "org_id": entry.org_id,
                "subject": entry.subject,
                "detail": dict(entry.detail) if entry.detail else None,
            }
            for entry in entries
        ],
    )


def note(
    connection: Connection,
    org_id: OrgId | None,
    action: str,
    subject: str,
    detail: Mapping[str, Any] | None = None,
    *,
    at: datetime,
    actor: str,
) -> None:
    """Write the row of one change; see `Entry`."""
    record(connection, [Entry(org_id, action, subject, detail)], at=at, actor=actor)


def property_changes(connection: Connection, scope: Scope, since: str) -> list[tuple[str, OrgId]]:
    """Changes of orgs' properties at the provider that have an id after `since`: id and org."""
    rows = connection.execute(
        select(tables.audit.c.id, tables.audit.c.org_id)
        .where(tables.audit.c.id > since, tables.audit.c.action.in_(PROPERTY_CHANGES))
        .where(*in_scope(tables.audit.c.org_id, scope))
        .order_by(tables.audit.c.id.desc())
        .limit(MAX_CHANGES)
    )
    return [(str(change), OrgId(str(org_id))) for change, org_id in rows]
