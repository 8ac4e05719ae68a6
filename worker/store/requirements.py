"""Requirements: what orgs need tokens for: their definitions in force, page by page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, select

from worker.ids import DefinitionId, OrgId
from worker.store import tables
from worker.store.connection import database_now

Row = dict[str, Any]

_orgs = tables.orgs
_definitions = tables.definitions
_revisions = tables.definition_revisions

# How attempts end that were not cut short from outside.
OWN_ENDS = ("succeeded", "failed", "retry", "timed_out", "snoozed")


def orgs_for_all_orgs(connection: Connection, *, after: str | None = None, limit: int = 500) -> list[Row]:
    """Orgs that may run something, by their code: active and paused ones, those that follow `after`."""
    query = (
        select(
            *(_orgs.c[name] for name in ("id", "code", "issuer", "timezone", "state", "max_concurrent_runs"))
        )
        .where(_orgs.c.state.in_(("active", "paused")))
        .order_by(_orgs.c.code)
        .limit(limit)
    )
    if after is not None:
        query = query.where(_orgs.c.code > after)
    return [dict(row) for row in connection.execute(query).mappings()]


def definitions_for_all_orgs(connection: Connection, org_ids: Sequence[str]) -> list[Row]:
    """These orgs' definitions, neither closed nor disabled: id, org_id, name, spec, paused_at."""
    query = (
        select(
            _definitions.c.id,
            _definitions.c.org_id,
            _definitions.c.name,
            _definitions.c.paused_at,
            _revisions.c.spec,
        )
        .join(
            _revisions,
            (_revisions.c.definition_id == _definitions.c.id)
            & (_revisions.c.revision == _definitions.c.revision),
        )
        .where(_definitions.c.org_id.in_(org_ids), _definitions.c.closed_at.is_(None), _definitions.c.enabled)
        .order_by(_definitions.c.org_id, _definitions.c.name)
    )
    return [dict(row) for row in connection.execute(query).mappings()]


def live_workers(connection: Connection) -> list[Row]:
    """Host and capacity of the workers that hold their lease."""
    workers = tables.workers
    alive = (workers.c.ended_at.is_(None), workers.c.lease_until > database_now(connection))
    query = select(workers.c.host, workers.c.capacity).where(*alive).order_by(workers.c.id)
    return [dict(row) for row in connection.execute(query).mappings()]


def last_attempts(
    connection: Connection, org_id: OrgId, definition_id: DefinitionId, *, limit: int
) -> list[Row]:
    """Of a definition's newest attempts that reached their own end: handler, seconds, peak_memory."""
    attempts, runs = tables.attempts, tables.runs
    newest = (
        select(runs.c.id)
        .where(runs.c.org_id == org_id, runs.c.definition_id == definition_id)
        .order_by(runs.c.id.desc())
        .limit(limit)
    )
    query = select(
        attempts.c.handler, attempts.c.started_at, attempts.c.ended_at, attempts.c.peak_memory
    ).where(attempts.c.run_id.in_(newest.subquery().select()), attempts.c.outcome.in_(OWN_ENDS))
    return [
        {
            "handler": row["handler"],
            "seconds": (row["ended_at"] - row["started_at"]).total_seconds(),
            "peak_memory": row["peak_memory"],
        }
        for row in connection.execute(query).mappings()
    ]


def last_claims(connection: Connection, org_id: OrgId) -> Row | None:
    """The claims of the org's last run that got a token, redacted; None where it has none."""
    attempts = tables.attempts
    newest = (
        select(tables.runs.c.id)
        .where(tables.runs.c.org_id == org_id)
        .order_by(tables.runs.c.id.desc())
        .limit(20)
        .subquery()
    )
    query = (
        select(attempts.c.claims)
        .where(attempts.c.run_id.in_(select(newest.c.id)), attempts.c.claims.is_not(None))
        .order_by(attempts.c.run_id.desc(), attempts.c.attempt.desc())
        .limit(1)
    )
    claims: Row | None = connection.execute(query).scalar()
    return claims
