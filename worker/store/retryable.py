"""Ended runs that a filter means and that nobody has retried yet: pages by key, the oldest end first."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, and_, exists, or_, select

from worker.errors import UsageError
from worker.ids import OrgId, RunId
from worker.store import tables
from worker.store.paging import Row

_runs = tables.runs
_ends = tables.run_ends
_orgs = tables.orgs
_definitions = tables.definitions
_attempts = tables.attempts

# Instant of the end and id of a run: what follows it is the next page.
Key = tuple[datetime, str]


@dataclass(frozen=True, slots=True)
class Which:
    """Runs that ended as `state`; `since` bounds their end, `cause` is the last attempt's `error_cause`.

    Raises:
        UsageError: a state that is not one of an ended run.
    """

    state: str = "failed"
    definition: str | None = None
    since: datetime | None = None
    reason: str | None = None
    cause: str | None = None

    def __post_init__(self) -> None:
        if self.state not in tables.FINAL_STATES:
            raise UsageError(
                f"{self.state!r} is no state of a run that has ended",
                fix=f"one of {', '.join(tables.FINAL_STATES)}",
            )


def page(
    connection: Connection, org_id: OrgId, which: Which, *, until: datetime, after: Key | None, limit: int
) -> list[Row]:
    """The first `limit` of one org's such runs that ended at or before `until` and follow `after`."""
    return _page(connection, [_ends.c.org_id == org_id], which, until, after, limit)


def page_for_all_orgs(
    connection: Connection, which: Which, *, until: datetime, after: Key | None, limit: int
) -> list[Row]:
    """As `page`, of every org."""
    return _page(connection, [], which, until, after, limit)


def retry_of(connection: Connection, run_id: RunId) -> RunId | None:
    """A run that retries this one, if there is any."""
    return connection.execute(select(_runs.c.id).where(_runs.c.retry_of == run_id)).scalars().first()


def _page(
    connection: Connection,
    where: list[ColumnElement[bool]],
    which: Which,
    until: datetime,
    after: Key | None,
    limit: int,
) -> list[Row]:
    newer = _runs.alias("newer")
    ended_at, id_ = _ends.c.finished_at, _ends.c.run_id
    where += [_ends.c.state == which.state, ended_at <= until, ~exists().where(newer.c.retry_of == id_)]
    if after is not None:
        at, run_id = after
        where += [ended_at >= at, or_(ended_at > at, and_(ended_at == at, id_ > run_id))]
    if which.since is not None:
        where.append(ended_at >= which.since)
    if which.definition is not None:
        where.append(_definitions.c.name == which.definition)
    if which.reason is not None:
        where.append(_runs.c.reason == which.reason)
    if which.cause is not None:
        last = (
            select(_attempts.c.error_cause)
            .where(_attempts.c.run_id == _runs.c.id)
            .order_by(_attempts.c.attempt.desc())
            .limit(1)
        )
        where.append(last.scalar_subquery() == which.cause)
    query = (
        select(
            id_.label("id"),
            _orgs.c.code.label("org"),
            _definitions.c.name.label("definition"),
            _runs.c.scheduled_for,
            _ends.c.state,
            _runs.c.reason,
            _runs.c.detail,
            ended_at,
        )
        .select_from(_ends)
        .join(_runs, _runs.c.id == id_)
        .join(_orgs, _orgs.c.id == _ends.c.org_id)
        .join(_definitions, _definitions.c.id == _ends.c.definition_id)
        .where(*where)
        .order_by(ended_at, id_)
        .limit(limit)
    )
    return [dict(row) for row in connection.execute(query).mappings()]
