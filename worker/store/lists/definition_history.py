"""A definition over time: its revisions, and how long its runs took; both in pages by key."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, TypedDict, cast

from sqlalchemy import Connection, select

from worker.ids import DefinitionId, OrgId, RunId
from worker.store import tables
from worker.store.dialect import all_rows, below, rows_as
from worker.store.lists import redaction
from worker.store.lists.redaction import Shown, Spec

_definitions, _revisions, _runs = tables.definitions, tables.definition_revisions, tables.runs


class Revision(TypedDict):
    """A change of a definition: its spec from then on."""

    revision: Shown[int]
    spec: Spec
    at: Shown[datetime]
    by: Annotated[str, redaction.actor]


class Length(TypedDict):
    """An ended run, and its last attempt."""

    id: RunId
    scheduled_for: datetime
    state: str
    started_at: datetime
    finished_at: datetime


def revisions(
    connection: Connection,
    org_id: OrgId,
    definition_id: DefinitionId,
    *,
    before: int | None = None,
    limit: int,
) -> list[Revision]:
    """The newest revisions, or the newest ones before a number."""
    query = (
        select(_revisions.c.revision, _revisions.c.spec, _revisions.c.at, _revisions.c.by)
        .join(_definitions, _definitions.c.id == _revisions.c.definition_id)
        .where(_revisions.c.definition_id == definition_id, _definitions.c.org_id == org_id)
    )
    query = query.where(*below(_revisions.c.revision, before))
    query = query.order_by(_revisions.c.revision.desc()).limit(limit)
    return rows_as(Revision, connection, query)


def lengths(
    connection: Connection, org_id: OrgId, definition_id: DefinitionId, *, limit: int
) -> list[Length]:
    """Those of the newest runs that have started and ended, newest first."""
    newest = (
        select(_runs.c.id, _runs.c.scheduled_for, _runs.c.state, _runs.c.started_at, _runs.c.finished_at)
        .where(_runs.c.org_id == org_id, _runs.c.definition_id == definition_id)
        .order_by(_runs.c.id.desc())
        .limit(limit)
    )
    rows = all_rows(connection, newest)
    return cast(list[Length], [row for row in rows if row["started_at"] and row["finished_at"]])
