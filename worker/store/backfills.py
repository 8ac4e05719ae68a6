"""Backfills: past ranges whose scheduled times become runs, a few at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, insert, select, update

from worker.ids import AllOrgs, DefinitionId, OrgId, Scope
from worker.store import edit_runs, tables
from worker.store.bulk import rows_among
from worker.store.dialect import Row, all_rows, first_row, in_scope
from worker.store.lists.read import unfinished_runs

_backfills = tables.backfills
_definitions = tables.definitions
_orgs = tables.orgs
_live = tables.live_runs
_revisions = tables.definition_revisions


def find(
    connection: Connection,
    org_id: OrgId,
    definition_id: DefinitionId,
    start: datetime,
    until: datetime,
    *,
    lock: bool = True,
) -> Row | None:
    """The backfill of exactly this range, locked unless asked otherwise."""
    query = select(_backfills).where(
        _backfills.c.org_id == org_id,
        _backfills.c.definition_id == definition_id,
        _backfills.c.range_from == start,
        _backfills.c.range_until == until,
    )
    return first_row(connection, query.with_for_update() if lock else query)


def add(connection: Connection, values: Mapping[str, Any]) -> None:
    """Insert a backfill; its runs follow later."""
    connection.execute(insert(_backfills).values(**values))


def change(connection: Connection, org_id: OrgId, backfill_id: str, values: Mapping[str, Any]) -> None:
    """Change columns of one backfill."""
    connection.execute(
        update(_backfills)
        .where(_backfills.c.org_id == org_id, _backfills.c.id == backfill_id)
        .values(**values)
    )


def cancel(connection: Connection, org_id: OrgId, *which: ColumnElement[bool], at: datetime) -> None:
    """End unfinished backfills of an org: they make no more runs."""
    connection.execute(
        update(_backfills)
        .where(_backfills.c.org_id == org_id, _backfills.c.finished_at.is_(None), *which)
        .values(cancelled_at=at, finished_at=at)
    )


def lock_unfinished(connection: Connection, org_id: OrgId) -> None:
    """Keep workers from making more runs of an org's backfills until the transaction ends."""
    query = select(_backfills.c.id).where(_backfills.c.org_id == org_id, _backfills.c.finished_at.is_(None))
    connection.execute(query.order_by(_backfills.c.id).with_for_update()).all()


def unfinished_of(
    connection: Connection, scope: Scope, definition_ids: Sequence[DefinitionId]
) -> set[DefinitionId]:
    """Those of these definitions that have backfills for `cancel`."""
    query = select(_backfills.c.definition_id)
    query = query.where(_backfills.c.finished_at.is_(None), *in_scope(_backfills.c.org_id, scope))
    return {id_ for (id_,) in rows_among(connection, query, _backfills.c.definition_id, definition_ids)}


def is_of(definition_id: DefinitionId) -> ColumnElement[bool]:
    """A condition for `cancel`: the backfills of one definition."""
    return _backfills.c.definition_id == definition_id


def end_waiting(connection: Connection, org_id: OrgId, backfill_id: str) -> int:
    """Cancel the waiting runs of a backfill; returns how many."""
    ours = _live.c.backfill_id == backfill_id
    return len(edit_runs.end_waiting(connection, org_id, ours, reason="requested"))


def lock_with_room(connection: Connection, _: AllOrgs, limit: int) -> list[Row]:
    """Unfinished backfills of active orgs that are below their limit of unfinished runs, locked.

    Each has its `spec`, the names of org and definition, and `unfinished`, counted under the
    lock; those that are locked already are left out.
    """
    found = (
        select(_backfills.c.id)
        .join(_orgs, _orgs.c.id == _backfills.c.org_id)
        .where(
            _backfills.c.finished_at.is_(None),
            _orgs.c.state == "active",
            unfinished_runs() < _backfills.c.max_concurrent,
        )
        .order_by(_backfills.c.id)
        .limit(limit)
    )
    ids = connection.execute(found.with_for_update(of=_backfills, skip_locked=True)).scalars().all()
    if not ids:
        return []
    # A later statement: its snapshot has every run that was made before the lock.
    query = (
        select(
            _backfills,
            unfinished_runs().label("unfinished"),
            _orgs.c.code.label("org"),
            _orgs.c.timezone.label("org_timezone"),
            _orgs.c.pool.label("org_pool"),
            _definitions.c.name.label("definition"),
            _revisions.c.spec,
        )
        .join(_orgs, _orgs.c.id == _backfills.c.org_id)
        .join(_definitions, _definitions.c.id == _backfills.c.definition_id)
        .join(
            _revisions,
            (_revisions.c.definition_id == _backfills.c.definition_id)
            & (_revisions.c.revision == _backfills.c.revision),
        )
        .where(_backfills.c.id.in_(ids), _backfills.c.finished_at.is_(None), _orgs.c.state == "active")
        .order_by(_backfills.c.id)
    )
    return all_rows(connection, query)


def is_any_unfinished(connection: Connection) -> bool:
    """Whether any backfill is unfinished."""
    query = select(_backfills.c.id).where(_backfills.c.finished_at.is_(None)).limit(1)
    return connection.execute(query).first() is not None
