"""The lines of a run's log as people read them."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, select, tuple_

from worker.ids import OrgId, RunId
from worker.store import tables
from worker.store.paging import Row

_logs = tables.run_logs

START = (0, 0)


def lines(
    connection: Connection,
    org_id: OrgId,
    run_id: RunId,
    *,
    after: tuple[int, int] = START,
    limit: int = 1000,
) -> list[Row]:
    """The first `limit` lines of a run of one org that follow (attempt, seq), oldest first."""
    return _lines(connection, [_logs.c.org_id == org_id], run_id, after, limit)


def lines_for_all_orgs(
    connection: Connection, run_id: RunId, *, after: tuple[int, int] = START, limit: int = 1000
) -> list[Row]:
    """As `lines`, whichever org's run it is."""
    return _lines(connection, [], run_id, after, limit)


def _lines(
    connection: Connection,
    where: list[ColumnElement[bool]],
    run_id: RunId,
    after: tuple[int, int],
    limit: int,
) -> list[Row]:
    query = (
        select(_logs.c.attempt, _logs.c.seq, _logs.c.at, _logs.c.level, _logs.c.source, _logs.c.text)
        .where(*where, _logs.c.run_id == run_id, tuple_(_logs.c.attempt, _logs.c.seq) > tuple_(*after))
        .order_by(_logs.c.attempt, _logs.c.seq)
        .limit(limit)
    )
    return [dict(row) for row in connection.execute(query).mappings()]
