"""Who changed what: one row beside each change, in the same transaction."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert

from worker.ids import OrgId, new_id
from worker.store import tables


def record(
    connection: Connection,
    org_id: OrgId | None,
    *,
    at: datetime,
    actor: str,
    action: str,
    subject: str,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Write one row; `action` is noun.verb, `subject` what a reader would type, no secret in `detail`."""
    connection.execute(
        insert(tables.audit).values(
            id=new_id(),
            at=at,
            actor=actor,
            action=action,
            org_id=org_id,
            subject=subject,
            detail=dict(detail) if detail else None,
        )
    )
