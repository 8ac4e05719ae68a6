"""How a definition's newest runs have ended."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, select

from worker.ids import DefinitionId, OrgId, RunId
from worker.store import tables

_runs = tables.runs

FAILED = ("failed", "refused")


def failed_in_a_row(
    connection: Connection, org_id: OrgId, definition_id: DefinitionId, *, since: datetime, most: int
) -> int:
    """How many of the newest runs that ended after `since` failed or were refused, up to `most`.

    Runs of a backfill, and those that were cancelled or skipped, are left out.
    """
    query = (
        select(_runs.c.state)
        .where(
            _runs.c.org_id == org_id,
            _runs.c.definition_id == definition_id,
            _runs.c.origin != "backfill",
            _runs.c.state.in_(("succeeded", *FAILED)),
            _runs.c.finished_at > since,
        )
        .order_by(_runs.c.id.desc())
        .limit(most)
    )
    failed = 0
    for state in connection.execute(query).scalars():
        if state not in FAILED:
            break
        failed += 1
    return failed


def last_failed(connection: Connection, org_id: OrgId, definition_id: DefinitionId) -> RunId | None:
    """The newest run that failed or was refused."""
    query = (
        select(_runs.c.id)
        .where(_runs.c.org_id == org_id, _runs.c.definition_id == definition_id, _runs.c.state.in_(FAILED))
        .order_by(_runs.c.id.desc())
        .limit(1)
    )
    return connection.execute(query).scalar_one_or_none()
