"""How many other orgs meet what one org's run met: whether the trouble is one org's or everybody's."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, Select, func, select

from worker.ids import OrgId
from worker.store import tables

# Rows that are looked at before the answer is "at least": a broken release fails a hundred times a second.
MOST = 10_000

_attempts = tables.attempts
_live = tables.live_runs


@dataclass(frozen=True, slots=True)
class Others:
    """So many other orgs; with `more` there may be further ones."""

    orgs: int
    more: bool = False


def others_that_failed(
    connection: Connection, org_id: OrgId, cause: str, start: datetime, end: datetime
) -> Others:
    """Orgs but this one of which an attempt ended with this `error_cause` in [start, end)."""
    return _others(
        connection,
        select(_attempts.c.org_id).where(
            _attempts.c.error_cause == cause,
            _attempts.c.ended_at >= start,
            _attempts.c.ended_at < end,
            _attempts.c.org_id != org_id,
        ),
    )


def others_without_token(connection: Connection, org_id: OrgId) -> Others:
    """Orgs but this one of which a run waits for a token now."""
    return _others(
        connection,
        select(_live.c.org_id).where(
            _live.c.state == "waiting", _live.c.reason == "no_token", _live.c.org_id != org_id
        ),
    )


def _others(connection: Connection, query: Select[tuple[str]]) -> Others:
    found = query.limit(MOST).subquery()
    orgs, looked_at = connection.execute(
        select(func.count(found.c.org_id.distinct()), func.count(found.c.org_id))
    ).one()
    return Others(orgs, looked_at == MOST)
