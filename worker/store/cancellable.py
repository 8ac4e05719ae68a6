"""Unfinished runs that a filter means and that nobody has asked to stop yet: pages by key, oldest first."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, func, select

from worker.errors import UsageError
from worker.ids import OrgId, RunId
from worker.store import tables
from worker.store.paging import Row

_runs = tables.runs
_live = tables.live_runs
_orgs = tables.orgs
_definitions = tables.definitions

STATES = {"waiting": ("waiting", "held"), "running": ("running",)}


@dataclass(frozen=True, slots=True)
class Which:
    """Runs that wait or run; `since` bounds their making, `reason` is what those that wait do so for.

    Raises:
        UsageError: a state that is not one of an unfinished run.
    """

    state: str | None = None
    definition: str | None = None
    since: datetime | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.state is not None and self.state not in STATES:
            raise UsageError(
                f"{self.state!r} is no state of a run that can be cancelled",
                fix=f"one of {', '.join(STATES)}",
            )


def newest_for_all_orgs(connection: Connection) -> RunId | None:
    """The newest unfinished run; what is made later is not meant by a command given now."""
    return connection.execute(select(_live.c.id).order_by(_live.c.id.desc()).limit(1)).scalars().first()


def page(
    connection: Connection, org_id: OrgId, which: Which, *, until: RunId, after: RunId | None, limit: int
) -> list[Row]:
    """The first `limit` of one org's such runs, up to the run `until`, that follow `after`."""
    return _page(connection, [_live.c.org_id == org_id], which, until, after, limit)


def page_for_all_orgs(
    connection: Connection, which: Which, *, until: RunId, after: RunId | None, limit: int
) -> list[Row]:
    """As `page`, of every org."""
    return _page(connection, [], which, until, after, limit)


def _page(
    connection: Connection,
    where: list[ColumnElement[bool]],
    which: Which,
    until: RunId,
    after: RunId | None,
    limit: int,
) -> list[Row]:
    where += [_live.c.id <= until, _live.c.cancel_requested_at.is_(None)]
    if after is not None:
        where.append(_live.c.id > after)
    if which.state is not None:
        where.append(_live.c.state.in_(STATES[which.state]))
    if which.since is not None:
        where.append(_runs.c.created_at >= which.since)
    if which.definition is not None:
        where.append(_definitions.c.name == which.definition)
    if which.reason is not None:
        where.append(_live.c.reason == which.reason)
    query = (
        select(
            _live.c.id,
            _orgs.c.code.label("org"),
            _definitions.c.name.label("definition"),
            _live.c.scheduled_for,
            func.replace(_live.c.state, "held", "waiting").label("state"),
            _live.c.reason,
            _live.c.detail,
            _live.c.started_at,
        )
        .join(_runs, _runs.c.id == _live.c.id)
        .join(_orgs, _orgs.c.id == _live.c.org_id)
        .join(_definitions, _definitions.c.id == _live.c.definition_id)
        .where(*where)
        .order_by(_live.c.id)
        .limit(limit)
    )
    return [dict(row) for row in connection.execute(query).mappings()]
